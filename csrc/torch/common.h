// What the two families share on the torch side.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/ArrayRef.h>

#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"

namespace fusedloss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Params = c10::ArrayRef<double>;

// As in torch.nn._reduction; kMeanOrZero is a mean that is 0, not NaN, where it divides by 0.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kMeanOrZero = 3 };
inline bool is_mean(int64_t reduction) { return reduction == kMean || reduction == kMeanOrZero; }

#define FUSEDLOSS_NAME(name, Functor) "fusedloss::" #name,
constexpr const char* kSoftmaxNames[] = {FUSEDLOSS_SOFTMAX(FUSEDLOSS_NAME)};
#undef FUSEDLOSS_NAME

inline const char* name_of(Softmax loss) { return kSoftmaxNames[size_t(loss)]; }

inline c10::OperatorHandle find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

std::optional<DType> kernel_dtype(at::ScalarType type);
at::ScalarType arithmetic_type(at::ScalarType type);

void copy_params(Params from, double (&to)[kMaxParams]);
bool in_range(Params params, bool (*valid)(const double* params));

// Calls f(begin, end) over [0, count) on torch's own threads, `grain` or more items a thread.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

// empty_like, backed by huge pages where the system grants them on request: a fresh 64 MB gradient costs 16,000 page
// faults otherwise, more time than its arithmetic (17 ms against 3 ms).
Tensor empty_gradient(const Tensor& like);

// An upstream gradient ready for a kernel that reads it with stride 0 or 1 in the memory order of `like`.
struct Upstream {
  Tensor tensor;
  int64_t stride;
};
Upstream read_upstream(const Tensor& upstream, const Tensor& like);
bool is_one_value(const Tensor& upstream);
Upstream read_upstream(const Tensor& upstream);  // in contiguous order

// data *= factor, one element: left alone where that is 1, which a GPU finds out by itself. Returns data.
Tensor scale_(const Tensor& data, const Tensor& factor);
void check_factor(const Tensor& data, const Tensor& factor);

inline void check_device(const char* name, const char* what, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), name, ": expected ", what, " on ", like.device(), ", got ",
              tensor.device());
}

// Expected: one number, or without a reduction as many as the sizes say.
void check_upstream(const char* name, const Tensor& upstream, at::ScalarType dtype, int64_t reduction,
                    at::IntArrayRef sizes, const Tensor& like);

// Whether forward may make the gradient of a call, before its upstream gradient is known: of a reduction to one value,
// and not in fp16, where that of a mean would underflow before a loss scale could lift it.
bool may_make_gradient_in_forward(const Tensor& input, int64_t reduction);
void check_gradient_in_forward(const char* name, const Tensor& input, int64_t reduction);

// The gradient a forward has left in ctx for the first backward, which may scale and give it away; a later one finds
// none and makes its own.
Tensor take_grad(torch::autograd::AutogradContext* ctx);

// Whether to make the gradient of a reduced loss in forward unasked. Under hooks (checkpointing, offloading) what
// forward leaves must pass through them, and a gradient does not.
bool gradient_in_forward_pays(const Tensor& input, int64_t reduction);
// Whether that gradient times the upstream one is to the last digit what backward would make. A bfloat16 gradient would
// be rounded twice; on a GPU that is not asked, which would wait for it.
bool scales_exactly(const Tensor& input, const Tensor& upstream);

}  // namespace fusedloss
