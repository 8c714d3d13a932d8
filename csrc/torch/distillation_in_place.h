// The divergence of two rows over the memory of the student's: what a linear loss makes of its chunks of logits.
//
// The kernels read a part of a row before they write the gradient of that part, so both may be the same memory.
#pragma once

#include "distillation.h"
#include "in_place.h"

namespace fusedloss {

constexpr const char* kDistillationInPlace[] = {"kl_divergence_with_grad_", "kl_divergence_backward_"};

void define_distillation_in_place(torch::Library& m);

// What is only read lies elsewhere, or is copied.
inline OptionalTensor apart_from(const Tensor& written, const OptionalTensor& read) {
  return read ? OptionalTensor(apart_from(written, *read)) : read;
}

template <class OnDevice>
void implement_distillation_in_place(torch::Library& m) {
  m.impl("kl_divergence_with_grad_",
         [](Tensor student, const Tensor& teacher, const OptionalTensor& weight, std::string_view direction,
            std::string_view teacher_is, double temperature, double beta) {
           check_overwritten(student, {});
           const DistillationCall call(std::nullopt, apart_from(student, weight), direction, teacher_is, "sum", 0,
                                       temperature, beta, /*wide=*/true, /*with_lse=*/false);
           DistillationInputs inputs(student, apart_from(student, teacher), call);
           inputs.args.grad = inputs.args.student;
           return std::get<0>(run_forward<OnDevice>(inputs, false));
         });
  m.impl("kl_divergence_backward_",
         [](const Tensor& upstream, Tensor student, const Tensor& teacher, const OptionalTensor& weight,
            const Tensor& statistics, std::string_view direction, std::string_view teacher_is, double temperature,
            double beta) {
           check_overwritten(student, {});
           const bool none = upstream.dim() != 0;
           const DistillationCall call(std::nullopt, apart_from(student, weight), direction, teacher_is,
                                       none ? "none" : "sum", 0, temperature, beta, /*wide=*/true, /*with_lse=*/false);
           DistillationInputs inputs(student, apart_from(student, teacher), call);
           const int64_t rows = inputs.rows();
           inputs.check_numbers("an upstream gradient", upstream, none ? at::IntArrayRef(rows) : at::IntArrayRef());
           inputs.check_numbers("statistics", statistics, kSavedOfPair * rows);
           const Tensor saved = apart_from(student, statistics).to(inputs.arithmetic).contiguous();
           inputs.args.grad = inputs.args.student;
           run_backward<OnDevice>(inputs, apart_from(student, upstream), std::nullopt, saved);
         });
}

}  // namespace fusedloss
