// The softmax family in torch: what an op is given and gives.

#include "softmax.h"

#include "../with_functor.h"

#include <ATen/ops/empty.h>

#include <vector>

namespace fusedloss {

const SoftmaxTraits& traits_of(Softmax loss) {
#define FUSEDLOSS_TRAITS(name, Functor)                                                                           \
  {&baseline::Functor<double>::valid, baseline::Functor<double>::mean_by_weight, baseline::Functor<double>::soft, \
   baseline::Functor<double>::reads_row},
  static const SoftmaxTraits traits[] = {FUSEDLOSS_SOFTMAX(FUSEDLOSS_TRAITS)};
#undef FUSEDLOSS_TRAITS
  return traits[size_t(loss)];
}

namespace {

template <class Functor>
int64_t saved_by(const double* params) {
  if constexpr (baseline::has_twin<Functor>) {
    if (Functor::twin_fits(params)) return saved_by<typename Functor::Twin>(params);
  }
  return !Functor::reads_row ? 0 : Functor::sum == baseline::Sum::none ? 2 : 3;
}

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }
int64_t classes_of(const Tensor& logits) { return logits.size(class_dim(logits)); }

std::vector<int64_t> row_sizes_of(const Tensor& logits) {
  std::vector<int64_t> sizes = logits.sizes().vec();
  sizes.erase(sizes.begin() + class_dim(logits));
  return sizes;
}

bool same_or_wider(at::ScalarType type, const Tensor& logits) {
  return type == logits.scalar_type() || type == arithmetic_type(logits.scalar_type());
}

}  // namespace

int64_t saved_statistics(Softmax loss, Params given) {
  double params[kMaxParams];
  copy_params(given, params);
  switch (loss) {
#define FUSEDLOSS_SAVED(name, Functor) \
  case Softmax::name:                  \
    return saved_by<baseline::Functor<double>>(params);
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_SAVED)
#undef FUSEDLOSS_SAVED
  }
  TORCH_CHECK(false, "unknown softmax loss ", int64_t(loss));
}

std::optional<SoftmaxLayout> layout_of(const Tensor& logits) {
  const int64_t dim = logits.dim(), classes = classes_of(logits);
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

const char* declines_softmax(Softmax loss, const Tensor& logits, const SoftmaxCall& call) {
  const Tensor& target = call.target;
  const int64_t dim = logits.dim();
  if (!kernel_dtype(logits.scalar_type())) return "the logits are no float64, float32, bfloat16 or float16";
  if (dim < 1 || logits.numel() == 0) return "the logits are empty or a single number";
  if (call.second && !traits_of(loss).reads_row) return "no second result of a loss of the target's logit alone";
  if (!logits.is_cpu() && classes_of(logits) > kCudaMaxClasses) return "more classes than a kernel counts";
  if (!in_range(call.params, traits_of(loss).valid)) return "a parameter is out of range";
  if (traits_of(loss).soft) {
    if (target.sizes() != logits.sizes()) return "the probabilities are not of the logits' shape";
    if (!same_or_wider(target.scalar_type(), logits)) return "the probabilities are of another dtype";
    if (target.requires_grad()) return "the probabilities require a gradient";
    if (call.ignore_index >= 0) return "an ignore_index beside probabilities";
  } else {
    if (target.scalar_type() != at::kLong && target.scalar_type() != at::kByte)
      return "the target holds no class indices in int64 or uint8";
    if (target.dim() != dim - 1) return "the target does not fit the logits";
    for (int64_t d = 0; d < target.dim(); ++d) {
      if (target.size(d) != logits.size(d == 0 ? 0 : d + 1)) return "the target does not fit the logits";
    }
  }
  if (!call.weight) return nullptr;
  if (call.weight->requires_grad()) return "the weight requires a gradient";
  if (call.weight->scalar_type() != logits.scalar_type() &&
      !(call.wide && same_or_wider(call.weight->scalar_type(), logits)))
    return "the weight is of another dtype than the logits";
  if (call.weight->dim() != 1 || call.weight->size(0) != classes_of(logits))
    return "the weight does not fit the classes";
  return nullptr;
}

namespace {

void check(Softmax loss, const Tensor& logits, const SoftmaxCall& call) {
  const char* name = name_of(loss);
  const Tensor& target = call.target;
  TORCH_CHECK(kernel_dtype(logits.scalar_type()), name, ": expected floating point logits, got ", logits.scalar_type());
  TORCH_CHECK(logits.dim() >= 1 && logits.numel() > 0, name,
              ": expected logits (C), (N, C) or (N, C, d1, ...), not empty, got ", logits.sizes());
  TORCH_CHECK(logits.is_cpu() || classes_of(logits) <= kCudaMaxClasses, name, ": expected at most ", kCudaMaxClasses,
              " classes, got ", classes_of(logits));
  if (traits_of(loss).soft) {
    TORCH_CHECK(same_or_wider(target.scalar_type(), logits), name,
                ": expected probabilities of the logits' dtype or its arithmetic type, got ", target.scalar_type());
    TORCH_CHECK(target.sizes() == logits.sizes(), name, ": expected probabilities of size ", logits.sizes(), ", got ",
                target.sizes());
  } else {
    TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, name,
                ": expected target dtype to be Long or Byte, got ", target.scalar_type());
    const std::vector<int64_t> expected = row_sizes_of(logits);
    TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), name, ": expected target size ", at::IntArrayRef(expected),
                ", got ", target.sizes());
  }
  TORCH_CHECK(in_range(call.params, traits_of(loss).valid), name, ": parameters out of range: ", call.params);
  check_device(name, "a target", target, logits);
  if (!call.weight) return;
  const Tensor& weight = *call.weight;
  check_device(name, "a weight", weight, logits);
  TORCH_CHECK(same_or_wider(weight.scalar_type(), logits), name, ": expected a weight of the logits' dtype ",
              logits.scalar_type(), " or its arithmetic type, got ", weight.scalar_type());
  TORCH_CHECK(weight.dim() == 1 && weight.numel() == classes_of(logits), name, ": expected a weight for each of ",
              classes_of(logits), " classes, got size ", weight.sizes());
}

}  // namespace

SoftmaxInputs::SoftmaxInputs(Softmax loss, const Tensor& logits_, const SoftmaxCall& call)
    : logits(logits_),
      target(call.target),
      ignore_index(call.ignore_index),
      params(call.params),
      wide(call.wide),
      second(call.second) {
  check(loss, logits, call);
  row_sizes = row_sizes_of(logits);
  if (!layout_of(logits)) logits = logits.contiguous();
  if (!traits_of(loss).soft || !layout_of(target)) target = target.contiguous();
  if (call.weight) weight = call.weight->to(arithmetic_type(logits.scalar_type())).contiguous();
}

at::TensorOptions SoftmaxInputs::result_options() const {
  return wide ? logits.options().dtype(arithmetic_type(logits.scalar_type())) : logits.options();
}

void SoftmaxInputs::fill(SoftmaxArgs& args) const {
  args.dtype = *kernel_dtype(logits.scalar_type());
  args.wide = wide;
  args.logits_layout = args.probabilities_layout = layout();
  args.logits = logits.const_data_ptr();
  if (target.is_floating_point()) {
    args.probabilities = target.const_data_ptr();
    args.probabilities_layout = *layout_of(target);
    args.wide_probabilities = target.scalar_type() != logits.scalar_type();
  } else {
    args.target = target.const_data_ptr();
    args.byte_target = target.scalar_type() == at::kByte;
  }
  args.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  args.ignore_index = ignore_index;
  copy_params(params, args.params);
}

SoftmaxResults::SoftmaxResults(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction) {
  const at::TensorOptions options = inputs.result_options();
  const int64_t rows = inputs.layout().rows;
  this->loss = at::empty(reduction == kNone ? at::IntArrayRef(inputs.row_sizes) : at::IntArrayRef(), options);
  second = inputs.second ? at::empty(inputs.row_sizes, options) : at::empty({0}, options);
  statistics = at::empty({saved_statistics(loss, inputs.params) * rows + 1},
                         options.dtype(arithmetic_type(inputs.logits.scalar_type())));
}

void check_with_grad(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction) {
  TORCH_CHECK(traits_of(loss).reads_row, name_of(loss), ": its gradient in forward would save nothing");
  check_gradient_in_forward(name_of(loss), inputs.logits, reduction);
}

void check_backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                    const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction) {
  const char* name = name_of(loss);
  const at::ScalarType arithmetic = arithmetic_type(inputs.logits.scalar_type());
  const at::ScalarType type = upstream.scalar_type();
  TORCH_CHECK(same_or_wider(type, inputs.logits), name, "_backward: expected an upstream gradient of ",
              inputs.logits.scalar_type(), " or ", arithmetic, ", got ", type);
  check_upstream(name, upstream, type, reduction, inputs.row_sizes, inputs.logits);
  if (upstream_second) check_upstream(name, *upstream_second, type, kNone, inputs.row_sizes, inputs.logits);
  check_device(name, "statistics", statistics, inputs.logits);
  const int64_t expected = saved_statistics(loss, inputs.params) * inputs.layout().rows + 1;
  TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == expected && statistics.scalar_type() == arithmetic,
              name, "_backward: expected the statistics of the forward, got ", statistics.sizes(), " of ",
              statistics.scalar_type());
}

SoftmaxFormula& native_formula(Softmax loss) {
  static std::vector<SoftmaxFormula> formulas(std::size(kSoftmaxNames));
  return formulas[size_t(loss)];
}

}  // namespace fusedloss

#define FUSEDLOSS_ARGUMENTS \
  "Tensor target, Tensor? weight, int reduction, int ignore_index, float[] params, bool wide=False"
#define FUSEDLOSS_BACKWARD_ARGUMENTS \
  "Tensor target, Tensor? weight, Tensor statistics, int reduction, int ignore_index, float[] params)"
#define FUSEDLOSS_DEFINE(name, Functor)                                                                               \
  m.def(#name "(Tensor logits, " FUSEDLOSS_ARGUMENTS                                                                  \
              ", bool second=False) -> (Tensor loss, Tensor second, Tensor statistics)");                             \
  m.def(#name "_with_grad(Tensor logits, " FUSEDLOSS_ARGUMENTS ") -> (Tensor loss, Tensor statistics, Tensor grad)"); \
  m.def(#name "_with_grad_(Tensor(a!) logits, " FUSEDLOSS_ARGUMENTS ") -> (Tensor loss, Tensor statistics)");         \
  m.def(#name "_backward(Tensor upstream, Tensor? upstream_second, Tensor logits, " FUSEDLOSS_BACKWARD_ARGUMENTS      \
              " -> Tensor");                                                                                          \
  m.def(#name "_backward_(Tensor upstream, Tensor? upstream_second, Tensor(a!) logits, " FUSEDLOSS_BACKWARD_ARGUMENTS \
              " -> ()");

TORCH_LIBRARY_FRAGMENT(fusedloss, m) { FUSEDLOSS_SOFTMAX(FUSEDLOSS_DEFINE) }
