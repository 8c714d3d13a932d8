// The kernels of one instruction set without torch, for tests that compile them anew: value and gradient of one loss
// over float64 or float32 data.
#include "cpu/isa/baseline.cpp"
#include "cpu/isa/baseline_backward.cpp"
#include "cpu/isa/baseline_forward.cpp"
#include "cpu/isa/baseline_with_grad.cpp"

#include <vector>

namespace {

template <class Args>
void copy_params(const double* params, Args& args) {
  for (int i = 0; i < fusedloss::kMaxParams; ++i) args.params[i] = params[i];
}

fusedloss::DType dtype_of(int is_double) { return is_double ? fusedloss::DType::Double : fusedloss::DType::Float; }

const double kOneDouble = 1;
const float kOneFloat = 1;

const void* one(bool is_double) { return is_double ? static_cast<const void*>(&kOneDouble) : &kOneFloat; }

// Whether one gradient is the other but for what comes of rounding.
template <class T>
bool close(const void* one, const std::vector<double>& other, int64_t count) {
  const T *a = static_cast<const T*>(one), *b = reinterpret_cast<const T*>(other.data());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::fmax(largest, std::fabs(double(a[i])));
    difference = std::fmax(difference, std::fabs(double(a[i]) - double(b[i])));
  }
  return difference <= largest * (sizeof(T) == sizeof(double) ? 1e-13 : 1e-5);
}

}  // namespace

// A matrix whose rows have `columns`; pos_weight, or null, has a stride between columns and one between rows.
// grad_target: null where there is none.
extern "C" double run_pointwise(int loss, int is_double, int64_t n, const void* input, const void* target,
                                const void* pos_weight, int64_t columns, const int64_t* strides, const double* params,
                                void* losses, void* grad, void* grad_target) {
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
  args.pos_weight = {pos_weight, dtype, false, {strides[0], strides[1]}};
  args.upstream = {one(is_double), dtype, true, {}};
  args.one_upstream = true;
  args.scale = 1;
  const fusedloss::CpuPointwise run = fusedloss::baseline::kernels.pointwise[loss];
  args.output = losses;
  run(Result::Losses, args, 0, n);
  args.output = grad_target;
  if (grad_target) run(Result::TargetGrad, args, 0, n);
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
  const fusedloss::CpuPointwise run = fusedloss::baseline::kernels.pointwise[loss];
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

extern "C" double run_softmax(int loss, int is_double, int64_t rows, int64_t classes, const void* logits,
                              const int64_t* target, const void* probabilities, const double* params, void* statistics,
                              void* losses, void* grad) {
  fusedloss::SoftmaxArgs args = {};
  args.dtype = dtype_of(is_double);
  copy_params(params, args);
  const auto kind = fusedloss::Softmax(loss);
  const fusedloss::CpuKernels& kernels = fusedloss::baseline::kernels;
  args.logits_layout = args.probabilities_layout = args.grad_layout = {rows, classes, rows, 0, 1, classes};
  args.logits = logits;
  args.target = target;
  args.probabilities = probabilities;
  args.ignore_index = -100;
  args.losses = losses;
  args.statistics = statistics;
  args.upstream = one(is_double);
  args.scale = 1;
  const fusedloss::SoftmaxSums sums = kernels.softmax_forward(kind, args, nullptr, 0, rows);
  args.grad = grad;
  kernels.softmax_backward(kind, args, 0, rows);

  std::vector<double> grad_in_forward(rows * classes);
  fusedloss::SoftmaxSums both = sums;
  args.grad = grad_in_forward.data();
  const bool made = kernels.softmax_with_grad(kind, args, 0, rows, nullptr, &both);
  const bool same = is_double ? close<double>(grad, grad_in_forward, rows * classes)
                              : close<float>(grad, grad_in_forward, rows * classes);
  if (both.loss != sums.loss || (made && !same)) return NAN;
  return sums.weight == 0 ? 0 : sums.loss;
}
