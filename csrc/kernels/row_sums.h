// What a loss of row sums is given, on any device: one loss for each row of one, two or three operands.
#pragma once

#include "../losses/row_sums.h"
#include "common.h"

namespace fusedloss {

#define FUSEDLOSS_ENUMERATOR(name, Functor) name,
enum class RowSums { FUSEDLOSS_ROW_SUMS(FUSEDLOSS_ENUMERATOR) };
#undef FUSEDLOSS_ENUMERATOR

#define FUSEDLOSS_COUNT(name, Functor) +1
constexpr int kRowSumsLosses = FUSEDLOSS_ROW_SUMS(FUSEDLOSS_COUNT);
#undef FUSEDLOSS_COUNT

constexpr int kMostOperands = 3;

// The dtype of the labels of rows. Class indices are int64.
enum class LabelType { Long, Int, Short, Char, Float, Double, BFloat16, Half };

struct RowSumsArgs {
  DType dtype;         // of the operands and their gradients
  DType result_dtype;  // of losses and upstream gradients: dtype, or its arithmetic type
  int64_t rows, columns;
  const void* operands[kMostOperands];
  int64_t row_strides[kMostOperands];  // the columns of a row lie side by side
  const void* target;                  // [rows] labels or class indices; null where the loss takes none
  LabelType label_type;
  const void* weight;  // [columns] in arithmetic type, of the classes; null: 1
  double params[kMaxParams];
  void* losses;  // forward: [rows], null where only the sum is wanted
  // Backward.
  void* grads[kMostOperands];  // [rows, columns], dense; null where not wanted
  const void* upstream;
  int64_t upstream_stride;  // 0 where one value serves all rows
  double scale;             // 1 / rows for a mean
};

// What holds for a loss whatever its parameters.
struct RowSumsTraits {
  int operands;
  bool takes_labels, takes_class;
  const Range* params;
  int param_count;
  int whole;  // the parameter that is a whole number, a norm; -1: none
};

}  // namespace fusedloss
