// What the CUDA drivers share: vector access, reductions over a warp, a block and a grid, and the launch.
#pragma once

#define FUSEDLOSS_ISA cuda

#include "../kernels/cuda.h"
#include "../kernels/functors.h"

#ifdef __CUDACC__
#include "device.cuh"
#else
#include <cuda_on_cpu.h>
#endif

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;  // of every block
constexpr int kMaxBlocks = 2048;  // of a grid that leaves partial sums: 16 bytes each in the workspace

FUSEDLOSS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDLOSS_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two numbers rounded to a half type, the first one in the lower bits.
template <class S>
__device__ __forceinline__ uint32_t two_halves(float low, float high) {
#ifdef __CUDA_ARCH__
  return std::is_same_v<S, bf16> ? two_bf16(low, high) : two_fp16(low, high);
#else
  return store<S>(low).bits | uint32_t(store<S>(high).bits) << 16;
#endif
}

// Neighbouring numbers that one instruction reads or writes: 16 bytes of them, or fewer.
template <class S, int kCount = int(16 / sizeof(S))>
struct alignas(kCount * sizeof(S)) Vector {
  static constexpr int width = kCount;
  using Bits =
      std::conditional_t<sizeof(S) * kCount == 16, uint4,
                         std::conditional_t<sizeof(S) * kCount == 8, uint2,
                                            std::conditional_t<sizeof(S) * kCount == 4, unsigned, unsigned short>>>;
  S values[kCount];
};

// 1 as a constant, which store<S>(1) is not.
template <class S>
__device__ constexpr S one_of() {
  if constexpr (std::is_same_v<S, bf16>)
    return {0x3F80};
  else if constexpr (std::is_same_v<S, fp16>)
    return {0x3C00};
  else
    return 1;
}

template <class S, int kCount = Vector<S>::width>
__device__ __forceinline__ Vector<S, kCount> load_vector(const S* from) {
  return bit_cast<Vector<S, kCount>>(load_bits<typename Vector<S, kCount>::Bits>(from));
}
template <class S, int kCount>
__device__ __forceinline__ void store_vector(S* to, const Vector<S, kCount>& vector) {
  store_bits(to, bit_cast<typename Vector<S, kCount>::Bits>(vector));
}

template <int kCount>
struct Words {
  uint32_t words[kCount];
};

// The numbers of a vector, each half type by one instruction.
template <class S, int kCount>
__device__ __forceinline__ void unpack(const Vector<S, kCount>& vector, Accumulate<S> (&numbers)[kCount]) {
  if constexpr (std::is_same_v<S, bf16> && kCount % 2 == 0) {
    const auto pairs = bit_cast<Words<kCount / 2>>(vector);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      numbers[k] = bit_cast<float>(k % 2 ? pairs.words[k / 2] & 0xffff0000u : pairs.words[k / 2] << 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) numbers[k] = load(vector.values[k]);
  }
}
template <class S, int kCount>
__device__ __forceinline__ Vector<S, kCount> pack(const Accumulate<S> (&numbers)[kCount]) {
  if constexpr (sizeof(S) == 2 && kCount % 2 == 0) {
    Words<kCount / 2> pairs;
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) pairs.words[k] = two_halves<S>(numbers[2 * k], numbers[2 * k + 1]);
    return bit_cast<Vector<S, kCount>>(pairs);
  } else {
    Vector<S, kCount> vector;
#pragma unroll
    for (int k = 0; k < kCount; ++k) vector.values[k] = store<S>(numbers[k]);
    return vector;
  }
}

// The larger of two numbers, `a` where b is NaN.
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
#ifdef __CUDA_ARCH__
  return ::fmax(a, b);  // one instruction where a comparison takes two
#else
  return b > a ? b : a;
#endif
}

// e^gap for gap <= 0 in a sum over logits of type S. For half types by one product and the special function unit, whose
// relative error of |gap| 2^-23 is far below what rounding the logits has cost; float takes three times as many
// instructions to be exact.
template <class S>
__device__ __forceinline__ Accumulate<S> exponential(Accumulate<S> gap) {
  if constexpr (sizeof(S) == 2) return exp2_approximately(gap * 1.44269504f);
  return exp(gap);
}

// `count` elements as aligned vectors between scalars that are not: a head, and a tail. Scalar number i is element
// scalar(i). Within a row, Index is 32 bits wide: half the registers.
template <class S, class Index>
struct Run {
  static constexpr Index width = Vector<S>::width;
  Index count, head, vectors;

  FUSEDLOSS_HD Run(const void* begin, Index count_, bool vectorised) : count(count_), head(count_), vectors(0) {
    const Index misaligned = Index((16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16 / sizeof(S));
    if (vectorised && misaligned < count) {
      head = misaligned;
      vectors = (count - head) / width;
    }
  }
  FUSEDLOSS_HD Index scalars() const { return count - vectors * width; }
  FUSEDLOSS_HD Index scalar(Index i) const { return i < head ? i : i + vectors * width; }
  FUSEDLOSS_HD Index vector(Index v) const { return head + v * width; }
};

FUSEDLOSS_HD bool same_alignment(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// ---- sums, always in one order

template <int kCount>
struct Sums {
  double values[kCount] = {};
};

// The sums over the block, in every thread of its first warp.
template <int kCount>
__device__ Sums<kCount> sum_of_block(Sums<kCount> sums, double* shared) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int lane = thread % kWarp, warp = thread / kWarp;
  for (double& value : sums.values) {
    for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    if (lane == 0) shared[warp * kCount + i] = sums.values[i];
  }
  __syncthreads();
  if (warp > 0) return sums;
  for (int i = 0; i < kCount; ++i) {
    double& value = sums.values[i];
    value = lane < threads / kWarp ? shared[lane * kCount + i] : 0;
    for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  }
  return sums;
}

struct Workspace {
  unsigned* counter;  // 0 at every launch: the last block of a grid leaves it so
  double* partial;

  explicit FUSEDLOSS_HD Workspace(void* bytes)
      : counter(static_cast<unsigned*>(bytes)), partial(reinterpret_cast<double*>(static_cast<char*>(bytes) + 16)) {}
};
static_assert(16 + kMaxBlocks * 2 * sizeof(double) <= kCudaWorkspaceBytes, "two sums of every block fit");

// Whether this is the last block to come here, once in a kernel: what the others wrote before is then visible to all of
// its threads.
__device__ inline bool is_last_block(unsigned* counter, double* shared) {
  const bool first_thread = threadIdx.x == 0 && threadIdx.y == 0;
  bool* last = reinterpret_cast<bool*>(shared);
  thread_fence();
  __syncthreads();
  if (first_thread) *last = atomic_increment_to(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  const bool result = *last;
  thread_fence();
  __syncthreads();
  return result;
}

// The sums over the grid, handed to `write` by one thread.
template <int kCount, class F>
__device__ void sum_of_grid(Sums<kCount> sums, const Workspace& workspace, double* shared, F write) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  sums = sum_of_block(sums, shared);
  if (gridDim.x > 1) {
    if (thread == 0) {
      for (int i = 0; i < kCount; ++i) workspace.partial[blockIdx.x * kCount + i] = sums.values[i];
    }
    if (!is_last_block(workspace.counter, shared)) return;
    sums = {};
    for (int block = thread; block < int(gridDim.x); block += threads) {
      for (int i = 0; i < kCount; ++i) sums.values[i] += workspace.partial[block * kCount + i];
    }
    sums = sum_of_block(sums, shared);
  }
  if (thread == 0) write(sums);
}

// ---- host side

// In fp16 no gradient is made before its upstream gradient is known: that of a mean would underflow before a loss scale
// could lift it.
template <class S>
constexpr bool makes_gradient_in_forward = !std::is_same_v<S, fp16>;

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

struct Device {
  int multiprocessors = 1, threads_of_multiprocessor = 0, shared_bytes_of_multiprocessor = 0;
  int shared_bytes = 0;  // of a block that asks for more than the usual 48 KB
  int clusters = 0;

  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&threads_of_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor, device);
    cudaDeviceGetAttribute(&shared_bytes_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  }
  // The blocks that run at once, for kernels whose blocks go on to further work. Their launch bounds promise registers
  // for so many on a multiprocessor; one of 8.6, 8.9 or 12.0 has fewer threads, and less shared memory, than others.
  int64_t resident_blocks(int of_multiprocessor, int threads = kThreads, size_t shared = 0) const {
    constexpr int64_t kReserved = 1024;  // bytes of shared memory that CUDA takes for each block
    const int64_t fitting =
        least(threads_of_multiprocessor / threads, shared_bytes_of_multiprocessor / (int64_t(shared) + kReserved));
    const int64_t on_each = least(of_multiprocessor, fitting > 0 ? fitting : 1);
    return least(kMaxBlocks, multiprocessors * on_each);
  }
};

struct Launch {
  int64_t blocks;
  dim3 threads;
  size_t shared = 0;
  unsigned cluster = 1;
};

// A grid for `work` parts, one for a thread at a time, that adds up `sums` numbers at its end.
inline Launch grid_for(int64_t work, int resident, int sums) {
  constexpr int kRounds = 8;  // a thread: up to here one block beats several whose sums are added up
  const bool one_block = work <= (sums ? kRounds : 1) * kThreads;
  Launch how = {one_block ? 1 : least(divide_up(work, kThreads), Device().resident_blocks(resident)), dim3(kThreads)};
  how.shared = kWarps * sums * sizeof(double);
  return how;
}

// A launch as CUDA wants it; the attribute lives as long as the configuration.
struct Configuration {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  Configuration(const Launch& how, CudaStream stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(how.blocks), 1, 1);
    config.blockDim = how.threads;
    config.dynamicSmemBytes = how.shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;
};

// Raises the limit to the device's, not to this launch's, because other threads launch the same kernel.
template <class... P>
cudaError_t allow_shared(const Launch& how, void (*kernel)(P...)) {
  if (how.shared <= (48 << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Device().shared_bytes);
}

// Whether the library of the kernel has code for the current device.
template <class... P>
bool has_code(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // an answer, not an error for whoever asks next
  return found;
}

// The clusters that run at once: none where the kernel was compiled without, as older PTX is whatever the device, or
// where the device, or the part of it this stream was given, has no room for one.
template <class... P>
int resident_clusters(const Launch& how, CudaStream stream, void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  int clusters = 0;
  const Configuration configuration(how, stream);
  const bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
                     allow_shared(how, kernel) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config) == cudaSuccess;
  if (!known) cudaGetLastError();  // an answer, not an error for whoever asks next
  return known ? clusters : 0;
}

template <class... P, class... A>
cudaError_t launch(const Launch& how, CudaStream stream, void (*kernel)(P...), A... args) {
  const cudaError_t error = allow_shared(how, kernel);
  if (error != cudaSuccess) return error;
  const Configuration configuration(how, stream);
  return cudaLaunchKernelEx(&configuration.config, kernel, args...);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
