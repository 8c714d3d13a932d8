#if defined(__x86_64__)
#include "target_avx2.inl"

#include "../softmax_with_grad.inl"

#include "end_target.inl"
#endif
