// What a divergence of two rows is given, on any device: one value per row of student's and teacher's numbers.
#pragma once

#include "../losses/distillation.h"
#include "common.h"

namespace fusedloss {

enum class Divergence { Forward, Reverse, JensenShannon };
enum class TeacherIs { Logits, LogProbs, Probs };

constexpr int kSavedOfPair = 5;  // numbers of a row that backward reads: those of a PairRow but the value

// Numbers of [rows, classes].
struct RowsOperand {
  const void* data;
  DType dtype;
  int64_t row_stride, class_stride;
};

// Everything but the operands and the gradient is of the arithmetic type.
struct DistillationArgs {
  DType arithmetic;
  int64_t rows, classes;
  RowsOperand student, teacher;
  Divergence divergence;
  TeacherIs teacher_is;  // log-probabilities and probabilities are read as they are, logits over the temperature
  double temperature, beta;
  const int64_t* labels;  // [rows]; null: every row counts
  int64_t ignore_index;
  const void* weight;  // [rows]; null: 1. A row of weight 0 is ignored
  void* losses;        // forward: [rows]
  void* lse;           // forward: [rows], of ignored rows too; null where it is not wanted
  void* statistics;    // [kSavedOfPair, rows]
  // Backward. A null grad in forward is not made; otherwise for an upstream gradient of 1. Strides are 0 where one
  // value serves all rows. A null upstream is 1, a null upstream_lse 0.
  RowsOperand grad;
  const void* upstream;
  int64_t upstream_stride;
  const void* upstream_lse;
  int64_t upstream_lse_stride;
  double scale;         // 1 / what a mean divides by, or what is left of it where divisor is given
  const void* divisor;  // CUDA: one number that the host does not know; null: 1
};

// CPU: what a forward keeps of a row for its gradient, two exponentials of every class, in whole blocks, and two maxes
// of every block.
constexpr int64_t kPairBlock = 1024;
constexpr int64_t distillation_scratch(int64_t classes) {
  return (classes + kPairBlock - 1) / kPairBlock * (2 * kPairBlock + 2);
}

// The weight of a row, 0 where it is ignored.
template <class T>
FUSEDLOSS_HD T weight_of_row(const DistillationArgs& args, int64_t row) {
  if (args.labels && args.labels[row] == args.ignore_index) return T(0);
  return args.weight ? static_cast<const T*>(args.weight)[row] : T(1);
}

}  // namespace fusedloss
