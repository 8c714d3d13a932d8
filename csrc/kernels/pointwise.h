// What a pointwise loss is given and what it makes, on any device.
#pragma once

#include "../losses/pointwise.h"
#include "common.h"

namespace fusedloss {

#define FUSEDLOSS_ENUMERATOR(name, Functor) name,
enum class Pointwise { FUSEDLOSS_POINTWISE(FUSEDLOSS_ENUMERATOR) };
#undef FUSEDLOSS_ENUMERATOR

#define FUSEDLOSS_COUNT(name, Functor) +1
constexpr int kPointwiseLosses = FUSEDLOSS_POINTWISE(FUSEDLOSS_COUNT);
#undef FUSEDLOSS_COUNT

constexpr int kMaxDims = 6;

// One tensor that is read at every element. Where data is null it counts as 1 everywhere.
struct Operand {
  const void* data;
  DType dtype;
  bool dense;  // side by side in the order of the elements
  int64_t strides[kMaxDims];
};

// The arguments of one loss per element. The elements are numbered in the order in which the output lies in memory;
// dimensions are given innermost first.
struct PointwiseArgs {
  DType arithmetic;  // Float or Double
  Operand input, target;
  Operand weight;    // a factor of the loss
  Operand third;     // what the loss reads beside x and t: a factor of its term for a target of 1, a variance
  Operand upstream;  // gradient only; of one value where `one_upstream`
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

// What a pass over the elements makes; SumAndGrad for an upstream gradient of 1. CheckDomain tells which
// operand has a value for which the loss is not defined: 3 the third one, 2 the input, 1 the target, 0 none.
enum class PointwiseResult { Losses, Sum, SumAndGrad, Grad, TargetGrad, ThirdGrad, CheckDomain };

// What holds for a loss whatever its parameters.
struct PointwiseTraits {
  bool of_difference, has_target_slope, has_positive_weight, of_probabilities, takes_class_indices;
  bool broadcasts, takes_integers, target_first;
  bool has_third_slope;  // reads a third operand, to which it has a gradient; of a difference in x and t
  bool of_variances;     // the third operand: torch refuses a negative one
  ResultDType result;
  const Range* params;
  int param_count;
};

}  // namespace fusedloss
