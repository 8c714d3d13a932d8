// The pointwise family in torch: losses, schemas, checks, autograd.

#include "pointwise.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>

#include <array>
#include <mutex>
#include <vector>

#include "../with_functor.h"
#include "loss_function.h"

namespace fusedloss {
namespace {

// Readers take no lock, so it never moves; losses are never freed, as their ops live as long as the process.
struct Registry {
  static constexpr int64_t kMost = 1 << 14;
  std::array<std::atomic<PointwiseLoss*>, kMost> losses{};
  int64_t count = 0;

  template <class... Of>
  PointwiseLoss& add(const std::string& op, Of... of) {
    TORCH_CHECK(count < kMost, op, ": expected at most ", kMost, " pointwise losses in a process");
    auto* loss = new PointwiseLoss(op, count, of...);
    losses[size_t(count++)].store(loss, std::memory_order_release);
    return *loss;
  }
};

Registry& registry() {
  static Registry& all = *[] {
    auto* listed = new Registry;
#ifdef FUSEDLOSS_CUDA
#define FUSEDLOSS_ON_CUDA(name)                                                          \
  +[](PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) -> int { \
    return cuda_pointwise(Pointwise::name, result, args, stream);                        \
  }
#else
#define FUSEDLOSS_ON_CUDA(name) CudaPointwise(nullptr)
#endif
#define FUSEDLOSS_ADD(name, Functor)                                                        \
  listed->add("fusedloss::" #name, baseline::pointwise_traits<baseline::Functor<double>>(), \
              &baseline::Functor<double>::valid, CpuPointwise(nullptr), FUSEDLOSS_ON_CUDA(name));
    FUSEDLOSS_POINTWISE(FUSEDLOSS_ADD)
#undef FUSEDLOSS_ADD
#undef FUSEDLOSS_ON_CUDA
    return listed;
  }();
  return all;
}

}  // namespace

PointwiseLoss& pointwise_loss(int64_t number) {
  return *registry().losses[size_t(number)].load(std::memory_order_acquire);
}

// ---- the arguments of an op

namespace {

bool same_dense_order(const Tensor& a, const Tensor& b) {
  return a.is_contiguous() ? b.is_contiguous() : a.strides() == b.strides() && a.is_non_overlapping_and_dense();
}

OptionalTensor factor(const PointwiseLoss& loss, const char* what, const OptionalTensor& given, const Tensor& input) {
  if (!given) return std::nullopt;
  const char* name = loss.op.c_str();
  check_device(name, what, *given, input);
  TORCH_CHECK(kernel_dtype(given->scalar_type()), name, ": expected ", what, " of floating point, got ",
              given->scalar_type());
  TORCH_CHECK(at::is_expandable_to(given->sizes(), input.sizes()), name, ": expected ", what,
              " that broadcasts to the input's size ", input.sizes(), ", got ", given->sizes());
  return given->expand(input.sizes());
}

}  // namespace

PointwiseInputs::PointwiseInputs(const PointwiseLoss& loss, const Tensor& input_, const Tensor& target_,
                                 const PointwiseCall& call)
    : input(input_), target(target_), params(call.params) {
  const char* name = loss.op.c_str();
  TORCH_CHECK(kernel_dtype(input.scalar_type()), name, ": expected a floating point input, got ", input.scalar_type());
  TORCH_CHECK(kernel_dtype(target.scalar_type()), name, ": expected a floating point target, got ",
              target.scalar_type());
  TORCH_CHECK(!call.wide || c10::elementSize(input.scalar_type()) == 2, name,
              ": float32 results are those of a half-precision input, got ", input.scalar_type());
  TORCH_CHECK(in_range(params, loss.valid), name, ": parameters out of range: ", params);
  check_device(name, "a target", target, input);
  TORCH_CHECK(target.sizes() == input.sizes(), name, ": expected target of the input's size ", input.sizes(), ", got ",
              target.sizes());
  TORCH_CHECK(!call.pos_weight || loss.traits.has_positive_weight, name, ": takes no pos_weight");
  weight = factor(loss, "a weight", call.weight, input);
  pos_weight = factor(loss, "a pos_weight", call.pos_weight, input);
}

Tensor PointwiseInputs::empty_losses(const PointwiseLoss& loss, bool wide) const {
  const at::ScalarType dtype = result_dtype(wide);
  const bool by_target = loss.traits.result == ResultDType::OfTarget;
  Tensor first = by_target ? target : input, second = by_target ? input : target;
  if (loss.traits.result == ResultDType::Same || same_dense_order(first, second))
    return at::empty_like(first, first.options().dtype(dtype));
  if (input.is_cpu() && first.scalar_type() != second.scalar_type()) {
    // There torch converts what is not of the result's dtype, and expanded elements become elements of their own.
    for (Tensor* tensor : {&first, &second}) {
      if (!tensor->is_non_overlapping_and_dense() && tensor->scalar_type() != dtype) *tensor = at::empty_like(*tensor);
    }
  }
  at::TensorIteratorConfig config;
  config.check_all_same_dtype(false).declare_static_dtype_and_device(dtype, input.device());
  config.add_owned_output(Tensor()).add_const_input(first);
  if (!by_target) config.add_const_input(second);
  return config.build().output(0);
}

namespace {

// The tensors of a pass in one order of elements, that of the first.
struct Reading {
  Operand* operand;
  Tensor tensor;
};

void fill_dense(PointwiseArgs& args, const std::vector<Reading>& readings, int64_t count) {
  args.dims = 1;
  args.sizes[0] = count;
  for (const Reading& reading : readings) {
    reading.operand->dense = true;
    reading.operand->strides[0] = 1;
  }
}

// torch's iterator finds the order of the output, or else of the first input, and merges dimensions. False where more
// are left than a kernel counts.
bool fill_strided(PointwiseArgs& args, const std::vector<Reading>& readings, const Tensor* output) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false);
  if (output) config.add_output(*output);
  for (const Reading& reading : readings) config.add_const_input(reading.tensor);
  const at::TensorIterator iterator = config.build();
  if (iterator.ndim() > kMaxDims) return false;
  args.dims = std::max(iterator.ndim(), 1);
  args.sizes[0] = 1;
  for (int d = 0; d < iterator.ndim(); ++d) args.sizes[d] = iterator.shape()[d];
  for (size_t i = 0; i < readings.size(); ++i) {
    Operand& operand = *readings[i].operand;
    const at::IntArrayRef bytes = iterator.strides(int64_t(i) + (output ? 1 : 0));
    int64_t expected = 1;
    operand.dense = true;
    for (int d = 0; d < iterator.ndim(); ++d) {
      operand.strides[d] = bytes[d] / readings[i].tensor.element_size();
      operand.dense = operand.dense && (operand.strides[d] == expected || args.sizes[d] == 1);
      expected *= args.sizes[d];
    }
  }
  return true;
}

}  // namespace

void PointwiseInputs::fill(PointwiseArgs& args, const Tensor* output, const Tensor* upstream) {
  std::vector<Reading> readings = {{&args.input, input}, {&args.target, target}};
  if (weight) readings.push_back({&args.weight, *weight});
  if (pos_weight) readings.push_back({&args.pos_weight, *pos_weight});
  if (upstream) {
    args.one_upstream = is_one_value(*upstream);
    args.upstream.data = upstream->const_data_ptr();
    args.upstream.dtype = *kernel_dtype(upstream->scalar_type());
    if (!args.one_upstream) readings.push_back({&args.upstream, *upstream});
  }
  const Tensor& order = output ? *output : input;
  bool all_dense = true, any_double = false;
  for (const Reading& reading : readings) {
    all_dense = all_dense && same_dense_order(order, reading.tensor);
    any_double = any_double || reading.tensor.scalar_type() == at::kDouble;
  }
  if (all_dense) {
    fill_dense(args, readings, input.numel());
  } else if (!fill_strided(args, readings, output)) {
    for (Reading& reading : readings) {
      reading.tensor = at::empty_like(order, reading.tensor.options()).copy_(reading.tensor);
      copies.push_back(reading.tensor);
    }
    fill_dense(args, readings, input.numel());
  }
  for (const Reading& reading : readings) {
    reading.operand->data = reading.tensor.const_data_ptr();
    reading.operand->dtype = *kernel_dtype(reading.tensor.scalar_type());
  }
  args.arithmetic = any_double ? DType::Double : DType::Float;
  copy_params(params, args.params);
  if (!output) return;
  args.output = output->mutable_data_ptr();
  args.output_dtype = *kernel_dtype(output->scalar_type());
}

// ---- autograd

using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params, const OptionalTensor&,
                         bool);
using WithGradOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params,
                                              const OptionalTensor&, bool);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params,
                          const OptionalTensor&, bool, bool);

struct PointwiseHandles {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad;
  c10::TypedOperatorHandle<BackwardOp> backward;
};

namespace {

const PointwiseHandles& handles_of(const PointwiseLoss& loss) {
  const PointwiseHandles* handles = loss.handles.load(std::memory_order_acquire);
  if (!handles) {  // two threads may find the same ones
    handles =
        new PointwiseHandles{find_op(loss.op).typed<ForwardOp>(), find_op(loss.op + "_with_grad").typed<WithGradOp>(),
                             find_op(loss.op + "_backward").typed<BackwardOp>()};
    loss.handles.store(handles, std::memory_order_release);
  }
  return *handles;
}

using torch::autograd::AutogradContext;

struct DifferentiableCall {
  const PointwiseLoss* loss;
  OptionalTensor weight, pos_weight;
  int64_t reduction;
  std::vector<double> params;
  bool wide;

  void save(AutogradContext* ctx) const {
    auto& data = ctx->saved_data;
    data["loss"] = loss->number;
    data["reduction"] = reduction | int64_t(wide) << 8;
    if (!params.empty()) data["params"] = params;
  }
  static DifferentiableCall of(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    const int64_t reduction = data["reduction"].toInt();
    const auto params = data.find("params");
    return {&pointwise_loss(data["loss"].toInt()),
            {},
            {},
            reduction & 0xff,
            params == data.end() ? std::vector<double>() : params->second.toDoubleVector(),
            bool(reduction >> 8)};
  }

  Tensor forward(const Tensor& input, const Tensor& target) const {
    return handles_of(*loss).forward.call(input, target, weight, reduction, params, pos_weight, wide);
  }
  std::tuple<Tensor, Tensor> with_grad(const Tensor& input, const Tensor& target) const {
    return handles_of(*loss).with_grad.call(input, target, weight, reduction, params, pos_weight, wide);
  }
  Tensor backward(const Tensor& upstream, const Tensor& input, const Tensor& target, bool of_target) const {
    return handles_of(*loss).backward.call(upstream, input, target, weight, reduction, params, pos_weight, wide,
                                           of_target);
  }
  Tensor native(const Tensor& input, const Tensor& target) const {
    TORCH_CHECK(loss->formula, loss->op, ": no native formula to differentiate twice");
    if (!wide) return loss->formula(input, target, {weight, pos_weight, reduction, params, wide});
    const auto widened = [](const OptionalTensor& tensor) {
      return tensor ? OptionalTensor(tensor->to(at::kFloat)) : std::nullopt;
    };
    return loss->formula(input.to(at::kFloat), target.to(at::kFloat),
                         {widened(weight), widened(pos_weight), reduction, params, false});
  }
  bool of_difference() const { return loss->traits.of_difference; }
};

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction>, LossSteps<DifferentiableCall> {};

bool differentiates(const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

}  // namespace

Tensor pointwise(const PointwiseLoss& loss, const Tensor& input_, const Tensor& target_, const PointwiseCall& call,
                 bool grad_in_forward) {
  Tensor input = input_, target = target_;
  if (input.sizes() != target.sizes()) {
    const auto sizes = at::infer_size_dimvector(input.sizes(), target.sizes());
    input = input.expand(sizes);
    target = target.expand(sizes);
  }
  if (at::isIntegralType(target.scalar_type(), false)) {
    target = target.to(call.wide ? at::kFloat : input.scalar_type());
  }
  if (differentiates(input) || differentiates(target)) {
    TORCH_CHECK(!target.requires_grad() || loss.traits.of_difference || loss.traits.has_target_slope, loss.op,
                " is not differentiable with respect to its target");
    const DifferentiableCall differentiable = {&loss,          call.weight,       call.pos_weight,
                                               call.reduction, call.params.vec(), call.wide};
    // On a CPU a gradient in forward costs hardly more than the sum alone. On a GPU it moves 3 elements where forward
    // and backward apart move 5, and as many as they do where the upstream gradient is not 1.
    const bool pays = grad_in_forward && input.requires_grad() && gradient_in_forward_pays(input, call.reduction);
    return PointwiseFunction::apply(input, target, differentiable, pays);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return handles_of(loss).forward.call(input, target, call.weight, call.reduction, call.params, call.pos_weight,
                                       call.wide);
}

const char* declines_pointwise(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                               PointwiseCall& call, bool autocast) {
  const at::ScalarType type = input.scalar_type();
  const bool half = c10::elementSize(type) == 2;
  const bool promotes_integers =
      loss.traits.result == ResultDType::Promoted && at::isIntegralType(target.scalar_type(), false);
  if (!kernel_dtype(type) || !(kernel_dtype(target.scalar_type()) || promotes_integers))
    return "an input or target that is no float64, float32, bfloat16 or float16";
  if (input.numel() == 0 || target.numel() == 0) return "an empty input";
  if (!input.is_cpu() && !loss.cuda) return "a loss that was compiled for the CPU alone";
  if (!in_range(call.params, loss.valid)) return "a parameter that is out of range";
  if (target.requires_grad() && !loss.traits.of_difference && !loss.traits.has_target_slope)
    return "a target that requires a gradient";
  if (input.sizes() != target.sizes() &&
      (!loss.traits.of_difference || !at::are_expandable(input.sizes(), target.sizes())))
    return "an input and a target whose shapes do not fit";
  const auto sizes = at::infer_size_dimvector(input.sizes(), target.sizes());
  for (const OptionalTensor* factor : {&call.weight, &call.pos_weight}) {
    if (!*factor) continue;
    const Tensor& given = **factor;
    if (given.requires_grad()) return "a weight that requires a gradient";
    if (!kernel_dtype(given.scalar_type())) return "a weight that is no float64, float32, bfloat16 or float16";
    if (!at::is_expandable_to(given.sizes(), sizes)) return "a weight that does not fit the input";
  }
  // The dtype that torch gives the result: that of the input, or float32 beside a half-precision one.
  at::ScalarType result = type;
  if (autocast && half) {
    const bool wider_weight = call.weight && call.weight->scalar_type() == at::kDouble;
    if (target.scalar_type() == at::kDouble || (wider_weight && loss.traits.result != ResultDType::OfTarget))
      return "inputs of different dtypes";
    if (loss.traits.of_probabilities && !input.is_cpu()) return "probabilities under autocast, which torch refuses";
    result = at::kFloat;
  } else {
    const bool mixed = target.scalar_type() != type;
    switch (loss.traits.result) {
      case ResultDType::Promoted:
        result = at::promote_types(type, target.scalar_type());
        // A weight without dimensions gives way to losses that have some.
        if (call.weight && (call.weight->dim() || sizes.empty()))
          result = at::promote_types(result, call.weight->scalar_type());
        break;
      case ResultDType::OfTarget:
        result = target.scalar_type();
        break;
      case ResultDType::Same:
        if (mixed || (call.weight && call.weight->scalar_type() != type)) return "inputs of different dtypes";
        break;
      case ResultDType::OfInput:
        break;
    }
  }
  call.wide = half && result == at::kFloat;
  return result == type || call.wide ? nullptr : "inputs of different dtypes";
}

namespace {

#define FUSEDLOSS_ARGUMENTS                                                                                    \
  "Tensor input, Tensor target, Tensor? weight, int reduction, float[] params, Tensor? pos_weight=None, bool " \
  "wide=False"

void define(torch::Library& m, const PointwiseLoss& loss) {
  const std::string name = loss.op.substr(loss.op.find("::") + 2);
  m.def((name + "(" FUSEDLOSS_ARGUMENTS ") -> Tensor").c_str());
  m.def((name + "_with_grad(" FUSEDLOSS_ARGUMENTS ") -> (Tensor loss, Tensor grad)").c_str());
  m.def((name + "_backward(Tensor upstream, " FUSEDLOSS_ARGUMENTS ", bool of_target=False) -> Tensor").c_str());
}

void implement_under_autograd(torch::Library& m, const PointwiseLoss& loss) {
  m.impl(loss.op.substr(loss.op.find("::") + 2).c_str(),
         [&loss](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 Params params, const OptionalTensor& pos_weight, bool wide) {
           // A captured graph keeps forward and backward apart: it has no use for a gradient left in between.
           return pointwise(loss, input, target, {weight, pos_weight, reduction, params, wide}, false);
         });
}

}  // namespace

PointwiseLoss& add_pointwise(const std::string& name, const CustomPointwise& custom) {
  TORCH_CHECK(custom.version == kCustomVersion, name, ": expected a loss compiled for version ", kCustomVersion,
              " of these kernels, got ", custom.version);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto any = [](const double*) { return true; };
  PointwiseLoss& loss = registry().add("fusedloss::" + name, custom.traits, any, custom.cpu, custom.cuda);
  const auto library = [](torch::Library::Kind kind, c10::DispatchKey key) -> torch::Library& {
    return *new torch::Library(kind, "fusedloss", key, __FILE__, __LINE__);
  };
  define(library(torch::Library::FRAGMENT, c10::DispatchKey::Undefined), loss);
  implement_under_autograd(library(torch::Library::IMPL, c10::DispatchKey::Autograd), loss);
  implement_pointwise_on_cpu(library(torch::Library::IMPL, c10::DispatchKey::CPU), loss);
#ifdef FUSEDLOSS_CUDA
  if (loss.cuda) implement_pointwise_on_cuda(library(torch::Library::IMPL, c10::DispatchKey::CUDA), loss);
#endif
  return loss;
}

}  // namespace fusedloss

TORCH_LIBRARY_FRAGMENT(fusedloss, m) {
  for (int i = 0; i < fusedloss::kPointwiseLosses; ++i) fusedloss::define(m, fusedloss::pointwise_loss(i));
}
TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  for (int i = 0; i < fusedloss::kPointwiseLosses; ++i) {
    fusedloss::implement_under_autograd(m, fusedloss::pointwise_loss(i));
  }
}
