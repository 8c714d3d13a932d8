// The torch-free entry points: pointers, sizes, strides. Strides and offsets are in elements.
#pragma once

#include <cstdint>

#include "losses/pointwise.h"
#include "losses/softmax.h"

struct CUstream_st;

namespace fusedloss {

enum class DType { Float, Double, BFloat16, Half };

#define FUSEDLOSS_ENUMERATOR(name, Functor) name,
enum class Pointwise { FUSEDLOSS_POINTWISE(FUSEDLOSS_ENUMERATOR) };
enum class Softmax { FUSEDLOSS_SOFTMAX(FUSEDLOSS_ENUMERATOR) };
#undef FUSEDLOSS_ENUMERATOR

#define FUSEDLOSS_COUNT(name, Functor) +1
constexpr int kPointwiseLosses = FUSEDLOSS_POINTWISE(FUSEDLOSS_COUNT);
constexpr int kSoftmaxLosses = FUSEDLOSS_SOFTMAX(FUSEDLOSS_COUNT);
#undef FUSEDLOSS_COUNT

constexpr int kMaxParams = 8;
constexpr int kMaxDims = 6;

// What a loss reads of every element. A null one is 1 everywhere.
struct Operand {
  const void* data;
  DType dtype;
  bool dense;  // side by side in the order of the elements
  int64_t strides[kMaxDims];
};

// One loss per element. The elements are numbered in the order in which the output lies in memory, the dimensions given
// from the innermost one on.
struct PointwiseArgs {
  DType arithmetic;  // Float or Double
  Operand input, target;
  Operand weight, pos_weight;  // factors of the loss, and of its term for a target of 1
  Operand upstream;            // gradient only; of one value where `one_upstream`
  bool one_upstream;
  int dims;
  int64_t sizes[kMaxDims];
  // Class indices in place of target values: the target is 1 in the class that a row's index names and 0 in every
  // other. There are three dimensions then, (inner, classes, outer), and row outer * inner + i has elements (outer *
  // classes + class) * inner + i. Null where `target` is read.
  const int64_t* index;  // the number of classes, or a negative one, names none of them
  int64_t ignore_index;  // rows of this index count nowhere and get no gradient
  double params[kMaxParams];
  void* output;  // losses or gradients, dense; unused by the sum
  DType output_dtype;
  double scale;  // gradient only: 1 / n for a mean, negative for the gradient of a difference's target
};

// What a pass over the elements makes; SumAndGrad for an upstream gradient of 1. Outside tells whether an operand is
// where the loss is not defined: 2 for the input, 1 for the target, 0 for none.
enum class PointwiseResult { Losses, Sum, SumAndGrad, Grad, TargetGrad, Outside };

// A pass over elements [begin, end); returns the sum, or which operand lies outside.
using CpuPointwise = double (*)(PointwiseResult, const PointwiseArgs&, int64_t begin, int64_t end);

// What a loss is whatever its parameters.
struct PointwiseTraits {
  bool of_difference, has_target_slope, has_positive_weight, of_probabilities, takes_class_indices;
  ResultDType result;
  const Range* params;
  int param_count;
};

// One loss per row of logits; the row of class scores number r starts at
// (r / inner) * outer_stride + (r % inner) * inner_stride and goes on by class_stride.
struct SoftmaxLayout {
  int64_t rows, classes, inner;
  int64_t outer_stride, class_stride, inner_stride;
};

// Results (losses, second, and their upstream gradients) are of dtype, or of its arithmetic type where `wide`.
struct SoftmaxArgs {
  DType dtype;
  bool wide;
  SoftmaxLayout logits_layout;
  const void* logits;
  const void* target;  // [rows] of int64, or of uint8 where byte_target; null where targets are probabilities
  bool byte_target;
  const void* probabilities;  // of dtype, or of its arithmetic type where wide_probabilities
  bool wide_probabilities;
  SoftmaxLayout probabilities_layout;
  const void* weight;  // [classes] in arithmetic type; null: 1
  int64_t ignore_index;
  double params[kMaxParams];
  void* losses;      // forward: [rows], null where the reduction needs only the sums
  void* second;      // forward: [rows], null where only the loss is wanted; also that of ignored rows
  void* statistics;  // [2 or 3, rows] in arithmetic type: max, rest, and what else a loss sums or its mass
  // Backward. Strides are 0 where one value serves all rows. A null upstream is 1, a null upstream_second 0.
  SoftmaxLayout grad_layout;
  void* grad;
  const void* upstream;
  int64_t upstream_stride;
  const void* upstream_second;
  int64_t upstream_second_stride;
  double scale;  // 1 / total weight for a mean
  bool streams;  // CPU: a gradient by columns is written past the caches
};

FUSEDLOSS_HD int64_t target_of(const SoftmaxArgs& args, int64_t row) {
  return args.byte_target ? static_cast<const uint8_t*>(args.target)[row]
                          : static_cast<const int64_t*>(args.target)[row];
}

// How many rows are summed on their own: part of the result, so chosen from the shape alone.
int64_t softmax_chunk(const SoftmaxLayout& layout);

struct SoftmaxSums {
  double loss, weight;  // weight: the divisor of a mean
  int64_t bad_row;      // the first row whose target is out of range, or -1
};

// Where rows are few and long, each is cut into parts of kSoftmaxPart classes, whose statistics are collected apart.
constexpr int64_t kSoftmaxPart = 16384;
struct SoftmaxPart {
  double max, rest, sum, mass;
};

constexpr int64_t kSoftmaxScratch = 32768;

// Every function works on a range, so that the caller may split the work over threads: the ranges are chosen from the
// shape alone, and their sums are added in order, which makes the result independent of the thread count.
struct CpuKernels {
  const char* isa;
  CpuPointwise pointwise[kPointwiseLosses];
  // Of the targets alone: a bad row, and the divisor of a mean over weights or rows.
  SoftmaxSums (*softmax_targets)(const SoftmaxArgs&, bool by_weight, int64_t begin, int64_t end);
  // Rows [begin, end); with parts, those of every row one after the other, their statistics are taken as known.
  SoftmaxSums (*softmax_forward)(Softmax, const SoftmaxArgs&, const SoftmaxPart* parts, int64_t begin, int64_t end);
  void (*softmax_backward)(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end);
  // Both at once, for an upstream gradient of 1 and targets in range; false, and nothing done, where it saves nothing.
  // In half types it needs `scratch` for kSoftmaxScratch or a row of floats, whichever is more.
  bool (*softmax_with_grad)(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch, SoftmaxSums*);
  // Part number `part` of a row whose classes lie side by side.
  SoftmaxPart (*softmax_part)(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
  void (*softmax_backward_part)(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
};

using CudaPointwise = int (*)(PointwiseResult, const struct CudaPointwiseArgs&, CUstream_st*);

// A loss that was compiled apart, and its version: that of these structs.
constexpr int64_t kCustomVersion = 1'000'000 + sizeof(PointwiseArgs);
struct CustomPointwise {
  int64_t version;
  PointwiseTraits traits;
  CpuPointwise cpu;
  CudaPointwise cuda;  // null where it has none
};

// The widest instruction set this machine has, or the one FUSEDLOSS_CPU_ISA names; picked once.
// Throws std::invalid_argument where the variable names one that is unknown or that the machine does not have.
const CpuKernels& cpu_kernels();

// The instruction sets compiled in, narrowest first, separated by spaces.
const char* cpu_isas();

// ---- CUDA: the same arguments with device pointers. Every function puts its kernels on the stream and returns a
// cudaError_t; none synchronises or allocates, so that all of them can be captured in a CUDA graph.

using CudaStream = ::CUstream_st*;

// Partial sums of one call, and the counter by which its last block knows that it is the last.
constexpr int64_t kCudaWorkspaceBytes = 72 << 10;

// A target out of range, in pinned host memory: row -1 until a kernel has met one.
struct alignas(16) BadTarget {
  int64_t row, target;
};

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
  BadTarget* bad_target;
};
int cuda_pointwise(Pointwise, PointwiseResult, const CudaPointwiseArgs&, CudaStream);

// The losses of FUSEDLOSS_INDEXED over class indices: input, weight, output and a gradient of its own are of one dtype.
int cuda_indexed(Pointwise, PointwiseResult, const CudaPointwiseArgs&, CudaStream);
int cuda_indexed_divisor(const CudaPointwiseArgs&, CudaStream);

struct CudaSoftmaxArgs : SoftmaxArgs {
  void* total;  // the sum or mean; null for no reduction
  bool mean;
  bool zero_for_none;  // a mean over nothing is 0, not NaN
  void*
      divisor;  // of arithmetic type, what a mean divides by: written by the forward, read wherever gradients are made
  BadTarget* bad_target;
  bool in_place;  // grad is logits
  void* workspace;
};
// Only the divisor, for a forward that makes a mean's gradient in the same pass.
int cuda_softmax_divisor(Softmax, const CudaSoftmaxArgs&, CudaStream);
// With args.grad, also the gradient for an upstream gradient of 1; the divisor is then read, not written.
int cuda_softmax_forward(Softmax, const CudaSoftmaxArgs&, CudaStream);
int cuda_softmax_backward(Softmax, const CudaSoftmaxArgs&, CudaStream);

// Within a row, kernels count in 32 bits, some steps past its end.
constexpr int64_t kCudaMaxClasses = INT32_MAX - (1 << 16);

// Whether this build has code for the current device.
bool cuda_has_kernels();

// data *= *factor, of dtype or its arithmetic type, which is read on the device: at 1 nothing is touched.
int cuda_scale(DType, void* data, int64_t count, const void* factor, bool wide_factor, CudaStream);

}  // namespace fusedloss
