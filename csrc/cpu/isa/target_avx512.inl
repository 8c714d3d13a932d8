// Compiles all that follows for AVX-512, in a namespace of its own. Headers of the system stay outside: their code is
// shared.
#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)  // until end_target.inl
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FUSEDLOSS_ISA avx512
#define FUSEDLOSS_F16C  // conversions of half types, which the pragma does not tell the preprocessor
