// The Python module: `losses[name]` of every loss, with `run`, which computes it or returns None where the kernels do
// not own the call, `explain`, which says which path the call takes, its `traits`, and its `native` formula.

#include <ATen/ExpandUtils.h>

#include <string>

#include "python_call.h"
#ifdef FUSEDLOSS_CUDA
#include "cuda/common.h"
#endif

#if defined(__clang__)
#define FUSEDLOSS_COMPILER "clang " __clang_version__
#else
#define FUSEDLOSS_COMPILER "gcc " __VERSION__
#endif

namespace fusedloss {
namespace {

using namespace py::literals;

struct BoundLoss {
  std::string name, family;
  int64_t number;
  py::object run, explain, traits, saved_by;
  py::object native = py::none();
  std::function<void(PyObject*)> set_native;
};

template <class Arguments>
std::string path(const Arguments& given) {
  if (given.declined) return std::string("native: ") + given.declined;
  const Device& device = device_for(given.input);
  const std::string isa = given.input.is_cpu() ? std::string(" ") + cpu_kernels().isa : "";
  return "fused: " + std::string(device.name) + isa + ", " + given.work();
}

py::tuple ranges(const Range* params, int count) {
  py::list all;
  for (int i = 0; i < count; ++i) all.append(py::make_tuple(params[i].least, params[i].most, params[i].above_least));
  return py::tuple(all);
}

template <class... Attributes>
py::object namespace_of(Attributes&&... attributes) {
  return py::module_::import("types").attr("SimpleNamespace")(std::forward<Attributes>(attributes)...);
}

BoundLoss bind(PointwiseLoss& loss) {
  const auto run = [&loss](const Arguments& arguments) -> py::object {
    const PointwiseArguments given(loss, arguments);
    if (given.declined) return py::none();
    return py::cast([&] {
      py::gil_scoped_release no_gil;
      return pointwise(loss, given.input, given.target, given.call, GradientIn::Forward);
    }());
  };
  const auto explain = [&loss](const Arguments& arguments) {
    return py::cast(path(PointwiseArguments(loss, arguments)));
  };
  const char* results[] = {"promoted", "of input", "of target", "same"};
  const PointwiseTraits& of = loss.traits;
  BoundLoss bound;
  bound.name = base_name(loss.op);
  bound.family = "pointwise";
  bound.number = loss.number;
  bound.run = function("run", run);
  bound.explain = function("explain", explain);
  bound.traits = namespace_of("of_difference"_a = of.of_difference, "has_target_slope"_a = of.has_target_slope,
                              "has_positive_weight"_a = of.has_positive_weight, "on_cuda"_a = loss.cuda != nullptr,
                              "of_probabilities"_a = of.of_probabilities,
                              "takes_class_indices"_a = of.takes_class_indices, "broadcasts"_a = of.broadcasts,
                              "takes_integers"_a = of.takes_integers, "target_first"_a = of.target_first,
                              "has_third_slope"_a = of.has_third_slope, "of_variances"_a = of.of_variances,
                              "result"_a = results[int(of.result)], "params"_a = ranges(of.params, of.param_count));
  bound.set_native = [&loss](PyObject* formula) {
    loss.formula = [formula](const Tensor& input, const Tensor& target, const PointwiseCall& call) {
      py::gil_scoped_acquire gil;
      py::dict options;
      if (call.third) options["third"] = *call.third;
      if (call.ignore_index) options["ignore_index"] = *call.ignore_index;
      return py::handle(formula)(input, target, call.weight, name_of(call.reduction),
                                 *py::tuple(py::cast(call.params.vec())), **options)
          .template cast<Tensor>();
    };
  };
  return bound;
}

BoundLoss bind(SoftmaxLoss& loss) {
  const auto run = [&loss](const Arguments& arguments) -> py::object {
    const SoftmaxArguments given(loss, arguments);
    if (given.declined) return py::none();
    const auto results = [&] {
      py::gil_scoped_release no_gil;
      return softmax(loss, given.input, given.call, given.grad_in_forward, given.in_place);
    }();
    return given.call.second ? py::cast(results) : py::cast(std::get<0>(results));
  };
  const auto explain = [&loss](const Arguments& arguments) {
    return py::cast(path(SoftmaxArguments(loss, arguments)));
  };
  const SoftmaxTraits& of = loss.traits;
  BoundLoss bound;
  bound.name = base_name(loss.op);
  bound.family = "softmax";
  bound.number = loss.number;
  bound.run = function("run", run);
  bound.explain = function("explain", explain);
  bound.saved_by =
      py::cpp_function([&loss](const std::vector<double>& params) { return loss.saved_statistics(params); });
  bound.traits = namespace_of("soft"_a = of.soft, "reads_row"_a = of.reads_row, "mean_by_weight"_a = of.mean_by_weight,
                              "second_of_ignored"_a = of.second_of_ignored, "on_cuda"_a = loss.for_cuda.compiled,
                              "params"_a = ranges(of.params, of.param_count));
  bound.set_native = [&loss](PyObject* formula) {
    loss.formula = [formula](const Tensor& logits, const SoftmaxCall& call) {
      py::gil_scoped_acquire gil;
      const py::object values =
          py::handle(formula)(logits, call.target, call.weight, name_of(call.reduction), call.ignore_index,
                              *py::tuple(py::cast(call.params.vec())), "wide"_a = call.wide, "second"_a = call.second,
                              "zero"_a = call.reduction == kMeanOrZero, "sample_weight"_a = call.sample_weight);
      return call.second ? values.cast<std::vector<Tensor>>() : std::vector<Tensor>{values.cast<Tensor>()};
    };
  };
  return bound;
}

BoundLoss bind(RowSumsLoss& loss) {
  const auto run = [&loss](const Arguments& arguments) -> py::object {
    const RowSumsArguments given(loss, arguments);
    if (given.declined) return py::none();
    return py::cast([&] {
      py::gil_scoped_release no_gil;
      return row_sums(loss, given.input, given.call);
    }());
  };
  const auto explain = [&loss](const Arguments& arguments) {
    return py::cast(path(RowSumsArguments(loss, arguments)));
  };
  const RowSumsTraits& of = loss.traits;
  BoundLoss bound;
  bound.name = base_name(loss.op);
  bound.family = "row_sums";
  bound.number = loss.number;
  bound.run = function("run", run);
  bound.explain = function("explain", explain);
  bound.traits =
      namespace_of("operands"_a = of.operands, "takes_labels"_a = of.takes_labels, "takes_class"_a = of.takes_class,
                   "params"_a = ranges(of.params, of.param_count), "whole"_a = of.whole);
  bound.set_native = [&loss](PyObject* formula) {
    loss.formula = [formula](const Tensor& first, const RowSumsCall& call) {
      py::gil_scoped_acquire gil;
      return py::handle(formula)(first, call.second, call.third, call.target, call.weight, name_of(call.reduction),
                                 *py::tuple(py::cast(call.params.vec())))
          .template cast<Tensor>();
    };
  };
  return bound;
}

py::object bind_distillation() {
  const auto run = [](const Arguments& arguments) -> py::object {
    const DistillationArguments given(arguments);
    if (given.declined) return py::none();
    const auto results = [&] {
      py::gil_scoped_release no_gil;
      return distillation(given.input, given.teacher, given.call);
    }();
    return given.call.with_lse ? py::cast(results) : py::cast(std::get<0>(results));
  };
  const auto explain = [](const Arguments& arguments) { return py::cast(path(DistillationArguments(arguments))); };
  const auto set_native = [](const py::object& given) {
    PyObject* formula = py::object(given).release().ptr();  // for the life of the process
    distillation_formula() = [formula](const Tensor& student, const Tensor& teacher, const DistillationCall& call) {
      py::gil_scoped_acquire gil;
      return py::handle(formula)(student, teacher, call.labels, call.weight, kDirections[int(call.divergence)],
                                 kTeachers[int(call.teacher_is)], kRowsReductions[int(call.reduction)],
                                 call.ignore_index, call.temperature, call.beta, call.wide)
          .template cast<std::vector<Tensor>>();
    };
  };
  return namespace_of("run"_a = function("run", run), "explain"_a = function("explain", explain),
                      "set_native"_a = py::cpp_function(set_native));
}

py::object described(const Device& device) {
  return namespace_of("most_classes"_a = device.most_classes,
                      "autocast_refuses_probabilities"_a = device.autocast_refuses_probabilities,
                      "margins_of_halves"_a = device.margins_of_halves,
                      "rows_of_any_two_dtypes"_a = device.rows_of_any_two_dtypes,
                      "takes_third_with_class_indices"_a = device.runs_class_indices(true));
}

}  // namespace
}  // namespace fusedloss

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fusedloss;
  py::class_<BoundLoss>(m, "Loss")
      .def_readonly("name", &BoundLoss::name)
      .def_readonly("family", &BoundLoss::family)
      .def_readonly("number", &BoundLoss::number)
      .def_readonly("run", &BoundLoss::run)
      .def_readonly("explain", &BoundLoss::explain)
      .def_readonly("traits", &BoundLoss::traits)
      .def_readonly("saved_by", &BoundLoss::saved_by)
      .def_property(
          "native", [](const BoundLoss& loss) { return loss.native; },
          [](BoundLoss& loss, const py::object& formula) {
            loss.native = formula;
            // Kept for the life of the process: released at exit it could outlive the interpreter.
            loss.set_native(py::object(formula).release().ptr());
          });
  py::dict losses;
  for (int i = 0; i < kPointwiseLosses; ++i) losses[base_name(pointwise_loss(i).op).c_str()] = bind(pointwise_loss(i));
  for (int i = 0; i < kSoftmaxLosses; ++i) losses[base_name(softmax_loss(i).op).c_str()] = bind(softmax_loss(i));
  for (int i = 0; i < kRowSumsLosses; ++i) losses[base_name(row_sums_loss(i).op).c_str()] = bind(row_sums_loss(i));
  m.attr("losses") = losses;
  m.attr("distillation") = bind_distillation();
  // A loss compiled apart, by the address of what it hands over.
  m.def("add_pointwise", [losses](const std::string& name, uintptr_t custom) {
    TORCH_CHECK_VALUE(custom, "expected the address of a compiled loss, got 0");
    losses[name.c_str()] = bind(add_pointwise(name, *reinterpret_cast<const CustomPointwise*>(custom)));
  });
  m.def("add_softmax", [losses](const std::string& name, uintptr_t custom) {
    TORCH_CHECK_VALUE(custom, "expected the address of a compiled loss, got 0");
    losses[name.c_str()] = bind(add_softmax(name, *reinterpret_cast<const CustomSoftmax*>(custom)));
  });
  py::dict all_devices;
  for (const Device& device : devices()) all_devices[device.name] = described(device);
  m.attr("devices") = all_devices;
  m.attr("mean_or_zero") = int64_t(kMeanOrZero);
  m.attr("most_params") = kMaxParams;
  m.def("cpu_isa", [] { return cpu_kernels().isa; });
  m.attr("cpu_isas") = cpu_isas();
  m.attr("compiler") = FUSEDLOSS_COMPILER;
  m.attr("compile_flags") = FUSEDLOSS_COMPILE_FLAGS;
  m.attr("torch_version") = FUSEDLOSS_TORCH_VERSION;
  m.attr("cuda_architectures") = FUSEDLOSS_CUDA_ARCHITECTURES;
#ifdef FUSEDLOSS_CUDA
  m.def("check", torch::wrap_pybind_function(raise_bad_target));
  m.def("has_kernels", &has_kernels);
#else
  m.def("check", [] {});
  m.def("has_kernels", [](c10::DeviceIndex) { return false; });
#endif
}
