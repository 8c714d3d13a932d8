// The kernels of row sums of one instruction set without torch, as pointwise_driver.cpp.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FUSEDLOSS_ISA baseline
#include "kernels/cpu.h"
#include "cpu/pointwise.inl"
#include "cpu/one_hot.inl"
#include "cpu/pointwise_tiles.inl"
#include "cpu/row_sums.inl"
#include "kernel_driver.h"

// Operands (rows, columns) whose rows are `stride` apart, dtype as in kernels/common.h; labels of the operands' dtype,
// or classes. Losses and gradients are of the dtype too. Returns the sum of the losses.
extern "C" double run_row_sums(int loss, int dtype, int64_t rows, int64_t columns, int64_t stride,
                               const void* const* operands, const void* target, const void* weight,
                               const double* params, const void* upstream, void* losses, void* const* grads) {
  fusedloss::RowSumsArgs args = {};
  copy_params(params, args);
  args.dtype = args.result_dtype = fusedloss::DType(dtype);
  args.label_type = dtype == 1   ? fusedloss::LabelType::Double
                    : dtype == 0 ? fusedloss::LabelType::Float
                    : dtype == 2 ? fusedloss::LabelType::BFloat16
                                 : fusedloss::LabelType::Half;
  args.rows = rows;
  args.columns = columns;
  for (int k = 0; k < fusedloss::kMostOperands; ++k) {
    args.operands[k] = operands[k];
    args.row_strides[k] = stride;
    args.grads[k] = grads[k];
  }
  args.target = target;
  args.weight = weight;
  args.upstream = upstream;
  args.upstream_stride = 1;
  args.scale = 1;
  args.losses = losses;
  const auto kind = fusedloss::RowSums(loss);
  const fusedloss::RowSumsTotal total = fusedloss::baseline::row_sums(kind, false, args, 0, rows);
  fusedloss::baseline::row_sums(kind, true, args, 0, rows);
  return total.loss;
}
