// What the drivers of both families share.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

template <class Args>
void copy_params(const double* params, Args& args) {
  for (int i = 0; i < fusedloss::kMaxParams; ++i) args.params[i] = params[i];
}

fusedloss::DType dtype_of(int is_double) { return is_double ? fusedloss::DType::Double : fusedloss::DType::Float; }

const double kOneDouble = 1;
const float kOneFloat = 1;

const void* one(bool is_double) { return is_double ? static_cast<const void*>(&kOneDouble) : &kOneFloat; }

// No NaN. Not std::fmax, of whose loop gcc 12 makes no code for aarch64: it ends with an internal error.
double larger(double most, double x) { return x > most ? x : most; }

// Whether one gradient is the other but for what comes of rounding.
template <class T>
bool close(const void* one, const std::vector<double>& other, int64_t count) {
  const T *a = static_cast<const T*>(one), *b = reinterpret_cast<const T*>(other.data());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = larger(largest, std::fabs(double(a[i])));
    difference = larger(difference, std::fabs(double(a[i]) - double(b[i])));
  }
  return difference <= largest * (sizeof(T) == sizeof(double) ? 1e-13 : 1e-5);
}

}  // namespace
