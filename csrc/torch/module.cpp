// The Python module: one function per loss that computes it, or returns None where the kernels do not own the call.

#include <ATen/ExpandUtils.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string>

#include "pointwise.h"
#include "pointwise_indexed.h"
#include "softmax.h"
#ifdef FUSEDLOSS_CUDA
#include "cuda/common.h"
#endif

#if defined(__clang__)
#define FUSEDLOSS_COMPILER "clang " __clang_version__
#else
#define FUSEDLOSS_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

namespace fusedloss {
namespace {

// Why kernels may not read an object as it is; null for exactly a torch.Tensor or Parameter, strided on a device there
// are kernels for, without what torch marks with a dispatch key: conj and neg views, functorch wrappers, sparse,
// nested, subclasses with __torch_dispatch__.
const char* why_not_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return "a subclass of torch.Tensor, or no tensor";
  using Key = c10::DispatchKey;
  static const c10::DispatchKeySet on_cpu({Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU});
  const Tensor& tensor = THPVariable_Unpack(object);
  bool plain = on_cpu.has_all(tensor.key_set());
#ifdef FUSEDLOSS_CUDA
  static const c10::DispatchKeySet on_cuda({Key::CUDA, Key::ADInplaceOrView, Key::AutogradCUDA, Key::AutocastCUDA});
  plain = plain || (on_cuda.has_all(tensor.key_set()) && has_kernels(tensor.device().index()));
#endif
  if (!plain) return "a device, layout or view without kernels";
  return tensor._fw_grad(0).defined() ? "forward-mode AD" : nullptr;
}

// Modes that want torch's own operators.
bool mode_declines() {
  return at::tracer::impl::is_dispatch_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

std::optional<int64_t> reduction_of(py::handle reduction) {
  if (!PyUnicode_Check(reduction.ptr())) return std::nullopt;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "mean") == 0) return kMean;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "none") == 0) return kNone;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "sum") == 0) return kSum;
  return std::nullopt;
}

const char* name_of(int64_t reduction) { return reduction == kNone ? "none" : is_mean(reduction) ? "mean" : "sum"; }

// The arguments that every loss has, or why the kernels do not own them.
struct Call {
  const char* declined = nullptr;
  Tensor input, target;
  OptionalTensor weight;
  int64_t reduction = kMean;
  bool autocast = false;
  std::array<double, kMaxParams> values;
  size_t count = 0;

  Params params() const { return Params(values.data(), count); }
  int64_t elements() const {
    if (input.sizes() == target.sizes()) return input.numel();
    return c10::multiply_integers(at::infer_size_dimvector(input.sizes(), target.sizes()));
  }

  template <class... P>
  static Call read(py::handle input, py::handle target, py::handle weight, py::handle reduction, P... params) {
    Call call;
    call.declined = call.take(input, target, weight, reduction);
    for (const py::handle value : std::array<py::handle, sizeof...(P)>{py::handle(params)...}) {
      if (call.declined || value.is_none()) break;
      call.declined = call.take_param(value);
    }
    return call;
  }

 protected:
  const char* take(py::handle input_, py::handle target_, py::handle weight_, py::handle reduction_) {
    if (const char* why = take_tensor(input_, input)) return why;
    if (const char* why = take_tensor(target_, target)) return why;
    if (mode_declines()) return "a transform of torch.func, or tracing";
    if (!weight_.is_none()) {
      Tensor given;
      if (const char* why = take_tensor(weight_, given)) return why;
      weight = given;
    }
    const std::optional<int64_t> known = reduction_of(reduction_);
    if (!known) return "an unusual reduction";
    reduction = *known;
    autocast = at::autocast::is_autocast_enabled(input.device().type());
    return nullptr;
  }

  const char* take_tensor(py::handle from, Tensor& to) {
    if (const char* why = why_not_plain(from.ptr())) return why;
    to = THPVariable_Unpack(from.ptr());
    return input.defined() && to.device() != input.device() ? "tensors on different devices" : nullptr;
  }

  const char* take_param(py::handle value) {
    if (count == kMaxParams) return "more parameters than the kernels take";
    if (!PyFloat_Check(value.ptr()) && !PyLong_Check(value.ptr())) return "a parameter that is no number";
    values[count++] = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return nullptr;
  }
};

// A pointwise call, or why the kernels do not own it.
struct PointwiseArguments : Call {
  PointwiseCall call;

  PointwiseArguments(const PointwiseLoss& loss, py::handle input_, py::handle target_, py::handle weight_,
                     py::handle reduction_, const py::args& params_, py::handle pos_weight)
      : Call(read(input_, target_, weight_, reduction_)) {
    for (size_t i = 0; !declined && i < params_.size(); ++i) declined = take_param(params_[i]);
    call = {weight, std::nullopt, reduction, params()};
    if (!declined && !pos_weight.is_none()) {
      Tensor given;
      declined = take_tensor(pos_weight, given);
      call.pos_weight = given;
    }
    if (!declined) declined = declines_pointwise(loss, input, target, call, autocast);
  }
};

constexpr const char* kNotOwned = "shapes, dtypes or gradients that the kernels do not take";

template <Pointwise kLoss>
struct IndexedArguments : Call {
  IndexedCall call;

  IndexedArguments(py::handle logits, py::handle target_, py::handle weight_, py::handle reduction_,
                   py::handle ignore_index, const py::args& params_)
      : Call(read(logits, target_, weight_, reduction_)) {
    for (size_t i = 0; !declined && i < params_.size(); ++i) declined = take_param(params_[i]);
    if (!declined && autocast) declined = "autocast";
    if (!declined && !PyLong_Check(ignore_index.ptr())) declined = "an ignore_index that is no integer";
    if (declined) return;
    call = {weight, reduction, ignore_index.cast<int64_t>(), params()};
    if (!owns_indexed(kLoss, input, target, call)) declined = kNotOwned;
  }
};

// A softmax call, or why the kernels do not own it. Under autocast a loss is float32; the logits are read as they are.
struct SoftmaxArguments : Call {
  SoftmaxCall call;

  SoftmaxArguments(Softmax loss, py::handle logits, py::handle target_, py::handle weight_, py::handle reduction_,
                   py::handle ignore_index, py::handle p0, py::handle p1, py::handle p2, bool wide, bool second,
                   bool zero)
      : Call(read(logits, target_, weight_, reduction_, p0, p1, p2)) {
    if (!declined && !PyLong_Check(ignore_index.ptr())) declined = "an ignore_index that is no integer";
    if (declined) return;
    const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
    const bool wide_target = traits_of(loss).soft && target.scalar_type() != input.scalar_type();
    if (zero && reduction == kMean) reduction = kMeanOrZero;
    call = {
        target, weight, reduction, ignore_index.cast<int64_t>(), params(), wide || wide_target || (autocast && half),
        second};
    declined = declines_softmax(loss, input, call);
  }
};

template <Softmax kLoss>
py::object softmax(py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                   py::handle ignore_index, py::handle p0, py::handle p1, py::handle p2, bool wide, bool second,
                   bool zero, std::optional<bool> grad_in_forward, bool inplace) {
  const SoftmaxArguments given(kLoss, logits, target, weight, reduction, ignore_index, p0, p1, p2, wide, second, zero);
  if (given.declined) return py::none();
  const auto results = [&] {
    py::gil_scoped_release no_gil;
    return softmax_loss(kLoss, given.input, given.call, grad_in_forward, inplace);
  }();
  return second ? py::cast(results) : py::cast(std::get<0>(results));
}

// ---- explain: the path of a call in words, without taking it

std::string path(const Call& call, const std::string& work) {
  if (call.declined) return std::string("native: ") + call.declined;
  return (call.input.is_cpu() ? std::string("fused: cpu ") + cpu_kernels().isa : std::string("fused: cuda")) + ", " +
         work;
}

std::string of_rows(const Tensor& logits) {
  const int64_t class_dim = logits.dim() == 1 ? 0 : 1, classes = logits.size(class_dim);
  const char* order = logits.stride(class_dim) == 1 ? "rows of " : "columns of ";
  return order + std::to_string(classes);
}

template <Softmax kLoss>
std::string explain_softmax(py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                            py::handle ignore_index, py::handle p0, py::handle p1, py::handle p2, bool wide,
                            bool second, bool zero, std::optional<bool>, bool) {
  const SoftmaxArguments given(kLoss, logits, target, weight, reduction, ignore_index, p0, p1, p2, wide, second, zero);
  return path(given, given.declined ? "" : of_rows(given.input));
}

// Holds a Python callable for the life of the process: released at exit it could outlive the interpreter.
PyObject* keep(const py::object& formula) { return formula.inc_ref().ptr(); }

void set_formula(Softmax loss, const py::object& formula) {
  native_formula(loss) = [kept = keep(formula)](const Tensor& logits, const SoftmaxCall& call) {
    using namespace py::literals;
    py::gil_scoped_acquire gil;
    const py::object values =
        py::handle(kept)(logits, call.target, call.weight, name_of(call.reduction), call.ignore_index,
                         *py::tuple(py::cast(call.params.vec())), "wide"_a = call.wide, "second"_a = call.second,
                         "zero"_a = call.reduction == kMeanOrZero);
    return call.second ? values.cast<std::vector<Tensor>>() : std::vector<Tensor>{values.cast<Tensor>()};
  };
}

// The functions of a loss: it itself, explain_ and set_native_ before its name.
void bind_pointwise(py::module_& m, PointwiseLoss& loss) {
  using namespace py::literals;
  const std::string name = loss.op.substr(loss.op.find("::") + 2);
  const auto run = [&loss](py::handle input, py::handle target, py::handle weight, py::handle reduction,
                           const py::args& params, py::handle pos_weight) -> OptionalTensor {
    const PointwiseArguments given(loss, input, target, weight, reduction, params, pos_weight);
    if (given.declined) return std::nullopt;
    py::gil_scoped_release no_gil;
    return pointwise(loss, given.input, given.target, given.call, true);
  };
  const auto explain = [&loss](py::handle input, py::handle target, py::handle weight, py::handle reduction,
                               const py::args& params, py::handle pos_weight) {
    const PointwiseArguments given(loss, input, target, weight, reduction, params, pos_weight);
    return path(given, given.declined ? "" : std::to_string(given.elements()) + " elements");
  };
  const auto set_native = [&loss](const py::object& formula) {
    loss.formula = [kept = keep(formula)](const Tensor& input, const Tensor& target, const PointwiseCall& call) {
      py::gil_scoped_acquire gil;
      py::dict options;
      if (call.pos_weight) options["pos_weight"] = *call.pos_weight;
      return py::handle(kept)(input, target, call.weight, name_of(call.reduction),
                              *py::tuple(py::cast(call.params.vec())), **options)
          .template cast<Tensor>();
    };
  };
  const py::arg_v pos_weight = ("pos_weight"_a = py::none());
  m.def(name.c_str(), torch::wrap_pybind_function(run), "input"_a, "target"_a, "weight"_a, "reduction"_a, pos_weight);
  m.def(("explain_" + name).c_str(), explain, "input"_a, "target"_a, "weight"_a, "reduction"_a, pos_weight);
  m.def(("set_native_" + name).c_str(), set_native);
  const char* results[] = {"promoted", "of input", "of target", "same"};
  const py::object traits = py::module_::import("types").attr("SimpleNamespace")(
      "of_difference"_a = loss.traits.of_difference, "has_target_slope"_a = loss.traits.has_target_slope,
      "on_cuda"_a = loss.cuda != nullptr, "of_probabilities"_a = loss.traits.of_probabilities,
      "result"_a = results[int(loss.traits.result)]);
  m.attr(("traits_of_" + name).c_str()) = traits;
}

template <Pointwise kLoss>
void bind_indexed(py::module_& m, const char* op) {
  using namespace py::literals;
  const std::string name = std::string(op).substr(std::string(op).find("::") + 2);
  const auto run = [](py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                      py::handle ignore_index, const py::args& params) -> OptionalTensor {
    const IndexedArguments<kLoss> given(logits, target, weight, reduction, ignore_index, params);
    if (given.declined) return std::nullopt;
    py::gil_scoped_release no_gil;
    return indexed_loss(kLoss, given.input, given.target, given.call, true);
  };
  const auto explain = [](py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                          py::handle ignore_index, const py::args& params) {
    const IndexedArguments<kLoss> given(logits, target, weight, reduction, ignore_index, params);
    return path(given, given.declined ? "" : of_rows(given.input));
  };
  const auto set_native = [](const py::object& formula) {
    native_indexed_formula(kLoss) = [kept = keep(formula)](const Tensor& logits, const Tensor& target,
                                                           const IndexedCall& call) {
      py::gil_scoped_acquire gil;
      return py::handle(kept)(logits, target, call.weight, name_of(call.reduction), call.ignore_index,
                              *py::tuple(py::cast(call.params.vec())))
          .template cast<Tensor>();
    };
  };
  m.def(name.c_str(), torch::wrap_pybind_function(run), "logits"_a, "target"_a, "weight"_a, "reduction"_a,
        "ignore_index"_a);
  m.def(("explain_" + name).c_str(), explain, "logits"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a);
  m.def(("set_native_" + name).c_str(), set_native);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_SOFTMAX_ARGUMENTS                                                                        \
  "logits"_a, "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a,                                     \
      "p0"_a = py::none(), "p1"_a = py::none(), "p2"_a = py::none(), "wide"_a = false, "second"_a = false, \
      "zero"_a = false, "grad_in_forward"_a = py::none(), "inplace"_a = false

#define FUSEDLOSS_APPEND(name, Functor) pointwise.append(#name);
#define FUSEDLOSS_BIND_INDEXED(name, Functor) \
  fusedloss::bind_indexed<fusedloss::Pointwise::name>(m, fusedloss::indexed_name(fusedloss::Pointwise::name));
#define FUSEDLOSS_BIND_SOFTMAX(name, Functor)                                                                  \
  m.def(#name, torch::wrap_pybind_function(fusedloss::softmax<fusedloss::Softmax::name>),                      \
        FUSEDLOSS_SOFTMAX_ARGUMENTS);                                                                          \
  m.def("explain_" #name, &fusedloss::explain_softmax<fusedloss::Softmax::name>, FUSEDLOSS_SOFTMAX_ARGUMENTS); \
  m.def("set_native_" #name,                                                                                   \
        [](const py::object& formula) { fusedloss::set_formula(fusedloss::Softmax::name, formula); });         \
  m.def("saved_by_" #name, [](const std::vector<double>& params) {                                             \
    return fusedloss::saved_statistics(fusedloss::Softmax::name, params);                                      \
  });                                                                                                          \
  softmax.append(#name);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace py::literals;
  py::list pointwise, softmax;
  FUSEDLOSS_POINTWISE(FUSEDLOSS_APPEND)
  for (int i = 0; i < fusedloss::kPointwiseLosses; ++i) fusedloss::bind_pointwise(m, fusedloss::pointwise_loss(i));
  FUSEDLOSS_INDEXED(FUSEDLOSS_BIND_INDEXED)
  FUSEDLOSS_SOFTMAX(FUSEDLOSS_BIND_SOFTMAX)
  // A loss compiled apart, by the address of what it hands over.
  m.def("add_pointwise", [](const std::string& name, uintptr_t custom) {
    py::module_ self = py::module_::import("fusedloss._C");
    fusedloss::bind_pointwise(
        self, fusedloss::add_pointwise(name, *reinterpret_cast<const fusedloss::CustomPointwise*>(custom)));
  });
  m.attr("pointwise_losses") = py::tuple(pointwise);
  m.attr("softmax_losses") = py::tuple(softmax);
  m.def("cpu_isa", [] { return fusedloss::cpu_kernels().isa; });
  m.attr("cpu_isas") = fusedloss::cpu_isas();
  m.attr("compiler") = FUSEDLOSS_COMPILER;
  m.attr("compile_flags") = FUSEDLOSS_COMPILE_FLAGS;
  m.attr("torch_version") = FUSEDLOSS_TORCH_VERSION;
  m.attr("cuda_architectures") = FUSEDLOSS_CUDA_ARCHITECTURES;
#ifdef FUSEDLOSS_CUDA
  m.def("check", torch::wrap_pybind_function(fusedloss::raise_bad_target));
  m.def("has_kernels", &fusedloss::has_kernels);
#else
  m.def("check", [] {});
  m.def("has_kernels", [](c10::DeviceIndex) { return false; });
#endif
}
