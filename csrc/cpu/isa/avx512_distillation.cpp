#if defined(__x86_64__)
#include "target_avx512.inl"

#include "../distillation.inl"

#include "end_target.inl"
#endif
