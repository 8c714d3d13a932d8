// A user's own pointwise loss, which is compiled into a library of its own.
#pragma once

#include "cpu.h"
#include "cuda.h"

namespace fusedloss {

// Changes with the structs, so that a library compiled against others is refused.
constexpr int64_t kCustomVersion = 3'000'000 + sizeof(PointwiseArgs);
struct CustomPointwise {
  int64_t version;
  PointwiseTraits traits;
  CpuPointwise cpu;
  CudaPointwise cuda;          // null where it was compiled for the CPU alone
  bool (*cuda_has_kernels)();  // whether for the current device; null likewise
};

}  // namespace fusedloss
