#include "../distillation_in_place.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace fusedloss {
namespace {

constexpr int64_t kNumbersOfChunk = 32768;  // summed on their own: part of the result, not of the machine

int64_t rows_of_chunk(const DistillationArgs& args) {
  return std::max<int64_t>(1, kNumbersOfChunk / std::max<int64_t>(1, 2 * args.classes));
}

// Calls f(number of chunk, first row, last row).
template <class F>
void over_row_chunks(const DistillationArgs& args, F f) {
  const int64_t rows = rows_of_chunk(args), chunks = (args.rows + rows - 1) / rows;
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i * rows, std::min(args.rows, (i + 1) * rows));
  });
}

// The weights of the rows that count.
double weight_of_rows(const DistillationArgs& args) {
  if (!args.labels && !args.weight) return double(args.rows);
  double total = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    total += args.arithmetic == DType::Double ? weight_of_row<double>(args, row) : weight_of_row<float>(args, row);
  }
  return total;
}

// 8 KB for a block of a row's classes in float; none where there is no use for it.
Scratch scratch_for(const DistillationArgs& args) {
  if (!args.grad.data || args.divergence != Divergence::Forward) return Scratch(0);
  const size_t bytes = args.arithmetic == DType::Double ? sizeof(double) : sizeof(float);
  return Scratch(size_t(distillation_scratch(args.classes)) * bytes);
}

struct CpuDistillation {
  static void set_scale(DistillationArgs& args, const DistillationInputs& inputs) {
    const double of_row = inputs.divisor_of_row();
    args.scale = of_row > 0 ? 1 / (of_row * weight_of_rows(args)) : 1;
  }

  static void forward(DistillationArgs& args, const DistillationInputs& inputs, const Tensor&, Tensor& loss) {
    set_scale(args, inputs);
    const int64_t rows = rows_of_chunk(args);
    std::vector<double> partial((args.rows + rows - 1) / rows);
    const Scratch scratch = scratch_for(args);
    over_row_chunks(args, [&](int64_t i, int64_t begin, int64_t end) {
      partial[i] = cpu_kernels().distillation_forward(args, begin, end, scratch.get());
    });
    double sum = 0;
    for (const double part : partial) sum += part;
    if (loss.defined()) set_number(loss, 0, sum * args.scale);
  }

  static void backward(DistillationArgs& args, const DistillationInputs& inputs) {
    set_scale(args, inputs);
    over_row_chunks(
        args, [&](int64_t, int64_t begin, int64_t end) { cpu_kernels().distillation_backward(args, begin, end); });
  }
};

}  // namespace

void implement_distillation_on_cpu(torch::Library& m) {
  implement_distillation<CpuDistillation>(m);
  implement_distillation_in_place<CpuDistillation>(m);
}

}  // namespace fusedloss
