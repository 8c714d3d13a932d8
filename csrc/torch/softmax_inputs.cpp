// The softmax family in torch: its losses, what the kernels own of their calls, and what an op is given and gives.

#include "softmax.h"

#include <mutex>
#include <vector>

#include "registry.h"

namespace fusedloss {

namespace {

Registry<SoftmaxLoss>& softmax_losses() {
  static Registry<SoftmaxLoss>& all = *[] {
    auto* listed = new Registry<SoftmaxLoss>;
#define FUSEDLOSS_ADD(name, Functor)                                                      \
  listed->add("fusedloss::" #name, baseline::softmax_traits<baseline::Functor<double>>(), \
              &baseline::saved_by<baseline::Functor<double>>);
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_ADD)
#undef FUSEDLOSS_ADD
    return listed;
  }();
  return all;
}

at::DimVector row_sizes_of(const Tensor& logits) {
  at::DimVector sizes(logits.sizes());
  sizes.erase(sizes.begin() + class_dim(logits));
  return sizes;
}

bool same_or_wider(at::ScalarType type, const Tensor& logits) {
  return type == logits.scalar_type() || type == arithmetic_type(logits.scalar_type());
}

const char* declines_sample_weight(const Tensor& logits, const Tensor& sample_weight) {
  if (sample_weight.device() != logits.device()) return "tensors on different devices";
  if (sample_weight.requires_grad()) return "the sample_weight requires a gradient";
  if (!kernel_dtype(sample_weight.scalar_type()))
    return "the sample_weight is no float64, float32, bfloat16 or float16";
  if (!are_rows_of(sample_weight.sizes(), logits)) return "the sample_weight does not fit the rows";
  return nullptr;
}

}  // namespace

SoftmaxLoss& softmax_loss(int64_t number) { return softmax_losses()[number]; }

SoftmaxLoss& add_softmax(const std::string& name, const CustomSoftmax& custom) {
  TORCH_CHECK(custom.version == kCustomSoftmaxVersion, name, ": expected a loss compiled for version ",
              kCustomSoftmaxVersion, " of these kernels, got ", custom.version);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  SoftmaxLoss& loss = softmax_losses().add("fusedloss::" + name, custom.traits, custom.saved_by, &custom);
  const auto implemented_under = [](c10::DispatchKey key) -> torch::Library& {
    return library_of(torch::Library::IMPL, key);
  };
  define_softmax(library_of(torch::Library::FRAGMENT, c10::DispatchKey::Undefined), loss);
  torch::Library& autograd = implemented_under(c10::DispatchKey::Autograd);
  implement_softmax_under_autograd(autograd, loss);
  for (const std::string& in_place : softmax_ops_in_place(loss)) {
    refuse_derivatives_in_place(autograd, in_place);
    count_changes(implemented_under(c10::DispatchKey::ADInplaceOrView), in_place);
    refuse_negated_views(implemented_under(c10::DispatchKey::Negative), in_place);
  }
  for (const Device& device : devices()) {
    if (device.runs(loss.for_cuda)) device.implement_softmax(implemented_under(device.key), loss);
  }
  return loss;
}

std::array<std::string, 2> softmax_ops_in_place(const SoftmaxLoss& loss) {
  const std::string name = base_name(loss.op);
  return {name + "_with_grad_", name + "_backward_"};
}

int64_t SoftmaxLoss::saved_statistics(Params given) const {
  double params[kMaxParams];
  copy_params(given, params);
  return saved_by(params);
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

const char* declines(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call, bool takes_no_rows) {
  const SoftmaxTraits& traits = loss.traits;
  const Tensor& target = call.target;
  if (target.device() != logits.device()) return "tensors on different devices";
  if (!kernel_dtype(logits.scalar_type())) return "the logits are no float64, float32, bfloat16 or float16";
  if (logits.dim() < 1 || (takes_no_rows ? classes_of(logits) : logits.numel()) == 0)
    return "the logits are empty or a single number";
  const Device& device = device_for(logits);
  if (!device.runs(loss.for_cuda)) return kForCpuAlone;
  if (!device.has_kernels_of(loss.for_cuda, logits.device().index())) return kForOtherGpus;
  if (call.second && !traits.reads_row) return "no second result of a loss of the target's logit alone";
  if (classes_of(logits) > device.most_classes) return "more classes than a kernel counts";
  if (!in_range(call.params, traits.params, traits.param_count)) return "a parameter is out of range";
  if (traits.soft) {
    if (target.sizes() != logits.sizes()) return "the probabilities are not of the logits' shape";
    if (!same_or_wider(target.scalar_type(), logits)) return "the probabilities are of another dtype";
    if (target.requires_grad()) return "the probabilities require a gradient";
    if (call.ignore_index >= 0) return "an ignore_index beside probabilities";
  } else {
    if (target.scalar_type() != at::kLong && target.scalar_type() != at::kByte)
      return "the target holds no class indices in int64 or uint8";
    if (!are_rows_of(target.sizes(), logits)) return "the target does not fit the logits";
  }
  if (call.sample_weight) {
    if (const char* why = declines_sample_weight(logits, *call.sample_weight)) return why;
  }
  if (!call.weight) return nullptr;
  const Tensor& weight = *call.weight;
  if (weight.device() != logits.device()) return "tensors on different devices";
  if (weight.requires_grad()) return "the weight requires a gradient";
  if (weight.scalar_type() != logits.scalar_type() && !(call.wide && same_or_wider(weight.scalar_type(), logits)))
    return "the weight is of another dtype than the logits";
  if (weight.dim() != 1 || weight.size(0) != classes_of(logits)) return "the weight does not fit the classes";
  return nullptr;
}

SoftmaxInputs::SoftmaxInputs(const SoftmaxLoss& loss, const Tensor& logits_, const SoftmaxCall& call)
    : logits(logits_),
      target(call.target),
      ignore_index(call.ignore_index),
      params(call.params),
      wide(call.wide),
      second(call.second) {
  TORCH_CHECK_VALUE(call.reduction >= kNone && call.reduction <= kMeanOrZero, loss.op,
                    ": expected a reduction from 0 to 3 (none, mean, sum, mean or zero), got ", call.reduction);
  if (const char* why = declines(loss, logits, call, /*takes_no_rows=*/true))
    raise_declined(loss.op, why, logits, target, call.weight, params);
  check_memory(logits);
  row_sizes = row_sizes_of(logits);
  if (const auto found = layout_of(logits)) {
    layout = *found;
  } else {
    logits = logits.contiguous();
    layout = *layout_of(logits);
  }
  if (!loss.traits.soft || !layout_of(target)) target = target.contiguous();
  const at::ScalarType arithmetic = arithmetic_type(logits.scalar_type());
  if (call.weight) weight = call.weight->to(arithmetic).contiguous();
  if (call.sample_weight) sample_weight = call.sample_weight->to(arithmetic).contiguous();
}

void SoftmaxInputs::keep_apart_from(const Tensor& overwritten) {
  check_overwritten(overwritten, {&target, &weight, &sample_weight});
  target = apart_from(overwritten, target);
  weight = apart_from(overwritten, weight);
  sample_weight = apart_from(overwritten, sample_weight);
}

at::ScalarType SoftmaxInputs::result_dtype() const {
  return wide ? arithmetic_type(logits.scalar_type()) : logits.scalar_type();
}

void SoftmaxInputs::fill(SoftmaxArgs& args) const {
  args.dtype = *kernel_dtype(logits.scalar_type());
  args.wide = wide;
  args.logits_layout = args.probabilities_layout = layout;
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
  args.sample_weight = sample_weight.defined() ? sample_weight.const_data_ptr() : nullptr;
  args.ignore_index = ignore_index;
  copy_params(params, args.params);
}

SoftmaxResults::SoftmaxResults(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction) {
  const Tensor& logits = inputs.logits;
  const at::ScalarType dtype = inputs.result_dtype();
  const int64_t numbers = loss.saved_statistics(inputs.params) * inputs.layout.rows + 1;
  this->loss = empty_beside(logits, reduction == kNone ? inputs.row_sizes : at::IntArrayRef(), dtype);
  if (inputs.second) second = empty_beside(logits, inputs.row_sizes, dtype);
  statistics = empty_beside(logits, {numbers}, arithmetic_type(logits.scalar_type()));
}

void SoftmaxResults::set_of_no_rows(int64_t reduction) {
  set_of_nothing(loss, reduction);
  statistics.zero_();
}

void check_with_grad(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction) {
  TORCH_CHECK(loss.traits.reads_row, loss.op, ": its gradient in forward would save nothing");
  check_gradient_in_forward(loss.name(), inputs.logits, reduction);
}

void check_backward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                    const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction) {
  const char* name = loss.name();
  const at::ScalarType arithmetic = arithmetic_type(inputs.logits.scalar_type());
  const at::ScalarType type = upstream.scalar_type();
  TORCH_CHECK(same_or_wider(type, inputs.logits), name, "_backward: expected an upstream gradient of ",
              inputs.logits.scalar_type(), " or ", arithmetic, ", got ", type);
  check_upstream(name, upstream, type, reduction, inputs.row_sizes, inputs.logits);
  if (upstream_second) check_upstream(name, *upstream_second, type, kNone, inputs.row_sizes, inputs.logits);
  check_device(name, "statistics", statistics, inputs.logits);
  const int64_t expected = loss.saved_statistics(inputs.params) * inputs.layout.rows + 1;
  TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == expected && statistics.scalar_type() == arithmetic,
              name, "_backward: expected the statistics of the forward, got ", statistics.sizes(), " of ",
              statistics.scalar_type());
}

}  // namespace fusedloss
