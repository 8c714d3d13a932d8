// The dtype of the result where the operands' dtypes differ, as in torch. Only data, as in range.h.
#pragma once

namespace fusedloss {

enum class ResultDType { Promoted, OfInput, OfTarget, Same };

}  // namespace fusedloss
