// The pointwise kernels of one instruction set without torch, for tests that compile them anew: value and gradients of
// one loss over float64 or float32 data.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FUSEDLOSS_ISA baseline
#include "kernels/cpu.h"
#include "cpu/pointwise.inl"
#include "cpu/one_hot.inl"
#include "cpu/pointwise_tiles.inl"
#include "kernel_driver.h"

namespace {

#define KERNEL(name, Functor) fusedloss::baseline::pointwise<fusedloss::baseline::Functor>,
const fusedloss::CpuPointwise kKernels[] = {FUSEDLOSS_POINTWISE(KERNEL)};
#undef KERNEL

}  // namespace

// A matrix whose rows have `columns`; third, or null, has a stride between columns and one between rows.
// grad_target, grad_third: null where there is none.
extern "C" double run_pointwise(int loss, int is_double, int64_t n, const void* input, const void* target,
                                const void* third, int64_t columns, const int64_t* strides, const double* params,
                                void* losses, void* grad, void* grad_target, void* grad_third) {
  using Result = fusedloss::PointwiseResult;
  fusedloss::PointwiseArgs args = {};
  const fusedloss::DType dtype = dtype_of(is_double);
  copy_params(params, args);
  args.arithmetic = args.output_dtype = dtype;
  args.dims = 2;
  args.sizes[0] = columns;
  args.sizes[1] = n / columns;
  args.input = {input, dtype, true, {1, columns}};
  args.target = {target, dtype, true, {1, columns}};
  args.third = {third, dtype, false, {strides[0], strides[1]}};
  args.upstream = {one(is_double), dtype, true, {}};
  args.one_upstream = true;
  args.scale = 1;
  const fusedloss::CpuPointwise run = kKernels[loss];
  args.output = losses;
  run(Result::Losses, args, 0, n);
  args.output = grad_target;
  if (grad_target) run(Result::TargetGrad, args, 0, n);
  args.output = grad_third;
  if (grad_third) run(Result::ThirdGrad, args, 0, n);
  args.output = grad;
  run(Result::Grad, args, 0, n);
  args.upstream = {};
  args.one_upstream = false;
  std::vector<double> grad_in_forward(n);
  args.output = grad_in_forward.data();
  const double both = run(Result::SumAndGrad, args, 0, n);
  args.output = nullptr;
  const double sum = run(Result::Sum, args, 0, n);
  const bool same = is_double ? close<double>(grad, grad_in_forward, n) : close<float>(grad, grad_in_forward, n);
  return both == sum && same ? sum : NAN;
}

// layout: outer, classes, inner; weight_strides: outer, class, inner. The gradient is made twice: with the sum, and
// alone.
extern "C" double run_indexed(int loss, int is_double, const int64_t* layout, const void* input, const int64_t* index,
                              const void* weight, const int64_t* weight_strides, const double* params, void* losses,
                              void* grad_in_forward, void* grad) {
  fusedloss::PointwiseArgs args = {};
  copy_params(params, args);
  const fusedloss::DType dtype = dtype_of(is_double);
  const fusedloss::CpuPointwise run = kKernels[loss];
  const int64_t n = layout[0] * layout[1] * layout[2];
  args.arithmetic = args.output_dtype = dtype;
  args.dims = 3;
  for (int d = 0; d < 3; ++d) args.sizes[d] = layout[2 - d];
  args.input = {input, dtype, true, {1, layout[2], layout[1] * layout[2]}};
  args.index = index;
  args.ignore_index = -100;
  args.weight = {weight, dtype, false, {weight_strides[2], weight_strides[1], weight_strides[0]}};
  args.scale = 1;
  args.output = losses;
  run(fusedloss::PointwiseResult::Losses, args, 0, n);
  args.output = grad_in_forward;
  const double both = run(fusedloss::PointwiseResult::SumAndGrad, args, 0, n);
  args.one_upstream = true;
  args.upstream = {one(is_double), dtype, true, {}};
  args.output = grad;
  run(fusedloss::PointwiseResult::Grad, args, 0, n);
  args.output = nullptr;
  const double sum = run(fusedloss::PointwiseResult::Sum, args, 0, n);
  return sum == both ? sum : NAN;
}
