// Multiplies a gradient that was made for an upstream gradient of 1 by the real one.
#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int kVectorsOfThread = 4;

// A multiplier of 1, as after a plain loss.backward(), moves none of the 2 * 16 bytes a vector.
template <class S>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(S* data, Run<S, int64_t> run, const void* multiplier_, bool wide) {
  using T = Accumulate<S>;
  const T multiplier = wide ? *static_cast<const T*>(multiplier_) : load(*static_cast<const S*>(multiplier_));
  if (multiplier == T(1)) return;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t v = thread; v < run.vectors; v += threads) {
    Vector<S> vector = load_vector(data + run.vector(v));
#pragma unroll
    for (int k = 0; k < Vector<S>::width; ++k) vector.values[k] = store<S>(load(vector.values[k]) * multiplier);
    store_vector(data + run.vector(v), vector);
  }
  for (int64_t scalar = thread; scalar < run.scalars(); scalar += threads) {
    const int64_t i = run.scalar(scalar);
    data[i] = store<S>(load(data[i]) * multiplier);
  }
}

template <class S>
cudaError_t run_scale(void* data, int64_t count, const void* multiplier, bool wide, CudaStream stream) {
  const Run<S, int64_t> run(data, count, true);
  const int64_t blocks = divide_up(run.vectors, kVectorsOfThread * kThreads);
  const Launch how = {least(blocks > 0 ? blocks : 1, Device().resident_blocks(8)), dim3(kThreads)};
  return launch(how, stream, scale_kernel<S>, static_cast<S*>(data), run, multiplier, wide);
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

bool cuda_has_kernels() { return FUSEDLOSS_ISA::has_code(FUSEDLOSS_ISA::scale_kernel<float>); }

int cuda_scale(DType dtype, void* data, int64_t count, const void* multiplier, bool wide_multiplier,
               CudaStream stream) {
  return FUSEDLOSS_ISA::with_storage(dtype, [&](auto storage) -> int {
    return FUSEDLOSS_ISA::run_scale<decltype(storage)>(data, count, multiplier, wide_multiplier, stream);
  });
}

}  // namespace fusedloss
