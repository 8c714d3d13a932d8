#include "distillation_in_place.h"

namespace fusedloss {

void define_distillation_in_place(torch::Library& m) {
  const std::string call = "str direction, str teacher_is, float temperature, float beta";
  m.def(
      ("kl_divergence_with_grad_(Tensor(a!) student, Tensor teacher, Tensor? weight, " + call + ") -> Tensor").c_str());
  m.def(("kl_divergence_backward_(Tensor upstream, Tensor(a!) student, Tensor teacher, Tensor? weight, "
         "Tensor statistics, " +
         call + ") -> ()")
            .c_str());
}

}  // namespace fusedloss
