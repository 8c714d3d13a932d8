// The pointwise losses of the list.
#include "pointwise.cuh"

namespace fusedloss {

int cuda_pointwise(Pointwise loss, PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
#define FUSEDLOSS_CASE(name, Functor) \
  case Pointwise::name:               \
    return FUSEDLOSS_ISA::run_pointwise<FUSEDLOSS_ISA::Functor>(result, args, stream);
  switch (loss) { FUSEDLOSS_POINTWISE(FUSEDLOSS_CASE) }
#undef FUSEDLOSS_CASE
  return cudaErrorInvalidValue;
}

}  // namespace fusedloss
