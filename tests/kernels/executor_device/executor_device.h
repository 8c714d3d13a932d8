// In place of what csrc/torch/cuda/runtime.h includes: the device of device.cpp, whose memory is the host's and whose
// kernels have run when a launch returns.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/OptionalArrayRef.h>

#include <cstdlib>

struct CUstream_st;
enum cudaError_t : int {};

extern "C" const char* fault();  // of the executor

#define C10_CUDA_CHECK(error) TORCH_CHECK(int(error) == 0, "CUDA error ", int(error), ": ", fault())

enum { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  return cudaError_t(*memory == nullptr);
}

namespace c10::cuda {

struct CUDAGuard : c10::DeviceGuard {
  explicit CUDAGuard(c10::Device device) : DeviceGuard(device) {}
  explicit CUDAGuard(c10::DeviceIndex index) : DeviceGuard(c10::Device(c10::kPrivateUse1, index)) {}
};

class CUDAStream {
 public:
  explicit CUDAStream(c10::Stream of) : of_(of) {}
  CUstream_st* stream() const { return nullptr; }
  c10::StreamId id() const { return of_.id(); }
  c10::Device device() const { return of_.device(); }
  c10::DeviceIndex device_index() const { return of_.device_index(); }

 private:
  c10::Stream of_;
};
inline CUDAStream getCurrentCUDAStream() {
  const c10::impl::VirtualGuardImpl device(c10::kPrivateUse1);
  return CUDAStream(device.getStream(device.getDevice()));
}

// Nothing is ever captured in a graph.
enum class CaptureStatus { None };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }
struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(int) {}
};

}  // namespace c10::cuda

namespace fusedloss {

constexpr const char* kCudaName = "executor";
constexpr c10::DeviceType kCudaType = c10::kPrivateUse1;
constexpr c10::DispatchKey kCudaKey = c10::DispatchKey::PrivateUse1;
constexpr c10::DispatchKey kCudaAutogradKey = c10::DispatchKey::AutogradPrivateUse1;
constexpr c10::DispatchKey kCudaAutocastKey = c10::DispatchKey::AutocastPrivateUse1;

inline at::TensorBase empty_on_cuda(at::IntArrayRef sizes, at::OptionalIntArrayRef strides, at::ScalarType dtype,
                                    c10::Device device) {
  const c10::DeviceGuard guard(device);
  const c10::DispatchKeySet keys(kCudaKey);
  c10::Allocator* memory = c10::GetAllocator(kCudaType);
  return strides ? at::detail::empty_strided_generic(sizes, *strides, memory, keys, dtype)
                 : at::detail::empty_generic(sizes, memory, keys, dtype, std::nullopt);
}

}  // namespace fusedloss
