#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels/cpu.h"

namespace fusedloss {

namespace baseline {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool supported;
};

const CpuKernels& pick() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate widest_first[] = {
      {&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&baseline::kernels, true}};
#else
  const Candidate widest_first[] = {{&baseline::kernels, true}};
#endif
  const char* variable = std::getenv("FUSEDLOSS_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  for (const Candidate& candidate : widest_first) {
    if (wanted.empty() ? candidate.supported : wanted == candidate.kernels->isa) {
      if (!candidate.supported)
        throw std::invalid_argument("FUSEDLOSS_CPU_ISA=" + wanted + ": this machine has no " + wanted);
      return *candidate.kernels;
    }
  }
  throw std::invalid_argument("FUSEDLOSS_CPU_ISA: expected one of " + std::string(cpu_isas()) + ", got " + wanted);
}

}  // namespace

const char* cpu_isas() {
#if defined(__x86_64__)
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

int64_t softmax_chunk(const SoftmaxLayout& layout) {
  constexpr int64_t kLogits = 32768, kTiles = 256;
  const int64_t rows = kLogits / layout.classes;
  if (layout.class_stride == 1 && rows < kTiles) return rows > 1 ? rows : 1;
  return (rows + kTiles - 1) / kTiles * kTiles + (rows == 0 ? kTiles : 0);  // whole tiles
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = pick();
  return kernels;
}

}  // namespace fusedloss
