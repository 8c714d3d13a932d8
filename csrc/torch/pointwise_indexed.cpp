// Pointwise losses over class indices in torch: schemas, checks, autograd.

#include "pointwise_indexed.h"

#include <algorithm>
#include <vector>

#include "loss_function.h"
#include "pointwise.h"

namespace fusedloss {
namespace {

bool valid(Pointwise loss, Params params) { return in_range(params, pointwise_loss(int64_t(loss)).valid); }

std::vector<int64_t> rows_of(at::IntArrayRef of_logits) {
  std::vector<int64_t> rows = of_logits.vec();
  rows.erase(rows.begin() + 1);
  return rows;
}

// What a weight that broadcasts to the logits is given for.
enum class Weights { Rows, Classes, Elements, Neither };

Weights kind_of(const Tensor& weight, const Tensor& logits) {
  const int64_t missing = logits.dim() - weight.dim();
  if (missing < 0) return Weights::Neither;
  bool one_class = true, one_row = true;
  for (int64_t d = missing; d < logits.dim(); ++d) {
    const int64_t size = weight.size(d - missing);
    if (size == 1) continue;
    if (size != logits.size(d)) return Weights::Neither;
    (d == 1 ? one_class : one_row) = false;
  }
  if (one_class) return Weights::Rows;
  if (one_row) return Weights::Classes;
  return weight.sizes() == logits.sizes() ? Weights::Elements : Weights::Neither;
}

void check(Pointwise loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Params params) {
  const char* name = indexed_name(loss);
  TORCH_CHECK(kernel_dtype(logits.scalar_type()), name, ": expected floating point logits, got ", logits.scalar_type());
  TORCH_CHECK(logits.dim() >= 2 && logits.numel() > 0, name,
              ": expected logits (N, C) or (N, C, d1, ...), not empty, got ", logits.sizes());
  TORCH_CHECK(target.scalar_type() == at::kLong, name, ": expected target dtype to be Long, got ",
              target.scalar_type());
  const std::vector<int64_t> rows = rows_of(logits.sizes());
  TORCH_CHECK(target.sizes() == at::IntArrayRef(rows), name, ": expected target size ", at::IntArrayRef(rows), ", got ",
              target.sizes());
  TORCH_CHECK(valid(loss, params), name, ": parameters out of range: ", params);
  TORCH_CHECK(logits.is_cpu() || logits.size(1) <= kCudaMaxClasses, name, ": expected at most ", kCudaMaxClasses,
              " classes, got ", logits.size(1));
  check_device(name, "a target", target, logits);
  if (!weight) return;
  check_device(name, "a weight", *weight, logits);
  TORCH_CHECK(weight->scalar_type() == logits.scalar_type(), name, ": expected a weight of the logits' dtype ",
              logits.scalar_type(), ", got ", weight->scalar_type());
  TORCH_CHECK(kind_of(*weight, logits) != Weights::Neither, name,
              ": expected a weight for classes, rows or elements of logits of size ", logits.sizes(), ", got size ",
              weight->sizes());
}

// The dimensions of a dense tensor from the widest stride to the closest. Those of one element may stand anywhere.
std::vector<int64_t> memory_order(const Tensor& dense) {
  std::vector<int64_t> order(dense.dim());
  for (int64_t d = 0; d < dense.dim(); ++d) order[d] = d;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return dense.stride(a) > dense.stride(b); });
  return order;
}

}  // namespace

IndexedInputs::IndexedInputs(Pointwise loss, const Tensor& logits_, const Tensor& target_,
                             const OptionalTensor& weight_, int64_t ignore_index_, Params params_)
    : logits(logits_), target(target_), ignore_index(ignore_index_), params(params_) {
  check(loss, logits, target, weight_, params);
  layout = {1, logits.size(1), 1};
  if (!logits.is_non_overlapping_and_dense()) logits = logits.clone();  // dense, in the order empty_like gives
  std::vector<int64_t> row_order;
  bool before_classes = layout.classes > 1;  // a single class may stand first
  for (const int64_t d : memory_order(logits)) {
    if (d == 1) {
      before_classes = false;
      continue;
    }
    row_order.push_back(d == 0 ? 0 : d - 1);
    (before_classes ? layout.outer : layout.inner) *= logits.size(d);
  }
  target = target.permute(row_order).contiguous();
  if (weight_) read_weight(*weight_, row_order);
}

void IndexedInputs::read_weight(const Tensor& given, at::IntArrayRef row_order) {
  const std::vector<int64_t> of_rows = rows_of(logits.sizes());
  std::vector<int64_t> sizes(logits.dim() - given.dim(), 1);
  sizes.insert(sizes.end(), given.sizes().begin(), given.sizes().end());
  const Tensor full = given.reshape(sizes);
  const auto set_strides = [this](int64_t outer, int64_t of_class, int64_t inner) {
    weight_strides[0] = outer;
    weight_strides[1] = of_class;
    weight_strides[2] = inner;
  };
  switch (kind_of(given, logits)) {
    case Weights::Rows:
      weight = full.select(1, 0).expand(of_rows).permute(row_order).contiguous();
      return set_strides(layout.inner, 0, 1);
    case Weights::Classes:
      weight = full.contiguous();
      return set_strides(0, 1, 0);
    default:
      weight = full.permute(memory_order(logits)).contiguous();
      return set_strides(layout.classes * layout.inner, layout.inner, 1);
  }
}

void IndexedInputs::fill(IndexedArgs& args) const {
  args.dtype = *kernel_dtype(logits.scalar_type());
  args.input = logits.const_data_ptr();
  args.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  copy_params(params, args.params);
  args.layout = layout;
  args.index = target.const_data_ptr<int64_t>();
  args.ignore_index = ignore_index;
  args.weight_outer_stride = weight_strides[0];
  args.weight_class_stride = weight_strides[1];
  args.weight_inner_stride = weight_strides[2];
}

Tensor empty_loss(const IndexedInputs& inputs, int64_t reduction) {
  return reduction == kNone ? at::empty_like(inputs.logits) : at::empty({}, inputs.logits.options());
}

namespace {

using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, Params);
using WithGradOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                              Params);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, Params);

struct Ops {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad;
  c10::TypedOperatorHandle<BackwardOp> backward;

  explicit Ops(const std::string& name)
      : forward(find_op(name).typed<ForwardOp>()),
        with_grad(find_op(name + "_with_grad").typed<WithGradOp>()),
        backward(find_op(name + "_backward").typed<BackwardOp>()) {}
};

const Ops& ops_of(Pointwise loss) {
  switch (loss) {
#define FUSEDLOSS_OPS(name, Functor)                     \
  case Pointwise::name: {                                \
    static const Ops ops(indexed_name(Pointwise::name)); \
    return ops;                                          \
  }
    FUSEDLOSS_INDEXED(FUSEDLOSS_OPS)
#undef FUSEDLOSS_OPS
    default:
      TORCH_CHECK(false, "no loss over class indices: ", int64_t(loss));
  }
}

using torch::autograd::AutogradContext;

struct DifferentiableCall {
  Pointwise loss;
  OptionalTensor weight, pos_weight;  // the latter never
  int64_t reduction, ignore_index;
  std::vector<double> params;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["loss"] = int64_t(loss);
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["params"] = params;
  }
  static DifferentiableCall of(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    return {Pointwise(data["loss"].toInt()), {}, {}, data["reduction"].toInt(), data["ignore_index"].toInt(),
            data["params"].toDoubleVector()};
  }

  Tensor forward(const Tensor& logits, const Tensor& target) const {
    return ops_of(loss).forward.call(logits, target, weight, reduction, ignore_index, params);
  }
  std::tuple<Tensor, Tensor> with_grad(const Tensor& logits, const Tensor& target) const {
    return ops_of(loss).with_grad.call(logits, target, weight, reduction, ignore_index, params);
  }
  Tensor backward(const Tensor& upstream, const Tensor& logits, const Tensor& target, bool) const {
    return ops_of(loss).backward.call(upstream, logits, target, weight, reduction, ignore_index, params);
  }
  Tensor native(const Tensor& logits, const Tensor& target) const {
    const IndexedFormula& formula = native_indexed_formula(loss);
    TORCH_CHECK(formula, indexed_name(loss), ": no native formula to differentiate twice");
    return formula(logits, target, {weight, reduction, ignore_index, params});
  }
  bool of_difference() const { return false; }
};

struct IndexedFunction : torch::autograd::Function<IndexedFunction>, LossSteps<DifferentiableCall> {};

}  // namespace

bool owns_indexed(Pointwise loss, const Tensor& logits, const Tensor& target, const IndexedCall& call) {
  if (logits.dim() < 2 || target.dim() != logits.dim() - 1 || target.scalar_type() != at::kLong) return false;
  if (logits.numel() == 0 || !kernel_dtype(logits.scalar_type()) || !valid(loss, call.params)) return false;
  if (!logits.is_cpu() && logits.size(1) > kCudaMaxClasses) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.size(d) != logits.size(d == 0 ? 0 : d + 1)) return false;
  }
  return !call.weight || (call.weight->scalar_type() == logits.scalar_type() && !call.weight->requires_grad() &&
                          kind_of(*call.weight, logits) != Weights::Neither);
}

Tensor indexed_loss(Pointwise loss, const Tensor& logits, const Tensor& target, const IndexedCall& call,
                    bool grad_in_forward) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    const DifferentiableCall differentiable = {loss,           call.weight,       std::nullopt,
                                               call.reduction, call.ignore_index, call.params.vec()};
    // On a CPU arithmetic is what costs, and value and gradient share most of it.
    const bool pays = grad_in_forward && logits.is_cpu() && gradient_in_forward_pays(logits, call.reduction);
    return IndexedFunction::apply(logits, target, differentiable, pays);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops_of(loss).forward.call(logits, target, call.weight, call.reduction, call.ignore_index, call.params);
}

IndexedFormula& native_indexed_formula(Pointwise loss) {
  static std::vector<IndexedFormula> formulas(kPointwiseLosses);
  return formulas[size_t(loss)];
}

namespace {

template <Pointwise kLoss>
Tensor autograd_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        int64_t ignore_index, Params params) {
  // A captured graph keeps forward and backward apart: it has no use for a gradient left in between.
  return indexed_loss(kLoss, logits, target, {weight, reduction, ignore_index, params}, false);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_ARGUMENTS \
  "Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float[] params)"
#define FUSEDLOSS_DEFINE(name, Functor)                                                    \
  m.def(#name "_indexed(" FUSEDLOSS_ARGUMENTS " -> Tensor");                               \
  m.def(#name "_indexed_with_grad(" FUSEDLOSS_ARGUMENTS " -> (Tensor loss, Tensor grad)"); \
  m.def(#name "_indexed_backward(Tensor upstream, " FUSEDLOSS_ARGUMENTS " -> Tensor");
#define FUSEDLOSS_AUTOGRAD(name, Functor) \
  m.impl(#name "_indexed", &fusedloss::autograd_forward<fusedloss::Pointwise::name>);

TORCH_LIBRARY_FRAGMENT(fusedloss, m){FUSEDLOSS_INDEXED(FUSEDLOSS_DEFINE)} TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  FUSEDLOSS_INDEXED(FUSEDLOSS_AUTOGRAD)
}
