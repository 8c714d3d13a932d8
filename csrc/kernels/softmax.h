// What a softmax loss is given, on any device: one loss per row of logits.
#pragma once

#include "../losses/softmax.h"
#include "common.h"

namespace fusedloss {

#define FUSEDLOSS_ENUMERATOR(name, Functor) name,
enum class Softmax { FUSEDLOSS_SOFTMAX(FUSEDLOSS_ENUMERATOR) };
#undef FUSEDLOSS_ENUMERATOR

#define FUSEDLOSS_COUNT(name, Functor) +1
constexpr int kSoftmaxLosses = FUSEDLOSS_SOFTMAX(FUSEDLOSS_COUNT);
#undef FUSEDLOSS_COUNT

// Row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride; its classes are class_stride apart.
struct SoftmaxLayout {
  int64_t rows, classes, inner;
  int64_t outer_stride, class_stride, inner_stride;
};

FUSEDLOSS_HD int64_t row_offset(const SoftmaxLayout& layout, int64_t row) {
  if (layout.inner == layout.rows) return row * layout.inner_stride;  // a division would cost as much as ten logits
  return row / layout.inner * layout.outer_stride + row % layout.inner * layout.inner_stride;
}

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
  const void* weight;         // [classes] in arithmetic type; null: 1
  const void* sample_weight;  // [rows] in arithmetic type; null: 1. A row of weight 0 is ignored
  int64_t ignore_index;
  double params[kMaxParams];
  void* losses;  // forward: [rows], null where the reduction needs only the sums
  void* second;  // forward: [rows], null where only the loss is wanted; also that of ignored rows
  // [2 to 4, rows] in arithmetic type: max, sum_without_target, and what else the loss's policy saves
  void* statistics;
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

}  // namespace fusedloss
