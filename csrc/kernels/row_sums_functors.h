// Turns a loss of row sums and its parameters into a functor, and reads what a row has beside its columns, for the
// drivers of both devices.
#pragma once

#include "functors.h"
#include "row_sums.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class Functor, class = void>
constexpr bool takes_labels = false;
template <class Functor>
constexpr bool takes_labels<Functor, std::enable_if_t<Functor::takes_labels>> = true;

template <class Functor, class = void>
constexpr bool takes_class = false;
template <class Functor>
constexpr bool takes_class<Functor, std::enable_if_t<Functor::takes_class>> = true;

// A functor of several forms, which its parameters choose between.
template <class Functor, class = void>
constexpr bool has_forms = false;
template <class Functor>
constexpr bool has_forms<Functor, std::void_t<decltype(Functor::whole)>> = true;

template <class Functor>
constexpr RowSumsTraits row_sums_traits() {
  int whole = -1;
  if constexpr (has_forms<Functor>) whole = Functor::whole;
  return {Functor::operands,       takes_labels<Functor>,  takes_class<Functor>,
          Params<Functor>::ranges, Params<Functor>::count, whole};
}

// Calls f with the functor in the arithmetic type T.
template <class T, class F>
auto with_row_sums(RowSums loss, const double* params, F f) {
  switch (loss) {
#define FUSEDLOSS_CASE(name, Functor)          \
  case RowSums::name:                          \
    if constexpr (has_forms<Functor<T>>) {     \
      return Functor<T>::with_form(params, f); \
    } else {                                   \
      return f(Functor<T>(params));            \
    }
    FUSEDLOSS_ROW_SUMS(FUSEDLOSS_CASE)
#undef FUSEDLOSS_CASE
  }
  __builtin_unreachable();
}

template <class S>
FUSEDLOSS_HD int sign_if_one(const void* labels, int64_t row) {
  const auto label = static_cast<const S*>(labels)[row];
  if constexpr (std::is_integral_v<S>)
    return label == 1 ? 1 : label == -1 ? -1 : 0;
  else
    return load(label) == 1 ? 1 : load(label) == -1 ? -1 : 0;
}

// 1 or -1 for these labels, 0 for any other.
FUSEDLOSS_HD int label_of(const RowSumsArgs& args, int64_t row) {
  switch (args.label_type) {
    case LabelType::Long:
      return sign_if_one<int64_t>(args.target, row);
    case LabelType::Int:
      return sign_if_one<int32_t>(args.target, row);
    case LabelType::Short:
      return sign_if_one<int16_t>(args.target, row);
    case LabelType::Char:
      return sign_if_one<int8_t>(args.target, row);
    case LabelType::Double:
      return sign_if_one<double>(args.target, row);
    case LabelType::BFloat16:
      return sign_if_one<bf16>(args.target, row);
    case LabelType::Half:
      return sign_if_one<fp16>(args.target, row);
    default:
      return sign_if_one<float>(args.target, row);
  }
}

// Number i of an array of any dtype.
template <class T>
FUSEDLOSS_HD T number_of(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::Double:
      return T(static_cast<const double*>(from)[i]);
    case DType::BFloat16:
      return T(load(static_cast<const bf16*>(from)[i]));
    case DType::Half:
      return T(load(static_cast<const fp16*>(from)[i]));
    default:
      return T(static_cast<const float*>(from)[i]);
  }
}
template <class T>
FUSEDLOSS_HD void set_number_of(void* to, DType dtype, int64_t i, T number) {
  switch (dtype) {
    case DType::Double:
      static_cast<double*>(to)[i] = double(number);
      break;
    case DType::BFloat16:
      static_cast<bf16*>(to)[i] = store<bf16>(float(number));
      break;
    case DType::Half:
      static_cast<fp16*>(to)[i] = store<fp16>(float(number));
      break;
    default:
      static_cast<float*>(to)[i] = float(number);
  }
}

template <class T>
FUSEDLOSS_HD T weight_of_class(const RowSumsArgs& args, int64_t target) {
  const T weight = args.weight ? static_cast<const T*>(args.weight)[target] : T(1);
  return weight / T(args.columns);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
