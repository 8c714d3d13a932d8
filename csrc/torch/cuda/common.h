// A call on a CUDA device: what the ops of both families need before they launch.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../common.h"

namespace fusedloss {

// Whether this build has code for the device: a GPU older or newer than the architectures it was made for has none.
bool has_kernels(c10::DeviceIndex device);

// The device and the current stream of a tensor, and a workspace that torch's allocator reuses in stream order.
struct CudaCall {
  c10::cuda::CUDAGuard guard;
  CudaStream stream;
  Tensor workspace;

  explicit CudaCall(const Tensor& on)
      : guard(on.device()),
        stream(c10::cuda::getCurrentCUDAStream().stream()),
        workspace(at::empty({kCudaWorkspaceBytes}, on.options().dtype(at::kByte))) {
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
