// What the arguments of both families of losses share. The entry points know no torch: they take pointers, sizes and
// strides, and count strides and offsets in elements.
#pragma once

#include <cstdint>

namespace fusedloss {

enum class DType { Float, Double, BFloat16, Half };

constexpr int kMaxParams = 8;

}  // namespace fusedloss
