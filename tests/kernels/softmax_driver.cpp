// The softmax kernels of one instruction set without torch, as pointwise_driver.cpp.
#include "cpu/isa/baseline_backward.cpp"
#include "cpu/isa/baseline_forward.cpp"
#include "cpu/isa/baseline_with_grad.cpp"
#include "kernel_driver.h"

extern "C" double run_softmax(int loss, int is_double, int64_t rows, int64_t classes, const void* logits,
                              const int64_t* target, const void* probabilities, const double* params, void* statistics,
                              void* losses, void* grad, const void* sample_weight) {
  fusedloss::SoftmaxArgs args = {};
  args.dtype = dtype_of(is_double);
  copy_params(params, args);
  const auto kind = fusedloss::Softmax(loss);
  args.logits_layout = args.probabilities_layout = args.grad_layout = {rows, classes, rows, 0, 1, classes};
  args.logits = logits;
  args.target = target;
  args.probabilities = probabilities;
  args.sample_weight = sample_weight;
  args.ignore_index = -100;
  args.losses = losses;
  args.statistics = statistics;
  args.upstream = one(is_double);
  args.scale = 1;
  const fusedloss::SoftmaxSums sums = fusedloss::baseline::softmax_forward(kind, args, nullptr, 0, rows);
  args.grad = grad;
  fusedloss::baseline::softmax_backward(kind, args, 0, rows);

  std::vector<double> grad_in_forward(rows * classes);
  fusedloss::SoftmaxSums both = sums;
  args.grad = grad_in_forward.data();
  const bool made = fusedloss::baseline::softmax_with_grad(kind, args, 0, rows, nullptr, &both);
  const bool same = is_double ? close<double>(grad, grad_in_forward, rows * classes)
                              : close<float>(grad, grad_in_forward, rows * classes);
  if (both.loss != sums.loss || (made && !same)) return NAN;
  return sums.weight == 0 ? 0 : sums.loss;
}
