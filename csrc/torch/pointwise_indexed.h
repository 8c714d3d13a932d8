// What a pointwise loss over class indices is in torch whatever the device. A device adds
//
//   static void forward(Pointwise, const IndexedInputs&, int64_t reduction, Tensor& loss);
//   static void backward(Pointwise, const IndexedInputs&, const Tensor& upstream, int64_t reduction, Tensor& grad);
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace fusedloss {

#define FUSEDLOSS_NAME(name, Functor) \
  if (loss == Pointwise::name) return "fusedloss::" #name "_indexed";
constexpr const char* indexed_name(Pointwise loss) {
  FUSEDLOSS_INDEXED(FUSEDLOSS_NAME)
  return nullptr;
}
#undef FUSEDLOSS_NAME

// A call but for its logits and target.
struct IndexedCall {
  OptionalTensor weight;
  int64_t reduction, ignore_index;
  Params params;
};

// Whether the kernels own a call, tensors being plain ones on one device.
bool owns_indexed(Pointwise loss, const Tensor& logits, const Tensor& target, const IndexedCall& call);

// The autograd side, callable without the dispatcher: a differentiable loss.
Tensor indexed_loss(Pointwise loss, const Tensor& logits, const Tensor& target, const IndexedCall& call,
                    bool grad_in_forward);

// The native formula of a pointwise loss over class indices.
using IndexedFormula = std::function<Tensor(const Tensor& logits, const Tensor& target, const IndexedCall&)>;
IndexedFormula& native_indexed_formula(Pointwise loss);

// The checked arguments of an op, as the kernels read them: dense logits in any order, and what belongs to rows in the
// order in which their memory has the rows.
struct IndexedInputs {
  Tensor logits, target, weight;  // weight may be undefined
  int64_t ignore_index;
  Params params;
  IndexedLayout layout;

  IndexedInputs(Pointwise loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                int64_t ignore_index, Params params);
  void fill(IndexedArgs& args) const;

 private:
  int64_t weight_strides[3] = {};  // outer, class, inner
  void read_weight(const Tensor& given, at::IntArrayRef row_order);
};

Tensor empty_loss(const IndexedInputs& inputs, int64_t reduction);

template <class Device, Pointwise kLoss>
struct IndexedOps {
  static Tensor forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        int64_t ignore_index, Params params) {
    const IndexedInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    Tensor loss = empty_loss(inputs, reduction);
    Device::forward(kLoss, inputs, reduction, loss);
    return loss;
  }

  static Tensor backward(const Tensor& upstream, const Tensor& logits, const Tensor& target,
                         const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, Params params) {
    const IndexedInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    check_upstream(indexed_name(kLoss), upstream, logits.scalar_type(), reduction, logits.sizes(), logits);
    Tensor grad = empty_gradient(inputs.logits);
    Device::backward(kLoss, inputs, upstream, reduction, grad);
    return grad;
  }
};

// Puts a device behind every op of the family.
template <class Device>
void implement_indexed(torch::Library& m) {
#define FUSEDLOSS_IMPLEMENT(name, Functor)                                 \
  m.impl(#name "_indexed", &IndexedOps<Device, Pointwise::name>::forward); \
  m.impl(#name "_indexed_backward", &IndexedOps<Device, Pointwise::name>::backward);
  FUSEDLOSS_INDEXED(FUSEDLOSS_IMPLEMENT)
#undef FUSEDLOSS_IMPLEMENT
}

}  // namespace fusedloss
