// The losses of row sums in torch: what the kernels own of their calls, and how they read the operands.

#include <cmath>

#include "../kernels/row_sums_functors.h"
#include "row_sums.h"

namespace fusedloss {

namespace {

template <class Functor>
RowSumsLoss described(const char* op, RowSums loss) {
  return {op, int64_t(loss), baseline::row_sums_traits<Functor>(), {}, {nullptr}};
}

}  // namespace

RowSumsLoss& row_sums_loss(int64_t number) {
#define FUSEDLOSS_LOSS(name, Functor) described<baseline::Functor<double>>("fusedloss::" #name, RowSums::name),
  static auto& losses = *new std::array<RowSumsLoss, kRowSumsLosses>{{FUSEDLOSS_ROW_SUMS(FUSEDLOSS_LOSS)}};
#undef FUSEDLOSS_LOSS
  return losses[size_t(number)];
}

namespace {

std::optional<LabelType> label_type(at::ScalarType type) {
  switch (type) {
    case at::kLong:
      return LabelType::Long;
    case at::kInt:
      return LabelType::Int;
    case at::kShort:
      return LabelType::Short;
    case at::kChar:
      return LabelType::Char;
    case at::kFloat:
      return LabelType::Float;
    case at::kDouble:
      return LabelType::Double;
    case at::kBFloat16:
      return LabelType::BFloat16;
    case at::kHalf:
      return LabelType::Half;
    default:
      return std::nullopt;
  }
}

// The stride between rows, or none where the columns of a row lie apart or the rows at several strides.
std::optional<int64_t> row_stride(const Tensor& operand) {
  const int64_t last = operand.dim() - 1;
  if (operand.size(last) != 1 && operand.stride(last) != 1) return std::nullopt;
  int64_t count = 1, stride = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (operand.size(d) == 1) continue;
    if (count > 1 && operand.stride(d) != stride * count) return std::nullopt;
    if (count == 1) stride = operand.stride(d);
    count *= operand.size(d);
  }
  return stride;
}

// Written as dense rows, which is how torch's formula lays out a gradient of such an operand.
bool has_dense_gradient(const Tensor& operand) {
  return operand.is_contiguous() || !operand.is_non_overlapping_and_dense();
}

const char* declines_target(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call) {
  const RowSumsTraits& traits = loss.traits;
  if (!traits.takes_labels && !traits.takes_class)
    return call.target ? "a target, which the loss does not take" : nullptr;
  if (!call.target) return "no target";
  const Tensor& target = *call.target;
  if (target.device() != first.device()) return "tensors on different devices";
  if (traits.takes_class) {
    if (target.scalar_type() != at::kLong) return "class indices that are not int64";
    const int64_t rows = first.dim() == 2 ? first.size(0) : 1;
    if (first.dim() > 2 || target.dim() > 1 || target.numel() != rows) return "class indices that do not fit the input";
    return nullptr;
  }
  if (!label_type(target.scalar_type())) return "labels in a dtype that the kernels do not read";
  if (first.dim() > 2 || target.sizes() != first.sizes().slice(0, size_t(first.dim()) - 1))
    return "labels that do not fit the input";
  return nullptr;
}

const char* declines_weight(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call, bool wide) {
  if (!call.weight) return nullptr;
  const Tensor& weight = *call.weight;
  if (!loss.traits.takes_class) return "a weight, which the loss does not take";
  if (weight.device() != first.device()) return "tensors on different devices";
  if (weight.requires_grad()) return "a weight that requires a gradient";
  if (weight.scalar_type() != first.scalar_type() && !(wide && weight.scalar_type() == at::kFloat))
    return "a weight of another dtype than the input";
  if (weight.dim() != 1 || weight.size(0) != first.size(-1)) return "a weight that does not fit the classes";
  return nullptr;
}

}  // namespace

const char* declines(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call, bool autocast, bool& wide,
                     bool takes_empty) {
  const RowSumsTraits& traits = loss.traits;
  const OptionalTensor* others[] = {&call.second, &call.third};
  for (int k = 1; k < kMostOperands; ++k) {
    const OptionalTensor& other = *others[k - 1];
    if (other.has_value() != (k < traits.operands)) return "more or fewer operands than the loss takes";
    if (other && other->device() != first.device()) return "tensors on different devices";
  }
  if (!kernel_dtype(first.scalar_type())) return "an input that is no float64, float32, bfloat16 or float16";
  if (first.dim() == 0 || first.size(-1) == 0 || (!takes_empty && first.numel() == 0))
    return "an input that is empty or a single number";
  for (const OptionalTensor* other : others) {
    if (!*other) continue;
    if ((*other)->scalar_type() != first.scalar_type()) return "inputs of different dtypes";
    if ((*other)->sizes() != first.sizes()) return "inputs of different shapes";
  }
  if (first.size(-1) > device_for(first).most_classes) return "more columns than a kernel counts";
  if (!in_range(call.params, traits.params, traits.param_count)) return "a parameter that is out of range";
  if (traits.whole >= 0 && std::trunc(call.params[traits.whole]) != call.params[traits.whole])
    return "a norm for which there is no kernel";
  if (const char* why = declines_target(loss, first, call)) return why;
  wide = autocast && is_half(first.scalar_type());
  if (traits.takes_class && is_half(first.scalar_type()) && !wide && !device_for(first).margins_of_halves)
    return "half precision, which torch refuses on a CPU";
  if (const char* why = declines_weight(loss, first, call, wide)) return why;
  if (first.numel() == 0) return nullptr;
  const auto apart = [](const Tensor& operand) { return !row_stride(operand) || !has_dense_gradient(operand); };
  if (apart(first) || (call.second && apart(*call.second)) || (call.third && apart(*call.third)))
    return "rows whose columns do not lie side by side";
  return nullptr;
}

RowSumsInputs::RowSumsInputs(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call)
    : operands({first}), params(call.params), wide(call.wide) {
  TORCH_CHECK_VALUE(call.reduction >= kNone && call.reduction <= kSum, loss.op,
                    ": expected a reduction from 0 to 2 (none, mean, sum), got ", call.reduction);
  bool expected_wide = false;
  if (const char* why = declines(loss, first, call, /*autocast=*/call.wide, expected_wide, /*takes_empty=*/true))
    raise_declined(loss.op, why, first, call.target.value_or(first), call.weight, params);
  TORCH_CHECK(call.wide == expected_wide, loss.op, ": expected wide=False for ", first.scalar_type(),
              ", got wide=True");
  if (call.second) operands.push_back(*call.second);
  if (call.third) operands.push_back(*call.third);
  if (call.target) target = call.target->contiguous();
  if (call.weight) weight = call.weight->to(arithmetic_type(first.scalar_type())).contiguous();
  columns = first.size(-1);
  rows = first.numel() / columns;
}

at::DimVector RowSumsInputs::losses_sizes() const {
  const at::IntArrayRef sizes = target ? target->sizes() : operands[0].sizes().slice(0, size_t(operands[0].dim()) - 1);
  return at::DimVector(sizes);
}

void RowSumsInputs::fill(RowSumsArgs& args) const {
  args.dtype = *kernel_dtype(operands[0].scalar_type());
  args.result_dtype = *kernel_dtype(result_dtype());
  args.rows = rows;
  args.columns = columns;
  for (size_t k = 0; k < operands.size(); ++k) {
    args.operands[k] = operands[k].const_data_ptr();
    args.row_strides[k] = *row_stride(operands[k]);
  }
  if (target) {
    args.target = target->const_data_ptr();
    args.label_type = *label_type(target->scalar_type());
  }
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  copy_params(params, args.params);
}

}  // namespace fusedloss
