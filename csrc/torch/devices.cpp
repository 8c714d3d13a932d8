#include "devices.h"

#include <ATen/EmptyTensor.h>

#include <cstdint>

#include "distillation.h"
#include "pointwise.h"
#include "row_sums.h"
#include "softmax.h"
#ifdef FUSEDLOSS_CUDA
#include "cuda/common.h"
#endif

namespace fusedloss {

namespace {

using Key = c10::DispatchKey;

bool always(c10::DeviceIndex) { return true; }

at::TensorBase empty_on_cpu(at::IntArrayRef sizes, at::OptionalIntArrayRef strides, at::ScalarType dtype, c10::Device) {
  return strides ? at::detail::empty_strided_cpu(sizes, *strides, dtype) : at::detail::empty_cpu(sizes, dtype);
}

}  // namespace

c10::ArrayRef<Device> devices() {
  static const Device all[] = {
      {"cpu",
       c10::kCPU,
       Key::CPU,
       c10::DispatchKeySet({Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU}),
       INT32_MAX,
       /*host_reads=*/true,
       /*row_gradient_in_forward_pays=*/true,
       /*vectors_begin_alike=*/false,
       /*autocast_refuses_probabilities=*/false,
       /*margins_of_halves=*/false,
       /*rows_of_any_two_dtypes=*/true,
       always,
       [](const ForCuda&) { return true; },
       [](const ForCuda&, c10::DeviceIndex) { return true; },
       [](bool) { return true; },
       empty_on_cpu,
       implement_scale_on_cpu,
       implement_pointwise_on_cpu,
       implement_softmax_on_cpu,
       implement_row_sums_on_cpu,
       implement_distillation_on_cpu},
#ifdef FUSEDLOSS_CUDA
      {kCudaName,
       kCudaType,
       kCudaKey,
       c10::DispatchKeySet({kCudaKey, Key::ADInplaceOrView, kCudaAutogradKey, kCudaAutocastKey}),
       kCudaMaxClasses,
       /*host_reads=*/false,
       /*row_gradient_in_forward_pays=*/false,
       /*vectors_begin_alike=*/true,
       /*autocast_refuses_probabilities=*/true,
       /*margins_of_halves=*/true,
       /*rows_of_any_two_dtypes=*/false,
       has_kernels,
       [](const ForCuda& loss) { return loss.compiled; },
       has_kernels_of,
       [](bool has_third) { return !has_third; },
       empty_on_cuda,
       implement_scale_on_cuda,
       implement_pointwise_on_cuda,
       implement_softmax_on_cuda,
       implement_row_sums_on_cuda,
       implement_distillation_on_cuda},
#endif
  };
  return all;
}

const Device& device_for(const at::Tensor& tensor) {
  const c10::DeviceType type = tensor.device().type();
  for (const Device& device : devices()) {
    if (device.type == type) return device;
  }
  TORCH_CHECK(false, "fusedloss has no kernels for ", tensor.device());
}

}  // namespace fusedloss
