#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FUSEDLOSS_ISA baseline
#include "../distillation.inl"
