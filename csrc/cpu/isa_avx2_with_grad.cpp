#if defined(__x86_64__)
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c")
#define FUSEDLOSS_ISA avx2
#include "softmax_with_grad.inl"
#endif
