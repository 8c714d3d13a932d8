// A call on a CUDA device: what the ops of both families need before they launch.
#pragma once

#include "../common.h"
#include "runtime.h"

namespace fusedloss {

// Whether this build has code for the device: a GPU older or newer than the architectures it was made for has none.
bool has_kernels(c10::DeviceIndex device);
// And the library of a loss that was compiled apart.
bool has_kernels_of(const ForCuda& loss, c10::DeviceIndex device);

// The workspace of the calls on a stream, which must be the current one.
Tensor workspace_of(const c10::cuda::CUDAStream& stream);

// The device and the current stream of a tensor, and the stream's workspace.
struct CudaCall {
  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream current;
  CudaStream stream;
  Tensor workspace;

  explicit CudaCall(const Tensor& on)
      : guard(on.device()),
        current(c10::cuda::getCurrentCUDAStream()),
        stream(current.stream()),
        workspace(workspace_of(current)) {
    TORCH_CHECK(has_kernels(on.device().index()), "fusedloss was built for CUDA architectures ",
                FUSEDLOSS_CUDA_ARCHITECTURES, ", which leave out ", on.device(), "; FUSEDLOSS_DISABLE=1 runs natively");
  }
};

inline void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

// Pinned memory where the kernels of a device leave a target out of range.
BadTarget* bad_target(c10::DeviceIndex device);

// IndexError, once, if a kernel has met one on any device. Reads host memory; waits for nothing.
void raise_bad_target();

}  // namespace fusedloss
