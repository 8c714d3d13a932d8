// The arguments of a call as Python gives them, or why the kernels do not own it. Nothing here raises for what a user
// got wrong: such a call is declined, and torch itself answers.
#pragma once

#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "distillation.h"
#include "pointwise.h"
#include "python_function.h"
#include "row_sums.h"
#include "softmax.h"

namespace fusedloss {

// Why kernels may not read an object as it is; null for exactly a torch.Tensor or Parameter, strided on a device there
// are kernels for, without what torch marks with a dispatch key: conj and neg views, functorch wrappers, sparse,
// nested, subclasses with __torch_dispatch__.
inline const char* why_not_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return "a subclass of torch.Tensor, or no tensor";
  const Tensor& tensor = THPVariable_Unpack(object);
  for (const Device& device : devices()) {
    if (device.plain.has_all(tensor.key_set()) && device.has_kernels(tensor.device().index()))
      return tensor._fw_grad(0).defined() ? "forward-mode AD" : nullptr;
  }
  return "a device, layout or view without kernels";
}

inline std::optional<int64_t> reduction_of(py::handle reduction) {
  if (!PyUnicode_Check(reduction.ptr())) return std::nullopt;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "mean") == 0) return kMean;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "none") == 0) return kNone;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "sum") == 0) return kSum;
  return std::nullopt;
}

inline const char* name_of(int64_t reduction) {
  return reduction == kNone ? "none" : is_mean(reduction) ? "mean" : "sum";
}

// What every loss is called with.
struct PythonCall {
  const char* declined = nullptr;
  Tensor input, target;
  OptionalTensor weight;
  int64_t reduction = kMean;
  bool autocast = false;
  std::array<double, kMaxParams> values;
  size_t count = 0;

  // Parameters follow the input, the target, the weight, the reduction, and for rows the ignore_index.
  PythonCall(const Arguments& given, size_t before_params) {
    TORCH_CHECK_TYPE(given.size() >= before_params, "expected ", before_params,
                     " arguments before the parameters, got ", given.size());
    declined = take(given[0], given[1], given[2], given[3]);
    for (size_t i = before_params; !declined && i < given.size(); ++i) declined = take_param(given[i]);
  }
  Params params() const { return Params(values.data(), count); }

 protected:
  PythonCall() = default;

  const char* take(py::handle input_, py::handle target_, py::handle weight_, py::handle reduction_) {
    if (const char* why = take_tensor(input_, input)) return why;
    if (const char* why = take_tensor(target_, target)) return why;
    if (const char* why = why_not_eager()) return why;
    if (const char* why = take_optional(weight_, weight)) return why;
    const std::optional<int64_t> known = reduction_of(reduction_);
    if (!known) return "an unusual reduction";
    reduction = *known;
    autocast = at::autocast::is_autocast_enabled(input.device().type());
    return nullptr;
  }

  // Modes that want torch's own operators.
  static const char* why_not_eager() {
    const bool on = at::tracer::impl::is_dispatch_enabled() ||
                    c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
                    c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch);
    return on ? "a transform of torch.func, or tracing" : nullptr;
  }

  static const char* take_tensor(py::handle from, Tensor& to) {
    if (const char* why = why_not_plain(from.ptr())) return why;
    to = THPVariable_Unpack(from.ptr());
    return nullptr;
  }

  static bool is_given(py::handle option) { return option && !option.is_none(); }

  static bool is_true(py::handle option) {
    if (!option) return false;
    const int truth = PyObject_IsTrue(option.ptr());
    if (truth < 0) throw py::error_already_set();
    return truth == 1;
  }

  static const char* take_optional(py::handle from, OptionalTensor& to) {
    if (!is_given(from)) return nullptr;
    return take_tensor(from, to.emplace());
  }

  static const char* take_ignore_index(py::handle from, int64_t& to) {
    if (!PyLong_Check(from.ptr()) || PyBool_Check(from.ptr())) return "an ignore_index that is no integer";
    int overflow;
    to = PyLong_AsLongLongAndOverflow(from.ptr(), &overflow);
    return overflow ? "an ignore_index beyond 64 bits" : nullptr;
  }

  const char* take_param(py::handle value) {
    if (count == kMaxParams) return "more parameters than the kernels take";
    if (!PyFloat_Check(value.ptr()) && !PyLong_Check(value.ptr())) return "a parameter that is no number";
    values[count] = PyFloat_AsDouble(value.ptr());
    if (values[count++] == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return "a parameter beyond float64";
    }
    return nullptr;
  }
};

// The work in words, for explain.
inline std::string rows_of(const Tensor& logits) {
  const char* order = logits.stride(class_dim(logits)) == 1 ? "rows of " : "columns of ";
  return order + std::to_string(classes_of(logits));
}

struct PointwiseArguments : PythonCall {
  PointwiseCall call;

  PointwiseArguments(const PointwiseLoss& loss, const Arguments& given) : PythonCall(given, 4) {
    const auto [third, ignore_index] = given.options({"third", "ignore_index"});
    call.weight = weight;
    call.reduction = reduction;
    call.params = params();
    if (!declined) declined = take_optional(third, call.third);
    if (!declined && is_given(ignore_index)) declined = take_ignore_index(ignore_index, call.ignore_index.emplace());
    if (!declined) declined = declines(loss, input, target, call, autocast, call.wide);
    if (!declined && any_of_inference() && at::GradMode::is_enabled() &&
        (input.requires_grad() || target.requires_grad() || (call.third && call.third->requires_grad())))
      declined = "a gradient beside a tensor that inference mode made";
  }

  // Autograd saves no such tensor. torch raises too where its formula saves one, which that of l1_loss does not.
  bool any_of_inference() const {
    return input.is_inference() || target.is_inference() || (weight && weight->is_inference()) ||
           (call.third && call.third->is_inference());
  }

  std::string work() const {
    if (call.ignore_index) return rows_of(input);
    at::DimVector sizes = at::infer_size_dimvector(input.sizes(), target.sizes());
    if (call.third) sizes = at::infer_size_dimvector(sizes, call.third->sizes());
    return std::to_string(c10::multiply_integers(sizes)) + " elements";
  }
};

// Under autocast, and beside probabilities of the wider dtype, a loss is float32 as torch's is; the logits are read as
// they are.
struct SoftmaxArguments : PythonCall {
  SoftmaxCall call;
  std::optional<bool> grad_in_forward;
  bool in_place = false;

  SoftmaxArguments(const SoftmaxLoss& loss, const Arguments& given) : PythonCall(given, 5) {
    const auto [wide, second, zero, grad, inplace, sample_weight] =
        given.options({"wide", "second", "zero", "grad_in_forward", "inplace", "sample_weight"});
    if (is_given(grad)) grad_in_forward = is_true(grad);
    in_place = is_true(inplace);
    call.second = is_true(second);
    if (!declined) declined = take_ignore_index(given[4], call.ignore_index);
    if (!declined) declined = take_optional(sample_weight, call.sample_weight);
    if (declined) return;
    const bool wide_target = loss.traits.soft && target.scalar_type() != input.scalar_type();
    call.target = target;
    call.weight = weight;
    call.reduction = is_true(zero) && reduction == kMean ? int64_t(kMeanOrZero) : reduction;
    call.params = params();
    call.wide = is_true(wide) || wide_target || (autocast && is_half(input.scalar_type()));
    declined = declines(loss, input, call);
  }

  std::string work() const { return rows_of(input); }
};

// run(first, second, third, target, weight, reduction, *params)
struct RowSumsArguments : PythonCall {
  RowSumsCall call;

  RowSumsArguments(const RowSumsLoss& loss, const Arguments& given) {
    constexpr size_t kBeforeParams = 6;
    TORCH_CHECK_TYPE(given.size() >= kBeforeParams, "expected ", kBeforeParams,
                     " arguments before the parameters, got ", given.size());
    given.options<1>({""});  // takes none
    declined = take(given);
    for (size_t i = kBeforeParams; !declined && i < given.size(); ++i) declined = take_param(given[i]);
    call.params = params();
    if (!declined) declined = declines(loss, input, call, autocast, call.wide);
    if (!declined && at::GradMode::is_enabled() && any([](const Tensor& each) { return each.is_inference(); }) &&
        any([](const Tensor& each) { return each.requires_grad(); }))
      declined = "a gradient beside a tensor that inference mode made";
  }

  std::string work() const {
    return std::to_string(input.numel() / input.size(-1)) + " rows of " + std::to_string(input.size(-1));
  }

 private:
  const char* take(const Arguments& given) {
    if (const char* why = take_tensor(given[0], input)) return why;
    if (const char* why = why_not_eager()) return why;
    OptionalTensor* others[] = {&call.second, &call.third, &call.target, &call.weight};
    for (size_t i = 0; i < 4; ++i) {
      if (const char* why = take_optional(given[i + 1], *others[i])) return why;
    }
    const std::optional<int64_t> known = reduction_of(given[5]);
    if (!known) return "an unusual reduction";
    call.reduction = *known;
    autocast = at::autocast::is_autocast_enabled(input.device().type());
    return nullptr;
  }

  template <class F>
  bool any(F f) const {
    if (f(input)) return true;
    for (const OptionalTensor* each : {&call.second, &call.third, &call.target, &call.weight}) {
      if (*each && f(**each)) return true;
    }
    return false;
  }
};

// run(student, teacher, labels, weight, direction, teacher_is, reduction, ignore_index, temperature, beta, return_lse)
struct DistillationArguments : PythonCall {
  Tensor teacher;
  DistillationCall call;

  explicit DistillationArguments(const Arguments& given) {
    TORCH_CHECK_TYPE(given.size() == 11, "expected 11 arguments, got ", given.size());
    given.options<1>({""});  // takes none
    declined = take(given);
    if (!declined) declined = declines(input, teacher, call, autocast);
  }

  std::string work() const { return "pairs of rows of " + std::to_string(input.size(-1)); }

 private:
  const char* take(const Arguments& given) {
    if (const char* why = take_tensor(given[0], input)) return why;
    if (const char* why = take_tensor(given[1], teacher)) return why;
    if (const char* why = why_not_eager()) return why;
    if (const char* why = take_optional(given[2], call.labels)) return why;
    if (const char* why = take_optional(given[3], call.weight)) return why;
    const bool known = take_name(given[4], kDirections, call.divergence) &&
                       take_name(given[5], kTeachers, call.teacher_is) &&
                       take_name(given[6], kRowsReductions, call.reduction);
    if (!known) return "an unknown direction, teacher or reduction";
    if (const char* why = take_ignore_index(given[7], call.ignore_index)) return why;
    for (const size_t i : {8, 9}) {
      if (const char* why = take_param(given[i])) return why;
    }
    call.temperature = values[0];
    call.beta = values[1];
    call.with_lse = is_true(given[10]);
    autocast = at::autocast::is_autocast_enabled(input.device().type());
    return nullptr;
  }

  template <class Enum, size_t kCount>
  static bool take_name(py::handle name, const char* const (&names)[kCount], Enum& to) {
    for (size_t i = 0; PyUnicode_Check(name.ptr()) && i < kCount; ++i) {
      if (PyUnicode_CompareWithASCIIString(name.ptr(), names[i]) == 0) {
        to = Enum(i);
        return true;
      }
    }
    return false;
  }
};

}  // namespace fusedloss
