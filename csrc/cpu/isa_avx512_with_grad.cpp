#if defined(__x86_64__)
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FUSEDLOSS_ISA avx512
#include "softmax_with_grad.inl"
#endif
