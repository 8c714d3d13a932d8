#include "common.h"

#include "in_place.h"

#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/stable/c/shim.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <exception>
#include <limits>
#include <mutex>

namespace fusedloss {

std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::Float;
    case at::kDouble:
      return DType::Double;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Half;
    default:
      return std::nullopt;
  }
}

at::ScalarType arithmetic_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

void copy_params(Params from, double (&to)[kMaxParams]) {
  TORCH_CHECK(from.size() <= kMaxParams, "expected at most ", kMaxParams, " parameters, got ", from.size());
  for (size_t i = 0; i < kMaxParams; ++i) to[i] = i < from.size() ? from[i] : 0;
}

bool in_range(Params params, const Range* ranges, int count) {
  for (int i = 0; i < count; ++i) {
    const Range& range = ranges[i];
    const double param = size_t(i) < params.size() ? params[size_t(i)] : 0;
    const bool least = range.above_least ? param > range.least : param >= range.least;
    if (!least || !(param <= range.most)) return false;
  }
  return true;
}

bool are_rows_of(at::IntArrayRef sizes, const Tensor& logits) {
  if (int64_t(sizes.size()) != logits.dim() - 1) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != logits.size(d == 0 ? 0 : int64_t(d) + 1)) return false;
  }
  return true;
}

void raise_declined(const std::string& op, const char* why, const Tensor& input, const Tensor& target,
                    const OptionalTensor& weight, Params params) {
  const auto described = [](const Tensor& tensor) {
    return c10::str(tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  };
  TORCH_CHECK(false, op, ": expected a call that the kernels own, got ", why, ": input ", described(input), ", target ",
              described(target), weight ? ", weight " + described(*weight) : std::string(), ", parameters ", params);
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  if (count <= grain) return f(0, count);
  // at::parallel_for itself is a header that silently runs on one thread unless this file is compiled with -fopenmp,
  // and then needs the very OpenMP runtime torch has loaded; the shim is compiled into torch.
  // What a thread throws is thrown again here: the shim says only that something was.
  struct Work {
    const std::function<void(int64_t, int64_t)>& run;
    std::mutex mutex;
    std::exception_ptr thrown;
  } work{f, {}, nullptr};
  const auto call = [](int64_t begin, int64_t end, void* context) {
    Work& work = *static_cast<Work*>(context);
    try {
      work.run(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(work.mutex);
      if (!work.thrown) work.thrown = std::current_exception();
    }
  };
  const int32_t error = torch_parallel_for(0, count, grain, call, &work);
  if (work.thrown) std::rethrow_exception(work.thrown);
  TORCH_CHECK(error == 0, "torch_parallel_for failed with error ", error);
}

Tensor empty_beside(const Tensor& other, at::IntArrayRef sizes, at::ScalarType dtype, at::OptionalIntArrayRef strides) {
  return Tensor(device_for(other).empty(sizes, strides, dtype, other.device()));
}

Tensor empty_in_order_of(const Tensor& like, at::ScalarType dtype, int64_t offset) {
  const at::DimVector strides = like.is_non_overlapping_and_dense()
                                    ? at::DimVector(like.strides())
                                    : at::DimVector(at::infer_dense_strides(like.sizes(), like.strides()));
  if (offset == 0) return empty_beside(like, like.sizes(), dtype, strides);
  const Tensor longer = empty_beside(like, {like.numel() + offset}, dtype);
  longer.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), strides, offset);
  return longer;
}

thread_local bool AlignedAsRead::wanted_ = false;

namespace {

// How many elements a gradient begins behind a multiple of 16 bytes.
int64_t offset_as(const Tensor& read, const Tensor& like) {
  const bool matters = AlignedAsRead::wanted() && device_for(like).vectors_begin_alike && like.numel() != 0 &&
                       read.scalar_type() == like.scalar_type();
  return matters ? int64_t(reinterpret_cast<uintptr_t>(read.const_data_ptr()) % 16 / read.element_size()) : 0;
}

}  // namespace

Tensor empty_gradient(const Tensor& like, const Tensor& read) {
  const Tensor gradient = empty_in_order_of(like, like.scalar_type(), offset_as(read, like));
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kWorthwhile = 4 << 20;
  if (gradient.is_cpu() && gradient.nbytes() >= kWorthwhile) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + gradient.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal costs nothing
  }
#endif
  return gradient;
}

void check_memory(const Tensor& input) {
  constexpr int64_t kBillions = int64_t(1) << 32;
  if (input.numel() < kBillions || uint64_t(input.numel()) <= input.storage().nbytes() / input.element_size()) return;
  empty_beside(input, input.sizes(), input.scalar_type());
}

double number_at(const Tensor& tensor, int64_t index) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "number_at",
                                         [&] { return double(tensor.const_data_ptr<scalar_t>()[index]); });
}

void set_number(const Tensor& tensor, int64_t index, double value) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "set_number",
                                  [&] { tensor.mutable_data_ptr<scalar_t>()[index] = static_cast<scalar_t>(value); });
}

void set_of_nothing(const Tensor& value, int64_t reduction) {
  value.fill_(reduction == kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
}

bool is_one_value(const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != 0) return false;
  }
  return true;
}

Upstream read_upstream(const Tensor& upstream) {
  if (is_one_value(upstream)) return {upstream, 0};
  return {upstream.contiguous(), 1};
}

Tensor scale_(const Tensor& data, const Tensor& factor) {
  static const auto op = find_op("fusedloss::scale_").typed<void(Tensor, const Tensor&)>();
  op.call(data, factor);
  return data;
}

void check_factor(const Tensor& data, const Tensor& factor) {
  TORCH_CHECK(kernel_dtype(data.scalar_type()), "scale_: expected floating point data, got ", data.scalar_type());
  check_overwritten(data, {data.is_same(factor) ? nullptr : &factor});
  TORCH_CHECK(factor.numel() == 1, "scale_: expected one factor, got ", factor.numel());
  check_device("scale_", "a factor", factor, data);
}

void check_upstream(const char* name, const Tensor& upstream, at::ScalarType dtype, int64_t reduction,
                    at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK(upstream.scalar_type() == dtype, name, "_backward: expected an upstream gradient of ", dtype, ", got ",
              upstream.scalar_type());
  check_device(name, "an upstream gradient", upstream, like);
  const at::IntArrayRef expected = reduction == kNone ? sizes : at::IntArrayRef();
  TORCH_CHECK(upstream.sizes() == expected, name, "_backward: expected an upstream gradient of size ", expected,
              ", got ", upstream.sizes());
}

void implement_scale_on_cpu(torch::Library& m) {
  m.impl("scale_", [](Tensor data, const Tensor& factor) {
    check_factor(data, factor);
    const double value = number_at(factor, 0);  // as a number, which bfloat16 data do not round first
    if (value == 1) return;
    const int64_t count = data.numel();
    if (data.scalar_type() != at::kFloat || count > 8192 || !data.is_non_overlapping_and_dense()) {
      data.mul_(value);
      return;
    }
    // mul_ takes 1 us to begin
    float* numbers = data.mutable_data_ptr<float>();
    const float by = float(value);
    for (int64_t i = 0; i < count; ++i) numbers[i] *= by;
  });
}

}  // namespace fusedloss
