// In place of cuda_runtime.h and of what csrc/cuda/device.cuh names: kernels compiled as C++20 run on the CPU, where
// sanitizers and a random order of threads, warps and blocks show what is wrong with them.
//
// Not seen: a missing thread_fence, as memory has one order here, and a race that shows only where a thread is
// interrupted between two barriers, as it runs from one to the next undisturbed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <tuple>
#include <type_traits>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// ---- device side

// May alias the floats it is made of.
struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) [[gnu::may_alias]] uint2 {
  unsigned x, y;
};

inline void __syncthreads(cuda_on_cpu::Source source = cuda_on_cpu::Source::current()) {
  cuda_on_cpu::executor.meet(cuda_on_cpu::kSyncThreads, source);
}
inline void __syncwarp(cuda_on_cpu::Source source = cuda_on_cpu::Source::current()) {
  cuda_on_cpu::executor.meet(cuda_on_cpu::kSyncWarp, source);
}
inline void cluster_barrier(cuda_on_cpu::Source source = cuda_on_cpu::Source::current()) {
  cuda_on_cpu::executor.meet(cuda_on_cpu::kClusterBarrier, source);
}

template <class T>
T shuffle_xor(T value, int lane_mask, cuda_on_cpu::Source source = cuda_on_cpu::Source::current()) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "the types of __shfl_xor_sync");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = cuda_on_cpu::executor.shuffle_xor(bits, lane_mask, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned char* shared_memory() { return cuda_on_cpu::executor.block().shared.begin(); }
inline unsigned cluster_rank() { return cuda_on_cpu::executor.block().rank; }

// The same shared variable in the block of that rank.
template <class T>
T* cluster_shared(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(cuda_on_cpu::executor.shared_of(rank, mine));
}

// The upper half of the product.
inline uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

inline float exp2_approximately(float x) {
  const float power = std::exp2(x);
  return power < 1.17549435e-38f ? 0 : power;
}

// A plain access, for UBSan to see a misaligned one.
template <class T>
struct [[gnu::may_alias]] Aliasing {
  T bits;
};
template <class T>
T load_bits(const void* from) {
  return static_cast<const Aliasing<T>*>(from)->bits;
}
template <class T>
void store_bits(void* to, T bits) {
  static_cast<Aliasing<T>*>(to)->bits = bits;
}

// The counter before: one more each time, and 0 again after `last`.
inline unsigned atomic_increment_to(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void thread_fence() {}

// ---- host side

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_on_cpu {

// An H200, until a test pretends otherwise.
struct Device {
  int multiprocessors = 132, shared_bytes = 227 << 10, shared_bytes_of_multiprocessor = 228 << 10, major = 9;
  int threads_of_multiprocessor = 2048;
  bool clusters = true;
  bool runs = true;  // otherwise launches are checked, and that is all
};

inline Device device;
inline cudaLaunchConfig_t last_launch;
inline int64_t launches = 0;  // accepted, since the start
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> allowed_shared_bytes;  // of each kernel, beyond the usual

constexpr size_t kUsualSharedBytes = 48 << 10;
constexpr int kMaxThreads = 1024, kBlocksOfMultiprocessor = 32, kMaxCluster = 8;

// Every order is decided by the seed and by what ran since.
inline void set_seed(uint64_t seed) {
  random_number.seed(seed);
  fault.clear();
}

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return {size.x, size.y, size.z};
  }
  return {};
}

inline bool within(const dim3& size, unsigned x, unsigned y, unsigned z) {
  return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= x && size.y <= y && size.z <= z;
}

inline int64_t active_clusters(const cudaLaunchConfig_t& config) {
  int64_t blocks =
      std::min<int64_t>(kBlocksOfMultiprocessor, device.threads_of_multiprocessor / volume(config.blockDim));
  if (config.dynamicSmemBytes > 0) {
    blocks = std::min<int64_t>(blocks, device.shared_bytes_of_multiprocessor / int64_t(config.dynamicSmemBytes));
  }
  return blocks * device.multiprocessors / int64_t(volume(cluster_of(config)));
}

inline cudaError_t check_cluster(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, cluster = cluster_of(config);
  if (volume(cluster) == 1) return cudaSuccess;
  if (!device.clusters) return cudaErrorNotSupported;
  if (!within(cluster, kMaxCluster, kMaxCluster, kMaxCluster) || volume(cluster) > kMaxCluster || grid.x % cluster.x ||
      grid.y % cluster.y || grid.z % cluster.z) {
    return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  if (!within(config.gridDim, 0x7FFFFFFF, 0xFFFF, 0xFFFF)) return cudaErrorInvalidConfiguration;
  if (!within(config.blockDim, kMaxThreads, kMaxThreads, 64) || volume(config.blockDim) > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = allowed_shared_bytes.find(kernel);
  const size_t most = allowed == allowed_shared_bytes.end() ? kUsualSharedBytes : allowed->second;
  if (config.dynamicSmemBytes > std::min<size_t>(most, device.shared_bytes)) return cudaErrorInvalidValue;
  return check_cluster(config);
}

}  // namespace cuda_on_cpu

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  using namespace cuda_on_cpu;
  const cudaError_t error = check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return report(error);
  if (active_clusters(*config) == 0) return report(cudaErrorLaunchOutOfResources);
  ++launches;
  last_launch = *config;
  if (!device.runs) return cudaSuccess;
  const std::tuple<P...> parameters(std::forward<A>(arguments)...);
  const bool done = executor.run({[&] { std::apply(kernel, parameters); }, config->gridDim, config->blockDim,
                                  cluster_of(*config), config->dynamicSmemBytes});
  return report(done ? cudaSuccess : cudaErrorLaunchFailure);
}

template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  using namespace cuda_on_cpu;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > device.shared_bytes) {
    return report(cudaErrorInvalidValue);
  }
  allowed_shared_bytes[reinterpret_cast<const void*>(kernel)] = size_t(value);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->ptxVersion = 10 * cuda_on_cpu::device.major;
  return cudaSuccess;
}

template <class F>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, F* kernel, const cudaLaunchConfig_t* config) {
  using namespace cuda_on_cpu;
  const cudaError_t error = check_launch(*config, reinterpret_cast<const void*>(kernel));
  *count = error == cudaSuccess ? int(active_clusters(*config)) : 0;
  return report(error);
}

inline cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::device;
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, device.threads_of_multiprocessor},
      {cudaDevAttrComputeCapabilityMajor, device.major},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_bytes_of_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes},
      {cudaDevAttrClusterLaunch, device.clusters},
  };
  const auto found = values.find(attribute);
  if (number != 0 || found == values.end()) return cuda_on_cpu::report(cudaErrorInvalidValue);
  *value = found->second;
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return cuda_on_cpu::fault.c_str();
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}
