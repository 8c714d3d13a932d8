// The end of what target_avx2.inl or target_avx512.inl begins: gcc's pragma lasts until the end of the file, clang's
// must be closed.
#if defined(__clang__)
#pragma clang attribute pop
#endif
