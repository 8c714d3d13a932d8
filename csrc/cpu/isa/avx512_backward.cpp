#if defined(__x86_64__)
#include "target_avx512.inl"

#include "../softmax_backward.inl"

#include "end_target.inl"
#endif
