// The Python module: one function per loss that computes it, or returns None where the kernels do not own the call.

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

#include "common.h"
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

// A tensor that kernels may read as it is: exactly torch.Tensor or Parameter, strided on a device there are kernels
// for, and none of what torch marks with a dispatch key: conj and neg views, functorch wrappers, sparse, nested,
// subclasses with __torch_dispatch__.
bool is_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  using Key = c10::DispatchKey;
  static const c10::DispatchKeySet on_cpu({Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU});
  const Tensor& tensor = THPVariable_Unpack(object);
  bool plain = on_cpu.has_all(tensor.key_set());
#ifdef FUSEDLOSS_CUDA
  static const c10::DispatchKeySet on_cuda({Key::CUDA, Key::ADInplaceOrView, Key::AutogradCUDA, Key::AutocastCUDA});
  plain = plain || (on_cuda.has_all(tensor.key_set()) && has_kernels(tensor.device().index()));
#endif
  return plain && !tensor._fw_grad(0).defined();
}

// Modes that change what a loss is: autocast casts, functorch and tracing want torch's own operators.
bool mode_declines(at::DeviceType device) {
  return at::autocast::is_autocast_enabled(device) || at::tracer::impl::is_dispatch_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

std::optional<int64_t> reduction_of(py::handle reduction) {
  if (!PyUnicode_Check(reduction.ptr())) return std::nullopt;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "mean") == 0) return kMean;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "none") == 0) return kNone;
  if (PyUnicode_CompareWithASCIIString(reduction.ptr(), "sum") == 0) return kSum;
  return std::nullopt;
}

const char* name_of(int64_t reduction) { return reduction == kNone ? "none" : reduction == kMean ? "mean" : "sum"; }

// The arguments that every loss has, or none where the kernels do not own them.
struct Call {
  Tensor input, target;
  OptionalTensor weight;
  int64_t reduction;
  std::array<double, kMaxParams> values;
  size_t count = 0;

  Params params() const { return Params(values.data(), count); }

  static std::optional<Call> read(py::handle input, py::handle target, py::handle weight, py::handle reduction,
                                  py::handle first, py::handle second) {
    Call call;
    if (!is_plain(input.ptr()) || !is_plain(target.ptr())) return std::nullopt;
    call.input = THPVariable_Unpack(input.ptr());
    call.target = THPVariable_Unpack(target.ptr());
    if (call.target.device() != call.input.device() || mode_declines(call.input.device().type())) return std::nullopt;
    if (!weight.is_none()) {
      if (!is_plain(weight.ptr())) return std::nullopt;
      call.weight = THPVariable_Unpack(weight.ptr());
      if (call.weight->device() != call.input.device()) return std::nullopt;
    }
    const std::optional<int64_t> known = reduction_of(reduction);
    if (!known) return std::nullopt;
    call.reduction = *known;
    const py::handle given[kMaxParams] = {first, second};
    for (const py::handle value : given) {
      if (value.is_none()) break;
      if (!PyFloat_Check(value.ptr()) && !PyLong_Check(value.ptr())) return std::nullopt;
      call.values[call.count++] = PyFloat_AsDouble(value.ptr());
      if (PyErr_Occurred()) throw py::error_already_set();
    }
    return call;
  }
};

template <Pointwise kLoss>
OptionalTensor pointwise(py::handle input, py::handle target, py::handle weight, py::handle reduction, py::handle first,
                         py::handle second) {
  const std::optional<Call> call = Call::read(input, target, weight, reduction, first, second);
  if (!call || !owns_pointwise(kLoss, call->input, call->target, call->weight, call->params())) return std::nullopt;
  py::gil_scoped_release no_gil;
  return pointwise_loss(kLoss, call->input, call->target, call->weight, call->reduction, call->params(), true);
}

template <Pointwise kLoss>
OptionalTensor indexed(py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                       py::handle ignore_index, py::handle first, py::handle second) {
  const std::optional<Call> call = Call::read(logits, target, weight, reduction, first, second);
  if (!call || !PyLong_Check(ignore_index.ptr())) return std::nullopt;
  if (!owns_indexed(kLoss, call->input, call->target, call->weight, call->params())) return std::nullopt;
  const int64_t ignored = ignore_index.cast<int64_t>();
  py::gil_scoped_release no_gil;
  return indexed_loss(kLoss, call->input, call->target, call->weight, call->reduction, ignored, call->params(), true);
}

// grad_in_forward None chooses what never moves more bytes: forward and backward apart read the logits twice and write
// the gradient once; made in forward, it is read and written again where the upstream gradient is not 1.
template <Softmax kLoss>
OptionalTensor softmax(py::handle logits, py::handle target, py::handle weight, py::handle reduction,
                       py::handle ignore_index, py::handle first, py::handle second,
                       std::optional<bool> grad_in_forward, bool inplace) {
  const std::optional<Call> call = Call::read(logits, target, weight, reduction, first, second);
  if (!call || !PyLong_Check(ignore_index.ptr())) return std::nullopt;
  if (!owns_softmax(kLoss, call->input, call->target, call->weight, call->params())) return std::nullopt;
  const int64_t ignored = ignore_index.cast<int64_t>();
  py::gil_scoped_release no_gil;
  return softmax_loss(kLoss, call->input, call->target, call->weight, call->reduction, ignored, call->params(),
                      grad_in_forward.value_or(false), inplace);
}

// Holds a Python callable for the life of the process: released at exit it could outlive the interpreter.
PyObject* keep(const py::object& formula) { return formula.inc_ref().ptr(); }

template <class... Arguments>
Tensor call_formula(PyObject* formula, Params params, Arguments&&... arguments) {
  py::gil_scoped_acquire gil;
  const py::handle callable(formula);
  return callable(std::forward<Arguments>(arguments)..., *py::tuple(py::cast(params.vec()))).template cast<Tensor>();
}

void set_formula(Pointwise loss, const py::object& formula) {
  native_formula(loss) = [kept = keep(formula)](const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                                int64_t reduction, Params params) {
    return call_formula(kept, params, input, target, weight, name_of(reduction));
  };
}

SoftmaxFormula of_class_indices(const py::object& formula) {
  return [kept = keep(formula)](const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, Params params) {
    return call_formula(kept, params, logits, target, weight, name_of(reduction), ignore_index);
  };
}

void set_formula(Softmax loss, const py::object& formula) { native_formula(loss) = of_class_indices(formula); }

template <class Loss>
void bind_formula(py::module_& m, const char* name, Loss loss) {
  m.def((std::string("set_native_") + name).c_str(), [loss](const py::object& formula) { set_formula(loss, formula); });
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_BIND_POINTWISE(name, Functor)                                                                      \
  m.def(#name, torch::wrap_pybind_function(fusedloss::pointwise<fusedloss::Pointwise::name>), "input"_a, "target"_a, \
        "weight"_a, "reduction"_a, "first"_a = py::none(), "second"_a = py::none());                                 \
  fusedloss::bind_formula(m, #name, fusedloss::Pointwise::name);                                                     \
  pointwise.append(#name);
#define FUSEDLOSS_BIND_INDEXED(name, Functor)                                                                      \
  m.def(#name "_indexed", torch::wrap_pybind_function(fusedloss::indexed<fusedloss::Pointwise::name>), "logits"_a, \
        "target"_a, "weight"_a, "reduction"_a, "ignore_index"_a, "first"_a = py::none(), "second"_a = py::none()); \
  m.def("set_native_" #name "_indexed", [](const py::object& formula) {                                            \
    fusedloss::native_indexed_formula(fusedloss::Pointwise::name) = fusedloss::of_class_indices(formula);          \
  });
#define FUSEDLOSS_BIND_SOFTMAX(name, Functor)                                                                     \
  m.def(#name, torch::wrap_pybind_function(fusedloss::softmax<fusedloss::Softmax::name>), "logits"_a, "target"_a, \
        "weight"_a, "reduction"_a, "ignore_index"_a, "first"_a = py::none(), "second"_a = py::none(),             \
        "grad_in_forward"_a = py::none(), "inplace"_a = false);                                                   \
  fusedloss::bind_formula(m, #name, fusedloss::Softmax::name);                                                    \
  softmax.append(#name);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace py::literals;
  py::list pointwise, softmax;
  FUSEDLOSS_POINTWISE(FUSEDLOSS_BIND_POINTWISE)
  FUSEDLOSS_INDEXED(FUSEDLOSS_BIND_INDEXED)
  FUSEDLOSS_SOFTMAX(FUSEDLOSS_BIND_SOFTMAX)
  m.attr("pointwise_losses") = py::tuple(pointwise);
  m.attr("softmax_losses") = py::tuple(softmax);
  m.def("cpu_isa", [] { return fusedloss::cpu_kernels().isa; });
  m.attr("cpu_isas") = fusedloss::cpu_isas();
  m.attr("compiler") = FUSEDLOSS_COMPILER;
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
