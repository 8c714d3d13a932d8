// The CUDA kernels: the same arguments with device pointers.
//
// Every function puts its kernels on the stream and returns a cudaError_t; none synchronises or allocates, so that all
// of them can be captured in a CUDA graph.
#pragma once

#include "pointwise.h"
#include "row_sums.h"
#include "softmax.h"

struct CUstream_st;

namespace fusedloss {

using CudaStream = ::CUstream_st*;
struct DistillationArgs;  // distillation.h

// Partial sums of one call, and the counter by which its last block knows that it is the last.
constexpr int64_t kCudaWorkspaceBytes = 72 << 10;

// A target out of range, in pinned host memory: row -1 until a kernel has met one. A negative variance has row 0 and a
// target that no class index is.
struct alignas(16) BadTarget {
  int64_t row, target;
};
constexpr BadTarget kNegativeVariance = {0, INT64_MIN};

struct CudaPointwiseArgs : PointwiseArgs {
  int64_t count;
  void* total;  // of total_dtype: the sum over divisor
  DType total_dtype;
  double divisor;  // count for a mean
  void* workspace;
  // Class indices only. A mean divides by the number of elements in rows that are not ignored, which no host knows:
  // cuda_indexed_divisor writes it where a gradient reads it.
  bool mean_of_counted;
  double* counted;
  BadTarget* bad_target;  // also of a loss of variances
};
using CudaPointwise = int (*)(PointwiseResult, const CudaPointwiseArgs&, CudaStream);
int cuda_pointwise(Pointwise, PointwiseResult, const CudaPointwiseArgs&, CudaStream);

// Losses that take class indices: input, weight, output and an upstream gradient per element are of one dtype.
int cuda_indexed(Pointwise, PointwiseResult, const CudaPointwiseArgs&, CudaStream);
int cuda_indexed_divisor(const CudaPointwiseArgs&, CudaStream);

struct CudaSoftmaxArgs : SoftmaxArgs {
  void* total;  // the sum or mean; null for no reduction
  bool mean;
  bool zero_for_none;  // a mean over nothing is 0, not NaN
  // What a mean divides by, in the arithmetic type: the forward writes it, and whatever makes a gradient reads it.
  void* divisor;
  BadTarget* bad_target;
  bool in_place;  // grad is logits
  void* workspace;
};
// Only the divisor, for a forward that makes a mean's gradient in the same pass.
int cuda_softmax_divisor(Softmax, const CudaSoftmaxArgs&, CudaStream);
// With args.grad, also the gradient for an upstream gradient of 1; the divisor is then read, not written.
int cuda_softmax_forward(Softmax, const CudaSoftmaxArgs&, CudaStream);
int cuda_softmax_backward(Softmax, const CudaSoftmaxArgs&, CudaStream);

struct CudaRowSumsArgs : RowSumsArgs {
  void* total;  // forward, of result_dtype: the sum over divisor; null for no reduction
  double divisor;
  BadTarget* bad_target;
  void* workspace;
};
int cuda_row_sums_forward(RowSums, const CudaRowSumsArgs&, CudaStream);
int cuda_row_sums_backward(RowSums, const CudaRowSumsArgs&, CudaStream);

// Within a row, kernels count in 32 bits, some steps past its end.
constexpr int64_t kCudaMaxClasses = INT32_MAX - (1 << 16);

// Divergences of rows, of those pairs of dtypes that the kernels read.
bool cuda_distils(DType student, DType teacher);
int cuda_distillation_forward(const DistillationArgs&, CudaStream);
int cuda_distillation_backward(const DistillationArgs&, CudaStream);

// Whether this build has code for the current device.
bool cuda_has_kernels();

// data *= *multiplier, of dtype or its arithmetic type, which is read on the device: at 1 nothing is touched.
int cuda_scale(DType, void* data, int64_t count, const void* multiplier, bool wide_multiplier, CudaStream);

}  // namespace fusedloss
