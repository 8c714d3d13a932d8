// All that the torch side asks of CUDA. The tests build it with a header of their own, whose device is the host.
#pragma once

#ifdef FUSEDLOSS_CUDA_RUNTIME
#include FUSEDLOSS_CUDA_RUNTIME
#else

#include <ATen/cuda/EmptyTensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/OptionalArrayRef.h>

namespace fusedloss {

// What torch calls the device, and the keys under which it asks for the device's kernels.
constexpr const char* kCudaName = "cuda";
constexpr c10::DeviceType kCudaType = c10::kCUDA;
constexpr c10::DispatchKey kCudaKey = c10::DispatchKey::CUDA;
constexpr c10::DispatchKey kCudaAutogradKey = c10::DispatchKey::AutogradCUDA;
constexpr c10::DispatchKey kCudaAutocastKey = c10::DispatchKey::AutocastCUDA;

inline at::TensorBase empty_on_cuda(at::IntArrayRef sizes, at::OptionalIntArrayRef strides, at::ScalarType dtype,
                                    c10::Device device) {
  return strides ? at::detail::empty_strided_cuda(sizes, *strides, dtype, device)
                 : at::detail::empty_cuda(sizes, dtype, device, std::nullopt);
}

}  // namespace fusedloss

#endif
