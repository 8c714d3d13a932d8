// Where max(0, z) of a margin has a slope. The build says 0 for a torch whose clamp_min has none at its bound:
// from 2.14 on.
#pragma once

#include "math.h"

#ifndef FUSEDLOSS_SLOPE_AT_BOUND
#define FUSEDLOSS_SLOPE_AT_BOUND 1
#endif

namespace fusedloss::FUSEDLOSS_ISA {

template <class T>
FUSEDLOSS_HD bool on_slope(T z) {
  return FUSEDLOSS_SLOPE_AT_BOUND ? z >= T(0) : z > T(0);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
