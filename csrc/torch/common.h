// What both families share on the torch side.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/ArrayRef.h>
#include <torch/library.h>

#include <functional>
#include <optional>
#include <string>

#include "../kernels/cpu.h"
#include "../kernels/cuda.h"
#include "devices.h"

namespace fusedloss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Params = c10::ArrayRef<double>;

// As in torch.nn._reduction; kMeanOrZero is a mean that is 0, not NaN, where it divides by 0.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kMeanOrZero = 3 };
inline bool is_mean(int64_t reduction) { return reduction == kMean || reduction == kMeanOrZero; }

// An op by its name, or by "name.overload".
inline c10::OperatorHandle find_op(const std::string& name) {
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.substr(0, dot).c_str(), overload.c_str());
}
// "huber" of "fusedloss::huber"
inline std::string base_name(const std::string& op) { return op.substr(op.find("::") + 2); }

std::optional<DType> kernel_dtype(at::ScalarType type);
at::ScalarType arithmetic_type(at::ScalarType type);
inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Parameters that are not given are 0.
void copy_params(Params from, double (&to)[kMaxParams]);
bool in_range(Params params, const Range* ranges, int count);

// Whether the sizes are those of the logits (C), (N, C) or (N, C, d1, ...) without the classes.
bool are_rows_of(at::IntArrayRef sizes, const Tensor& logits);
inline int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }
inline int64_t classes_of(const Tensor& logits) { return logits.size(class_dim(logits)); }

// Raises why the kernels do not own a call of an op, and what came.
void raise_declined(const std::string& op, const char* why, const Tensor& input, const Tensor& target,
                    const OptionalTensor& weight, Params params);

// Calls f(begin, end) over [0, count) on torch's own threads, `grain` or more items a thread.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

// Tensors for kernels to write, every element: Device::empty says what that spares. One on the device of another
// tensor, contiguous or with the strides, and one laid out as torch's empty_like lays it out, so many elements behind
// the begin of its storage.
Tensor empty_beside(const Tensor& other, at::IntArrayRef sizes, at::ScalarType dtype,
                    at::OptionalIntArrayRef strides = std::nullopt);
Tensor empty_in_order_of(const Tensor& like, at::ScalarType dtype, int64_t offset = 0);

// In the order of `like`, for a kernel that reads `read`. Backed by huge pages where the system grants them on request:
// a fresh 64 MB gradient costs 16,000 page faults otherwise, more time than its arithmetic (17 ms against 3 ms).
Tensor empty_gradient(const Tensor& like, const Tensor& read);

// While it lives, gradients are for eager autograd, and begin as far behind a multiple of 16 bytes as what is read: a
// GPU's kernels then read and write the same vectors. It costs a storage 14 bytes at most. A captured graph is not told
// of it and would take such a gradient for one that begins at a multiple.
class AlignedAsRead {
 public:
  AlignedAsRead() : before_(wanted_) { wanted_ = true; }
  ~AlignedAsRead() { wanted_ = before_; }
  AlignedAsRead(const AlignedAsRead&) = delete;
  static bool wanted() { return wanted_; }

 private:
  static thread_local bool wanted_;
  bool before_;
};

// torch keeps an element of its own for each that it computes: for an expanded input of billions of elements that fails
// at once, with its error, where kernels that keep nothing would run for minutes.
void check_memory(const Tensor& input);

// A number of a dense tensor on the CPU, without a dispatch.
double number_at(const Tensor& tensor, int64_t index);
void set_number(const Tensor& tensor, int64_t index, double value);

// An upstream gradient ready for a kernel that reads it with stride 0 or 1.
struct Upstream {
  Tensor tensor;
  int64_t stride;
};
bool is_one_value(const Tensor& upstream);
Upstream read_upstream(const Tensor& upstream);  // in contiguous order

// What a reduction makes of no losses at all, which no kernel is given: NaN for a mean, as in torch.
void set_of_nothing(const Tensor& value, int64_t reduction);

// data *= factor, one element: left alone where that is 1, which a GPU finds out by itself. Returns data.
Tensor scale_(const Tensor& data, const Tensor& factor);
void check_factor(const Tensor& data, const Tensor& factor);
void implement_scale_on_cpu(torch::Library& m);
void implement_scale_on_cuda(torch::Library& m);

inline void check_device(const char* name, const char* what, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), name, ": expected ", what, " on ", like.device(), ", got ",
              tensor.device());
}

// An upstream gradient is one number, or without a reduction has the given sizes.
void check_upstream(const char* name, const Tensor& upstream, at::ScalarType dtype, int64_t reduction,
                    at::IntArrayRef sizes, const Tensor& like);

}  // namespace fusedloss
