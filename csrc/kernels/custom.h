// A user's own loss, which is compiled into a library of its own.
#pragma once

#include "cpu.h"
#include "cuda.h"
#include "softmax_traits.h"

namespace fusedloss {

// Change with the structs, so that a library compiled against others is refused.
constexpr int64_t kCustomVersion = 3'000'000 + sizeof(PointwiseArgs);
constexpr int64_t kCustomSoftmaxVersion = 1'000'000 + sizeof(SoftmaxArgs);

struct CustomPointwise {
  int64_t version;
  PointwiseTraits traits;
  CpuPointwise cpu;
  CudaPointwise cuda;          // null where it was compiled for the CPU alone
  bool (*cuda_has_kernels)();  // whether for the current device; null likewise
};

// The kernels of a softmax loss, as cpu.h and cuda.h describe them.
struct CpuSoftmax {
  decltype(CpuKernels::softmax_forward) forward;
  decltype(CpuKernels::softmax_backward) backward;
  decltype(CpuKernels::softmax_with_grad) with_grad;
  decltype(CpuKernels::softmax_part) part;
  decltype(CpuKernels::softmax_backward_part) backward_part;
};
struct CudaSoftmax {
  using Kernel = int (*)(Softmax, const CudaSoftmaxArgs&, CudaStream);
  Kernel divisor, forward, backward;
};

// Its library has a list of softmax losses that names this one alone.
struct CustomSoftmax {
  int64_t version;
  SoftmaxTraits traits;
  int64_t (*saved_by)(const double* params);
  CpuSoftmax cpu;
  CudaSoftmax cuda;            // nulls where it was compiled for the CPU alone
  bool (*cuda_has_kernels)();  // whether for the current device; null likewise
};

}  // namespace fusedloss
