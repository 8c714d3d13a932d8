// The softmax family in torch: schemas, checks, allocation, autograd.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "common.h"

namespace fusedloss {
namespace {

constexpr int64_t kGrain = 32768;  // logits worth waking a thread for

bool valid(Softmax loss, Params given) {
  double params[kMaxParams];
  copy_params(given, params);
  switch (loss) {
#define FUSEDLOSS_VALID(name, Functor) \
  case Softmax::name:                  \
    return baseline::Functor<double>::valid(params);
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_VALID)
#undef FUSEDLOSS_VALID
  }
  TORCH_CHECK(false, "unknown softmax loss ", int64_t(loss));
}

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// The layout of (C), (N, C) or (N, C, d1, ...), or none where the dimensions after C do not merge into one.
std::optional<SoftmaxLayout> layout_of(const Tensor& logits) {
  const int64_t dim = logits.dim(), classes = logits.size(class_dim(logits));
  SoftmaxLayout layout = {logits.numel() / classes, classes, 1, 0, logits.stride(class_dim(logits)), 0};
  if (dim == 1) return layout;
  const int64_t batch = logits.size(0), batch_stride = logits.stride(0);
  int64_t inner = 1, inner_stride = 0;
  for (int64_t d = dim - 1; d >= 2; --d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    if (size == 1) continue;
    if (inner > 1 && stride != inner * inner_stride) return std::nullopt;
    inner_stride = inner > 1 ? inner_stride : stride;
    inner *= size;
  }
  layout.outer_stride = batch_stride;
  layout.inner = inner;
  layout.inner_stride = inner_stride;
  // The batch goes on where the inner dimension ends: one run of rows.
  if (inner == 1 || batch_stride == inner * inner_stride || batch == 1) {
    layout.inner = layout.rows;
    layout.inner_stride = inner == 1 ? batch_stride : inner_stride;
  }
  return layout;
}

Tensor mergeable(const Tensor& logits) { return layout_of(logits) ? logits : logits.contiguous(); }

void check(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Params params) {
  const char* name = name_of(loss);
  TORCH_CHECK(kernel_dtype(logits.scalar_type()), name, ": expected floating point logits, got ", logits.scalar_type());
  TORCH_CHECK(logits.dim() >= 1 && logits.numel() > 0, name,
              ": expected logits (C), (N, C) or (N, C, d1, ...), not empty, got ", logits.sizes());
  TORCH_CHECK(target.scalar_type() == at::kLong, name, ": expected target dtype to be Long, got ",
              target.scalar_type());
  std::vector<int64_t> expected = logits.sizes().vec();
  expected.erase(expected.begin() + class_dim(logits));
  TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), name, ": expected target size ", at::IntArrayRef(expected),
              ", got ", target.sizes());
  TORCH_CHECK(valid(loss, params), name, ": parameters out of range: ", params);
  if (!weight) return;
  TORCH_CHECK(weight->scalar_type() == logits.scalar_type(), name, ": expected a weight of the logits' dtype ",
              logits.scalar_type(), ", got ", weight->scalar_type());
  TORCH_CHECK(weight->dim() == 1 && weight->numel() == logits.size(class_dim(logits)), name,
              ": expected a weight for each of ", logits.size(class_dim(logits)), " classes, got size ",
              weight->sizes());
}

// The tensors behind the pointers of SoftmaxArgs.
struct Inputs {
  Tensor logits, target, weight;
  SoftmaxArgs args = {};

  Inputs(Softmax loss, const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_,
         int64_t ignore_index, Params params) {
    check(loss, logits_, target_, weight_, params);
    logits = mergeable(logits_);
    target = target_.contiguous();
    args.dtype = *kernel_dtype(logits.scalar_type());
    args.logits_layout = *layout_of(logits);
    args.logits = logits.const_data_ptr();
    args.target = target.const_data_ptr<int64_t>();
    if (weight_) {
      weight = weight_->to(arithmetic_type(logits.scalar_type())).contiguous();
      args.weight = weight.const_data_ptr();
    }
    args.ignore_index = ignore_index;
    copy_params(params, args.params);
  }
};

template <class F>
void over_chunks(const SoftmaxLayout& layout, F f) {
  const int64_t rows = softmax_chunk(layout), chunks = (layout.rows + rows - 1) / rows;
  const int64_t grain = (kGrain + rows * layout.classes - 1) / (rows * layout.classes);
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i * rows, std::min(layout.rows, (i + 1) * rows));
  };
  if (chunks == 1) return run(0, 1);
  parallel_for(chunks, grain, run);
}

// The statistics are one tensor in arithmetic type: max and rest of every row, and last the divisor of a mean.
std::tuple<Tensor, Tensor> forward(Softmax loss, const Tensor& logits, const Tensor& target,
                                   const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                   Params params) {
  Inputs inputs(loss, logits, target, weight, ignore_index, params);
  SoftmaxArgs& args = inputs.args;
  const SoftmaxLayout& layout = args.logits_layout;
  const auto type = arithmetic_type(logits.scalar_type());
  Tensor losses = reduction == kNone ? at::empty(target.sizes(), logits.options()) : at::empty({}, logits.options());
  Tensor statistics = at::empty({2 * layout.rows + 1}, logits.options().dtype(type));
  args.losses = reduction == kNone ? losses.mutable_data_ptr() : nullptr;
  args.statistics = statistics.mutable_data_ptr();

  const CpuKernels& kernels = cpu_kernels();
  SoftmaxSums total = {0, 0, -1};
  const auto add = [&total](const SoftmaxSums& part) {
    total.loss += part.loss;
    total.weight += part.weight;
    if (total.bad_row < 0) total.bad_row = part.bad_row;
  };
  const int64_t rows = softmax_chunk(layout), chunks = (layout.rows + rows - 1) / rows;
  if (chunks == 1) {
    add(kernels.softmax_forward(loss, args, 0, layout.rows));
  } else {
    std::vector<SoftmaxSums> partial(chunks);
    over_chunks(layout, [&](int64_t i, int64_t begin, int64_t end) {
      partial[i] = kernels.softmax_forward(loss, args, begin, end);
    });
    for (const SoftmaxSums& part : partial) add(part);
  }
  TORCH_CHECK_INDEX(total.bad_row < 0, "Target ", args.target[total.bad_row], " is out of bounds.");
  if (reduction != kNone) losses.fill_(reduction == kMean ? total.loss / total.weight : total.loss);
  const double divisor = reduction == kMean ? total.weight : 1.0;
  if (type == at::kDouble) {
    statistics.mutable_data_ptr<double>()[2 * layout.rows] = divisor;
  } else {
    statistics.mutable_data_ptr<float>()[2 * layout.rows] = float(divisor);
  }
  return {losses, statistics};
}

Tensor backward(Softmax loss, const Tensor& upstream, const Tensor& logits, const Tensor& target,
                const OptionalTensor& weight, const Tensor& statistics, int64_t reduction, int64_t ignore_index,
                Params params) {
  Inputs inputs(loss, logits, target, weight, ignore_index, params);
  SoftmaxArgs& args = inputs.args;
  const SoftmaxLayout& layout = args.logits_layout;
  const char* name = name_of(loss);
  TORCH_CHECK(upstream.scalar_type() == logits.scalar_type(), name, "_backward: expected an upstream gradient of ",
              logits.scalar_type(), ", got ", upstream.scalar_type());
  TORCH_CHECK(upstream.sizes() == (reduction == kNone ? target.sizes() : at::IntArrayRef()), name,
              "_backward: the upstream gradient's size ", upstream.sizes(), " does not fit the loss");
  TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == 2 * layout.rows + 1 &&
                  statistics.scalar_type() == arithmetic_type(logits.scalar_type()),
              name, "_backward: expected the statistics of the forward, got ", statistics.sizes(), " of ",
              statistics.scalar_type());
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t y = args.target[row];
    TORCH_CHECK_INDEX(y == ignore_index || uint64_t(y) < uint64_t(layout.classes), "Target ", y, " is out of bounds.");
  }

  Tensor result = empty_gradient(logits);
  const bool in_place = layout_of(result).has_value();
  Tensor grad = in_place ? result : empty_gradient(inputs.logits);
  args.grad = grad.mutable_data_ptr();
  args.grad_layout = *layout_of(grad);
  args.statistics = const_cast<void*>(statistics.const_data_ptr());
  const Upstream read = read_upstream(upstream, inputs.target);
  args.upstream = read.tensor.const_data_ptr();
  args.upstream_stride = read.stride;
  const double divisor = statistics.scalar_type() == at::kDouble ? statistics.const_data_ptr<double>()[2 * layout.rows]
                                                                 : statistics.const_data_ptr<float>()[2 * layout.rows];
  args.scale = 1.0 / divisor;
  over_chunks(layout,
              [&](int64_t, int64_t begin, int64_t end) { cpu_kernels().softmax_backward(loss, args, begin, end); });
  return in_place ? result : result.copy_(grad);
}

using ForwardOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                             Params);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t,
                          int64_t, Params);

const Ops<ForwardOp, BackwardOp>& ops_of(Softmax loss) {
  static const std::vector<Ops<ForwardOp, BackwardOp>> ops(std::begin(kSoftmaxNames), std::end(kSoftmaxNames));
  return ops[size_t(loss)];
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  static variable_list forward(AutogradContext* ctx, int64_t loss, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, Params params) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [value, statistics] =
        ops_of(Softmax(loss)).forward.call(logits, target, weight, reduction, ignore_index, params);
    ctx->mark_non_differentiable({statistics});
    ctx->set_materialize_grads(false);  // no zeros, 8 bytes a row, for a gradient of the statistics
    ctx->save_for_backward({logits, target, weight.value_or(Tensor()), statistics});
    ctx->saved_data["loss"] = loss;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["params"] = params.vec();
    return {value, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &target = saved[1], &statistics = saved[3];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const auto loss = Softmax(ctx->saved_data["loss"].toInt());
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const std::vector<double> params = ctx->saved_data["params"].toDoubleVector();
    variable_list gradients(7);  // one for each argument of forward
    if (!upstream[0].defined()) return gradients;
    if (at::GradMode::is_enabled()) {
      // A gradient that carries a graph of its own: native autograd through the native formula.
      const SoftmaxFormula& formula = native_formula(loss);
      TORCH_CHECK(formula, name_of(loss), ": no native formula to differentiate twice");
      const Tensor x = logits.view_as(logits);
      const Tensor value = formula(x, target, weight, reduction, ignore_index, params);
      gradients[1] = torch::autograd::grad({value}, {x}, {upstream[0]}, true, true)[0];
    } else {
      gradients[1] =
          ops_of(loss).backward.call(upstream[0], logits, target, weight, statistics, reduction, ignore_index, params);
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor> loss_and_statistics(Softmax loss, const Tensor& logits, const Tensor& target,
                                               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                               Params params) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    variable_list outputs =
        SoftmaxFunction::apply(int64_t(loss), logits, target, weight, reduction, ignore_index, params);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops_of(loss).forward.call(logits, target, weight, reduction, ignore_index, params);
}

}  // namespace

bool owns_softmax(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                  Params params) {
  const int64_t dim = logits.dim();
  if (dim < 1 || target.dim() != dim - 1 || target.scalar_type() != at::kLong || logits.numel() == 0) return false;
  if (!kernel_dtype(logits.scalar_type()) || !valid(loss, params)) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.size(d) != logits.size(d == 0 ? 0 : d + 1)) return false;
  }
  return !weight || (weight->scalar_type() == logits.scalar_type() && !weight->requires_grad() && weight->dim() == 1 &&
                     weight->size(0) == logits.size(class_dim(logits)));
}

Tensor softmax_loss(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    int64_t reduction, int64_t ignore_index, Params params) {
  return std::get<0>(loss_and_statistics(loss, logits, target, weight, reduction, ignore_index, params));
}

namespace {

template <Softmax kLoss>
std::tuple<Tensor, Tensor> cpu_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                       int64_t reduction, int64_t ignore_index, Params params) {
  return forward(kLoss, logits, target, weight, reduction, ignore_index, params);
}

template <Softmax kLoss>
Tensor cpu_backward(const Tensor& upstream, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    const Tensor& statistics, int64_t reduction, int64_t ignore_index, Params params) {
  return backward(kLoss, upstream, logits, target, weight, statistics, reduction, ignore_index, params);
}

template <Softmax kLoss>
std::tuple<Tensor, Tensor> autograd_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                            int64_t reduction, int64_t ignore_index, Params params) {
  return loss_and_statistics(kLoss, logits, target, weight, reduction, ignore_index, params);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_DEFINE(name, Functor)                                                                    \
  m.def(#name                                                                                              \
        "(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float[] params) " \
        "-> (Tensor loss, Tensor statistics)");                                                            \
  m.def(#name                                                                                              \
        "_backward(Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, "     \
        "int reduction, int ignore_index, float[] params) -> Tensor");
#define FUSEDLOSS_CPU(name, Functor)                                \
  m.impl(#name, &fusedloss::cpu_forward<fusedloss::Softmax::name>); \
  m.impl(#name "_backward", &fusedloss::cpu_backward<fusedloss::Softmax::name>);
#define FUSEDLOSS_AUTOGRAD(name, Functor) m.impl(#name, &fusedloss::autograd_forward<fusedloss::Softmax::name>);

TORCH_LIBRARY_FRAGMENT(fusedloss, m){FUSEDLOSS_SOFTMAX(FUSEDLOSS_DEFINE)} TORCH_LIBRARY_IMPL(fusedloss, CPU, m){
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_CPU)} TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  FUSEDLOSS_SOFTMAX(FUSEDLOSS_AUTOGRAD)
}
