// The CPU kernels: one table of entry points for each instruction set.
#pragma once

#include "pointwise.h"
#include "row_sums.h"
#include "softmax.h"

namespace fusedloss {

struct DistillationArgs;  // distillation.h

// A pass over elements [begin, end); returns the sum, or which operand lies outside.
using CpuPointwise = double (*)(PointwiseResult, const PointwiseArgs&, int64_t begin, int64_t end);

// How many rows are summed on their own: part of the result, so chosen from the shape alone.
int64_t softmax_chunk(const SoftmaxLayout& layout);

struct SoftmaxSums {
  double loss, weight;  // weight: the divisor of a mean
  int64_t bad_row;      // the first row whose target is out of range, or -1
};

// Where rows are few and long, each is cut into parts of kSoftmaxPart classes, whose statistics are collected apart.
constexpr int64_t kSoftmaxPart = 16384;
struct SoftmaxPart {
  double max, sum_without_target, sum, mass;
};

// Floats that softmax_with_grad keeps of a half type: 128 KB, or a row in whole lines of 128 bytes. Static, so that no
// instruction set's code becomes the one copy of all.
constexpr int64_t kSoftmaxScratch = 32768;
static constexpr int64_t softmax_kept(int64_t classes) { return (classes + 31) / 32 * 32; }
static constexpr int64_t softmax_scratch(int64_t classes) {
  return kSoftmaxScratch > softmax_kept(classes) ? kSoftmaxScratch : softmax_kept(classes);
}

struct RowSumsTotal {
  double loss;
  int64_t bad_row;  // the first row whose class is out of range, or -1
};

// Every function works on a range, so that the caller may split the work over threads: the ranges are chosen from the
// shape alone, and their sums are added in order, which makes the result independent of the thread count.
struct CpuKernels {
  const char* isa;
  CpuPointwise pointwise[kPointwiseLosses];
  // Reads only the targets, and returns a bad row and the divisor of a mean over weights or rows.
  SoftmaxSums (*softmax_targets)(const SoftmaxArgs&, bool by_weight, int64_t begin, int64_t end);
  // Rows [begin, end). Where `parts` is given (those of row 0, then of row 1, ...) it holds the statistics already.
  SoftmaxSums (*softmax_forward)(Softmax, const SoftmaxArgs&, const SoftmaxPart* parts, int64_t begin, int64_t end);
  void (*softmax_backward)(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end);
  // Forward and backward at once, for an upstream gradient of 1 and targets in range; where that would save nothing it
  // does nothing and returns false. In half types `scratch` holds
  // softmax_scratch(classes) floats, from a multiple of 64 bytes on.
  bool (*softmax_with_grad)(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch, SoftmaxSums*);
  // Part number `part` of a row whose classes lie side by side.
  SoftmaxPart (*softmax_part)(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
  void (*softmax_backward_part)(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
  // Rows [begin, end), up to a bad one: their losses, or the gradients of the operands.
  RowSumsTotal (*row_sums)(RowSums, bool backward, const RowSumsArgs&, int64_t begin, int64_t end);
  // Rows [begin, end): their losses, whose sum it returns, and in forward the gradient too where there is a grad.
  // `scratch` is null, or has room for distillation_scratch(classes) numbers of the arithmetic type.
  double (*distillation_forward)(const DistillationArgs&, int64_t begin, int64_t end, void* scratch);
  void (*distillation_backward)(const DistillationArgs&, int64_t begin, int64_t end);
};

// The widest instruction set this machine has, or the one FUSEDLOSS_CPU_ISA names; picked once.
// Throws std::invalid_argument where the variable names one that is unknown or that the machine does not have.
const CpuKernels& cpu_kernels();

// The instruction sets compiled in, narrowest first, separated by spaces.
const char* cpu_isas();

}  // namespace fusedloss
