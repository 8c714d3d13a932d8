// The pointwise family in torch: its losses, what the kernels own of their calls, and how they read the operands.

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "../kernels/functors.h"
#include "pointwise.h"
#include "registry.h"

namespace fusedloss {
namespace {

#ifdef FUSEDLOSS_CUDA
template <Pointwise kLoss>
constexpr CudaPointwise on_cuda = [](PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  return args.index ? cuda_indexed(kLoss, result, args, stream) : cuda_pointwise(kLoss, result, args, stream);
};
#else
template <Pointwise kLoss>
constexpr CudaPointwise on_cuda = nullptr;
#endif

Registry<PointwiseLoss>& pointwise_losses() {
  static Registry<PointwiseLoss>& all = *[] {
    auto* listed = new Registry<PointwiseLoss>;
#define FUSEDLOSS_ADD(name, Functor)                                                                 \
  listed->add("fusedloss::" #name, baseline::pointwise_traits<baseline::Functor<double>>(), nullptr, \
              on_cuda<Pointwise::name>, nullptr);
    FUSEDLOSS_POINTWISE(FUSEDLOSS_ADD)
#undef FUSEDLOSS_ADD
    return listed;
  }();
  return all;
}

}  // namespace

PointwiseLoss& pointwise_loss(int64_t number) { return pointwise_losses()[number]; }

PointwiseLoss& add_pointwise(const std::string& name, const CustomPointwise& custom) {
  TORCH_CHECK(custom.version == kCustomVersion, name, ": expected a loss compiled for version ", kCustomVersion,
              " of these kernels, got ", custom.version);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  PointwiseLoss& loss =
      pointwise_losses().add("fusedloss::" + name, custom.traits, custom.cpu, custom.cuda, custom.cuda_has_kernels);
  define_pointwise(library_of(torch::Library::FRAGMENT, c10::DispatchKey::Undefined), loss);
  implement_pointwise_under_autograd(library_of(torch::Library::IMPL, c10::DispatchKey::Autograd), loss);
  for (const Device& device : devices()) {
    if (device.runs(loss.for_cuda)) device.implement_pointwise(library_of(torch::Library::IMPL, device.key), loss);
  }
  return loss;
}

// ---- what the kernels own

namespace {

constexpr const char* kDifferentDtypes = "inputs of different dtypes";
constexpr const char* kTooMany = "more elements than torch counts";

bool are_counted(at::IntArrayRef sizes) {
  uint64_t count;
  return !c10::safe_multiplies_u64(sizes, &count) && count <= INT64_MAX;
}

// The dtype of torch's result is that of the input, or float32 beside a half-precision one.
const char* declines_dtypes(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                            const PointwiseCall& call, at::IntArrayRef sizes, bool autocast, bool& wide) {
  const at::ScalarType type = input.scalar_type(), of_target = target.scalar_type();
  const at::ScalarType of_weight = call.weight ? call.weight->scalar_type() : type;
  const at::ScalarType of_third = loss.traits.has_third_slope && call.third ? call.third->scalar_type() : type;
  const ResultDType rule = loss.traits.result;
  // A weight without dimensions gives way to losses that have some.
  const bool gives_way = call.weight && rule == ResultDType::Promoted && call.weight->dim() == 0 && !sizes.empty();
  at::ScalarType result = type;
  if (autocast && is_half(type)) {
    if (of_target == at::kDouble || of_third == at::kDouble ||
        (of_weight == at::kDouble && rule != ResultDType::OfTarget && !gives_way))
      return kDifferentDtypes;
    if (loss.traits.of_probabilities && device_for(input).autocast_refuses_probabilities)
      return "probabilities under autocast, which torch refuses";
    result = at::kFloat;
  } else if (rule == ResultDType::Promoted) {
    // torch broadcasts a difference of two first; elsewhere an operand without dimensions gives way to one that has
    // some.
    const bool broadcasts_first = loss.traits.of_difference && !loss.traits.has_third_slope;
    if (!broadcasts_first && type != of_target && target.is_floating_point() &&
        (input.dim() == 0) != (target.dim() == 0))
      return kDifferentDtypes;
    if (of_third != type && (call.third->dim() == 0) != (input.dim() == 0 && target.dim() == 0))
      return kDifferentDtypes;
    result = c10::promoteTypes(c10::promoteTypes(type, of_target), of_third);
    if (call.weight && !gives_way) result = c10::promoteTypes(result, of_weight);
  } else if (rule == ResultDType::OfTarget) {
    result = of_target;
  } else if (rule == ResultDType::Same) {
    if (of_target != type || of_weight != type) return kDifferentDtypes;
  }
  wide = is_half(type) && result == at::kFloat;
  return result == type || wide ? nullptr : kDifferentDtypes;
}

const char* declines_class_indices(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                                   const PointwiseCall& call, bool autocast) {
  if (!loss.traits.takes_class_indices) return "class indices, which the loss does not take";
  if (target.scalar_type() != at::kLong) return "class indices that are not int64";
  if (input.dim() < 2 || !are_rows_of(target.sizes(), input)) return "class indices that do not fit the input";
  if (classes_of(input) > device_for(input).most_classes) return "more classes than a kernel counts";
  if (!device_for(input).runs_class_indices(call.third.has_value())) return "class indices beside a pos_weight";
  if (autocast) return "autocast";
  for (const OptionalTensor* factor : {&call.weight, &call.third}) {
    if (*factor && (*factor)->scalar_type() != input.scalar_type()) return "a weight of another dtype than the input";
  }
  return nullptr;
}

const char* declines_factor(const Tensor& factor, const Tensor& input, at::IntArrayRef sizes, bool has_gradient) {
  if (factor.device() != input.device()) return "tensors on different devices";
  if (factor.requires_grad() && !has_gradient) return "a weight that requires a gradient";
  if (!kernel_dtype(factor.scalar_type())) return "a weight that is no float64, float32, bfloat16 or float16";
  if (!at::is_expandable_to(factor.sizes(), sizes)) return "a weight that does not fit the input";
  return nullptr;
}

}  // namespace

const char* declines(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call,
                     bool autocast, bool& wide, bool takes_empty) {
  const PointwiseTraits& traits = loss.traits;
  const bool takes_integers = call.ignore_index || traits.takes_integers;
  if (target.device() != input.device()) return "tensors on different devices";
  if (!kernel_dtype(input.scalar_type()) ||
      !(kernel_dtype(target.scalar_type()) || (takes_integers && at::isIntegralType(target.scalar_type(), false))))
    return "an input or target that is no float64, float32, bfloat16 or float16";
  if (!takes_empty && (input.numel() == 0 || target.numel() == 0)) return "an empty input";
  const Device& device = device_for(input);
  if (!device.runs(loss.for_cuda)) return kForCpuAlone;
  if (!device.has_kernels_of(loss.for_cuda, input.device().index())) return kForOtherGpus;
  if (!in_range(call.params, traits.params, traits.param_count)) return "a parameter that is out of range";
  if (call.third && !traits.has_positive_weight && !traits.has_third_slope)
    return "a third operand, which the loss does not take";
  at::IntArrayRef sizes = input.sizes();
  at::DimVector broadcast;
  if (call.ignore_index) {
    if (const char* why = declines_class_indices(loss, input, target, call, autocast)) return why;
  } else {
    if (target.requires_grad() && !traits.of_difference && !traits.has_target_slope)
      return "a target that requires a gradient";
    if (sizes != target.sizes()) {
      if (!traits.broadcasts || !at::are_expandable(sizes, target.sizes()))
        return "an input and a target whose shapes do not fit";
      broadcast = at::infer_size_dimvector(sizes, target.sizes());
      sizes = broadcast;
      if (!are_counted(sizes)) return kTooMany;
    }
  }
  if (traits.has_third_slope && call.third && call.third->sizes() != sizes) {
    if (!at::are_expandable(sizes, call.third->sizes())) return "a third operand whose shape does not fit";
    broadcast = at::infer_size_dimvector(sizes, call.third->sizes());
    sizes = broadcast;
    if (!are_counted(sizes)) return kTooMany;
    if (!takes_empty && call.third->numel() == 0) return "an empty input";
  }
  for (const OptionalTensor* factor : {&call.weight, &call.third}) {
    if (!*factor) continue;
    const bool has_gradient = factor == &call.third && traits.has_third_slope;
    if (const char* why = declines_factor(**factor, input, sizes, has_gradient)) return why;
  }
  if (traits.of_variances && autocast && is_half(input.scalar_type()) && !takes_empty)
    return "autocast, which widens some of torch's steps, on some devices";
  wide = false;
  return call.ignore_index ? nullptr : declines_dtypes(loss, input, target, call, sizes, autocast, wide);
}

// ---- the arguments of an op

namespace {

bool same_dense_order(const Tensor& a, const Tensor& b) {
  return a.is_contiguous() ? b.is_contiguous() : a.strides() == b.strides() && a.is_non_overlapping_and_dense();
}

// The dimensions of a dense tensor from the widest stride to the closest. Those of one element may stand anywhere: a
// single class stands first, so that all rows lie side by side.
std::vector<int64_t> memory_order(const Tensor& dense) {
  std::vector<int64_t> order(size_t(dense.dim()));
  for (int64_t d = 0; d < dense.dim(); ++d) order[size_t(d)] = d;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return dense.stride(a) > dense.stride(b); });
  if (dense.size(1) == 1) {
    const auto single = std::find(order.begin(), order.end(), 1);
    std::rotate(order.begin(), single, single + 1);
  }
  return order;
}

// The stride at which dimensions [first, last) are one, or none where they are not.
std::optional<int64_t> merged_stride(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t count = 1, stride = 0;
  for (int64_t d = last - 1; d >= first; --d) {
    if (tensor.size(d) == 1) continue;
    if (count > 1 && tensor.stride(d) != stride * count) return std::nullopt;
    if (count == 1) stride = tensor.stride(d);
    count *= tensor.size(d);
  }
  return stride;
}

}  // namespace

PointwiseInputs::PointwiseInputs(const PointwiseLoss& loss, const Tensor& input_, const Tensor& target_,
                                 const PointwiseCall& call)
    : input(input_), target(target_), ignore_index(call.ignore_index), params(call.params) {
  TORCH_CHECK_VALUE(call.reduction >= kNone && call.reduction <= kSum, loss.op,
                    ": expected a reduction from 0 to 2 (none, mean, sum), got ", call.reduction);
  bool wide;
  if (const char* why = declines(loss, input, target, call, /*autocast=*/call.wide, wide, /*takes_empty=*/true))
    raise_declined(loss.op, why, input, target, call.weight, params);
  check_memory(input);
  TORCH_CHECK(call.wide == wide, loss.op, ": expected wide=", wide ? "True" : "False", " for ", input.scalar_type(),
              " beside ", target.scalar_type(), ", got wide=", call.wide ? "True" : "False");
  if (ignore_index) {
    // Dense, in the order that empty_like gives the gradient.
    if (!input.is_non_overlapping_and_dense()) input = input.clone();
    std::vector<int64_t> row_order;
    for (const int64_t d : memory_order(input)) {
      if (d != 1) row_order.push_back(d == 0 ? 0 : d - 1);
    }
    target = target.permute(row_order).contiguous();
  } else {
    TORCH_CHECK(at::is_expandable_to(target.sizes(), input.sizes()), loss.op, ": expected target of the input's size ",
                input.sizes(), ", got ", target.sizes());
    target = target.expand(input.sizes());
    TORCH_CHECK(kernel_dtype(target.scalar_type()), loss.op, ": expected a floating point target, got ",
                target.scalar_type());
  }
  if (call.weight) weight = call.weight->expand(input.sizes());
  if (call.third) third = call.third->expand(input.sizes());
}

Tensor PointwiseInputs::empty_losses(const PointwiseLoss& loss, bool wide) const {
  const at::ScalarType dtype = result_dtype(wide);
  if (ignore_index) return empty_in_order_of(input, dtype);
  const bool by_target = loss.traits.result == ResultDType::OfTarget;  // alone
  Tensor first = input, second = target;
  if (loss.traits.target_first) std::swap(first, second);
  const bool of_three = loss.traits.has_third_slope && third;
  const bool alike = same_dense_order(first, second) && (!of_three || same_dense_order(first, *third));
  if (loss.traits.result == ResultDType::Same || alike) return empty_in_order_of(first, dtype);
  if (input.is_cpu() && first.scalar_type() != second.scalar_type()) {
    // There torch converts what is not of the result's dtype, and expanded elements become elements of their own.
    for (Tensor* tensor : {&first, &second}) {
      if (!tensor->is_non_overlapping_and_dense() && tensor->scalar_type() != dtype)
        *tensor = empty_in_order_of(*tensor, tensor->scalar_type());
    }
  }
  at::TensorIteratorConfig config;
  config.check_all_same_dtype(false).check_all_same_device(false).declare_static_dtype_and_device(dtype, c10::kMeta);
  config.add_owned_output(Tensor());
  if (of_three) config.add_const_input(*third);
  config.add_const_input(first);
  if (!by_target) config.add_const_input(second);
  const Tensor of_torch = config.build().output(0);  // its strides alone
  return empty_beside(input, of_torch.sizes(), dtype, of_torch.strides());
}

Tensor PointwiseInputs::empty_gradient_of(Of of, const Tensor& given_input, bool unrounded) const {
  const Tensor& like = of == Of::Target ? target : of == Of::Third ? *third : given_input;
  return unrounded ? empty_in_order_of(like, arithmetic_type(like.scalar_type())) : empty_gradient(like, input);
}

// An operand of the kernels and the tensor that it reads, all in one order of elements.
struct PointwiseInputs::Reading {
  Operand* operand;
  Tensor tensor;
};

namespace {

template <class Readings>
void fill_dense(PointwiseArgs& args, const Readings& readings, int64_t count) {
  args.dims = 1;
  args.sizes[0] = count;
  for (const auto& reading : readings) {
    reading.operand->dense = true;
    reading.operand->strides[0] = 1;
  }
}

void set_dense(Operand& operand, const PointwiseArgs& args) {
  int64_t expected = 1;
  operand.dense = true;
  for (int d = 0; d < args.dims; ++d) {
    operand.dense = operand.dense && (operand.strides[d] == expected || args.sizes[d] == 1);
    expected *= args.sizes[d];
  }
}

// torch's iterator finds the order of the output, or else of the first input, and merges dimensions. False where more
// are left than a kernel counts.
template <class Readings>
bool fill_strided(PointwiseArgs& args, const Readings& readings, const Tensor* output) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false);
  if (output) config.add_output(*output);
  for (const auto& reading : readings) config.add_const_input(reading.tensor);
  const at::TensorIterator iterator = config.build();
  if (iterator.ndim() > kMaxDims) return false;
  args.dims = std::max(iterator.ndim(), 1);
  args.sizes[0] = 1;
  for (int d = 0; d < iterator.ndim(); ++d) args.sizes[d] = iterator.shape()[d];
  for (size_t i = 0; i < readings.size(); ++i) {
    const at::IntArrayRef bytes = iterator.strides(int64_t(i) + (output ? 1 : 0));
    for (int d = 0; d < iterator.ndim(); ++d) {
      readings[i].operand->strides[d] = bytes[d] / readings[i].tensor.element_size();
    }
    set_dense(*readings[i].operand, args);
  }
  return true;
}

}  // namespace

// The output's order, or else the input's.
void PointwiseInputs::fill_elements(PointwiseArgs& args, Readings& readings, const Tensor* output) {
  const Tensor& order = output ? *output : input;
  const bool all_dense = std::all_of(readings.begin(), readings.end(),
                                     [&](const Reading& reading) { return same_dense_order(order, reading.tensor); });
  if (all_dense) return fill_dense(args, readings, input.numel());
  if (fill_strided(args, readings, output)) return;
  for (Reading& reading : readings) {
    reading.tensor = empty_in_order_of(order, reading.tensor.scalar_type()).copy_(reading.tensor);
    copies.push_back(reading.tensor);
  }
  fill_dense(args, readings, input.numel());
}

// Over class indices: (inner, classes, outer), in the order in which memory has the logits.
void PointwiseInputs::fill_rows(PointwiseArgs& args, Readings& readings) {
  const std::vector<int64_t> order = memory_order(input);
  const int64_t dims = input.dim(), of_classes = std::find(order.begin(), order.end(), 1) - order.begin();
  args.dims = 3;
  args.sizes[0] = args.sizes[2] = 1;
  args.sizes[1] = input.size(1);
  for (int64_t d = 0; d < dims; ++d) {
    if (d != of_classes) args.sizes[d < of_classes ? 2 : 0] *= input.size(order[size_t(d)]);
  }
  for (Reading& reading : readings) {
    Tensor ordered = reading.tensor.permute(order);
    if (!merged_stride(ordered, 0, of_classes) || !merged_stride(ordered, of_classes + 1, dims)) {
      ordered = ordered.contiguous();
      copies.push_back(ordered);
      reading.tensor = ordered;
    }
    int64_t(&strides)[kMaxDims] = reading.operand->strides;
    strides[0] = *merged_stride(ordered, of_classes + 1, dims);
    strides[1] = ordered.stride(of_classes);
    strides[2] = *merged_stride(ordered, 0, of_classes);
    set_dense(*reading.operand, args);
  }
  args.index = target.const_data_ptr<int64_t>();
  args.ignore_index = *ignore_index;
}

void PointwiseInputs::fill(PointwiseArgs& args, const Tensor* output, const Tensor* upstream) {
  Readings readings = {{&args.input, input}};
  if (!ignore_index) readings.push_back({&args.target, target});
  if (weight) readings.push_back({&args.weight, *weight});
  if (third) readings.push_back({&args.third, *third});
  if (upstream) {
    args.one_upstream = is_one_value(*upstream);
    args.upstream.data = upstream->const_data_ptr();
    args.upstream.dtype = *kernel_dtype(upstream->scalar_type());
    if (!args.one_upstream) readings.push_back({&args.upstream, *upstream});
  }
  ignore_index ? fill_rows(args, readings) : fill_elements(args, readings, output);
  bool any_double = false;
  for (const Reading& reading : readings) {
    reading.operand->data = reading.tensor.const_data_ptr();
    reading.operand->dtype = *kernel_dtype(reading.tensor.scalar_type());
    any_double = any_double || reading.operand->dtype == DType::Double;
  }
  args.arithmetic = any_double ? DType::Double : DType::Float;
  copy_params(params, args.params);
  if (!output) return;
  args.output = output->mutable_data_ptr();
  args.output_dtype = *kernel_dtype(output->scalar_type());
}

}  // namespace fusedloss
