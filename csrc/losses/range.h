// Where a parameter of a loss may lie. Only data: what runs on it is compiled once, in torch/, for no instruction set.
#pragma once

#include <limits>

namespace fusedloss {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// From least to most, both included unless `above_least`. NaN lies in no range.
struct Range {
  double least, most = kInfinity;
  bool above_least = false;
};

}  // namespace fusedloss
