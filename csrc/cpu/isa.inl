// One instruction set's table of kernels.

#include "../kernels/cpu.h"
#include "pointwise.inl"
#include "one_hot.inl"
#include "pointwise_tiles.inl"
#include "row_sums.inl"

#define FUSEDLOSS_STRING_(x) #x
#define FUSEDLOSS_STRING(x) FUSEDLOSS_STRING_(x)

namespace fusedloss::FUSEDLOSS_ISA {

// In files of their own, which compile side by side.
SoftmaxSums softmax_targets(const SoftmaxArgs&, bool by_weight, int64_t begin, int64_t end);
SoftmaxSums softmax_forward(Softmax, const SoftmaxArgs&, const SoftmaxPart*, int64_t begin, int64_t end);
bool softmax_with_grad(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch, SoftmaxSums*);
SoftmaxPart softmax_part(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
void softmax_backward(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end);
void softmax_backward_part(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
double distillation_forward(const DistillationArgs&, int64_t begin, int64_t end, void* scratch);
void distillation_backward(const DistillationArgs&, int64_t begin, int64_t end);

#define FUSEDLOSS_KERNEL(name, Functor) pointwise<Functor>,
extern const CpuKernels kernels;
const CpuKernels kernels = {FUSEDLOSS_STRING(FUSEDLOSS_ISA),
                            {FUSEDLOSS_POINTWISE(FUSEDLOSS_KERNEL)},
                            softmax_targets,
                            softmax_forward,
                            softmax_backward,
                            softmax_with_grad,
                            softmax_part,
                            softmax_backward_part,
                            row_sums,
                            distillation_forward,
                            distillation_backward};
#undef FUSEDLOSS_KERNEL

}  // namespace fusedloss::FUSEDLOSS_ISA
