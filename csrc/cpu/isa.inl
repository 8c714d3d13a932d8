// One instruction set's table of kernels. The including file has included the standard headers, set the target and
// named FUSEDLOSS_ISA: whatever is compiled from here on stays in that namespace.

#include "../with_functor.h"
#include "pointwise.inl"
#include "pointwise_indexed.inl"
#include "softmax.inl"

#define FUSEDLOSS_STRING_(x) #x
#define FUSEDLOSS_STRING(x) FUSEDLOSS_STRING_(x)

namespace fusedloss::FUSEDLOSS_ISA {

extern const CpuKernels kernels;
const CpuKernels kernels = {FUSEDLOSS_STRING(FUSEDLOSS_ISA),
                            pointwise_sum,
                            pointwise_losses,
                            pointwise_grad,
                            indexed,
                            softmax_forward,
                            softmax_backward};

}  // namespace fusedloss::FUSEDLOSS_ISA
