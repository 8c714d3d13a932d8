#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define FUSEDLOSS_ISA baseline
#include "isa.inl"
