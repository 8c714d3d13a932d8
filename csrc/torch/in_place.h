// torch's rules for an op that overwrites a tensor, which its code generator writes for torch's own ops.
#pragma once

#include <torch/library.h>

#include <initializer_list>
#include <string>

namespace fusedloss {

using at::Tensor;

// For the raw op of that name, which has no derivative: no leaf that requires a gradient is overwritten.
void refuse_derivatives_in_place(torch::Library& under_autograd, const std::string& name);
// Its version counter counts the change.
void count_changes(torch::Library& under_version_counter, const std::string& name);
// No negated view is overwritten. What is only read may be one.
void refuse_negated_views(torch::Library& under_negation, const std::string& name);

// torch's errors for a tensor that overlaps itself or what a kernel reads while it overwrites the tensor.
void check_overwritten(const Tensor& written, std::initializer_list<const Tensor*> read);
// The tensor, or a copy of one that may share memory with the tensor that is overwritten.
Tensor apart_from(const Tensor& written, const Tensor& read);

}  // namespace fusedloss
