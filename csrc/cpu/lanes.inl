// Sums by lanes.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

// Independent sums, so that additions neither wait for each other nor depend on the vector width.
constexpr int kLanes = 32;

template <class T>
T add_lanes(const T (&lanes)[kLanes]) {
  T sums[8] = {};
  for (int i = 0; i < kLanes; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += lanes[i + j];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

}  // namespace fusedloss::FUSEDLOSS_ISA
