// What only a GPU does, each behind a name. tests/kernels/cuda_on_cpu gives the same names to an executor on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return shared_bytes;
}

// The value of the lane whose number differs by lane_mask; all 32 lanes take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The upper half of the product.
__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// 2^x by the special function unit, 0 where that is below float's normal range.
__device__ __forceinline__ float exp2_approximately(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Two floats rounded to halves, the first one in the lower bits: one instruction.
__device__ __forceinline__ uint32_t two_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t two_fp16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Aligned bytes at once. Stores are streaming: nothing written is read again by the same kernel.
template <class Bits>
__device__ __forceinline__ Bits load_bits(const void* from) {
  return *static_cast<const Bits*>(from);
}
template <class Bits>
__device__ __forceinline__ void store_bits(void* to, Bits bits) {
  __stcs(static_cast<Bits*>(to), bits);
}

// The counter before: one more each time, and 0 again after `last`.
__device__ __forceinline__ unsigned atomic_increment_to(unsigned* counter, unsigned last) {
  return atomicInc(counter, last);
}
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// Thread-block clusters: no kernel is launched with one that was compiled for less than sm_90.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same shared variable in the block of that rank.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
#else
  return mine;
#endif
}
