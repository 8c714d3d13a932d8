// The CPU kernels of one instruction set without torch, for sanitizers: in threads of the standard library, because
// ThreadSanitizer does not know how OpenMP's wait for each other, and over memory of exactly the size that is given.
//
// threads_driver [race | overrun]: with a mistake, which they have to report.
#include "cpu/isa/baseline_backward.cpp"
#include "cpu/isa/baseline_distillation.cpp"
#include "cpu/isa/baseline_forward.cpp"
#include "cpu/isa/baseline_with_grad.cpp"
#include "cpu/isa.inl"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#undef __x86_64__  // which leaves one instruction set to pick
#include "cpu/dispatch.cpp"

using namespace fusedloss;

namespace {

constexpr int kThreads = 3;
int64_t planted_race = 0, planted_overrun = 0;

int64_t chunk_count(int64_t count, int64_t chunk) { return (count + chunk - 1) / chunk; }

// Calls f(number of chunk, begin, end) over [0, count) as torch's parallel_for does, a run of chunks to each thread.
void in_threads(int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t, int64_t)>& f) {
  const int64_t chunks = chunk_count(count, chunk), share = chunk_count(chunks, kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < chunks; first += share) {
    threads.emplace_back([=, &f] {
      for (int64_t i = first; i < std::min(chunks, first + share); ++i)
        f(i, i * chunk, std::min(count, (i + 1) * chunk + planted_race));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Memory of exactly so many numbers of the type.
struct Memory {
  std::unique_ptr<char[]> bytes;
  DType dtype;

  Memory(int64_t count, DType dtype) : bytes(new char[size_t(count * size_of(dtype))]), dtype(dtype) {
    for (int64_t i = 0; i < count; ++i) set(i, double(i * 37 % 101) / 50 - 1);
  }
  static int64_t size_of(DType dtype) { return dtype == DType::Double ? 8 : dtype == DType::Float ? 4 : 2; }
  void set(int64_t i, double value) {
    const float narrow = float(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint16_t half = uint16_t(bits >> 16);
    if (dtype == DType::Double) std::memcpy(bytes.get() + 8 * i, &value, 8);
    if (dtype == DType::Float) std::memcpy(bytes.get() + 4 * i, &narrow, 4);
    if (dtype == DType::BFloat16) std::memcpy(bytes.get() + 2 * i, &half, 2);
  }
  void* data() { return bytes.get(); }
};

// How many numbers of memory a layout reaches over.
int64_t extent(const SoftmaxLayout& l) { return row_offset(l, l.rows - 1) + (l.classes - 1) * l.class_stride + 1; }

void softmax(Softmax loss, DType dtype, const SoftmaxLayout& layout, bool in_place) {
  const DType arithmetic = dtype == DType::Double ? DType::Double : DType::Float;
  const int64_t rows = layout.rows, chunk = softmax_chunk(layout);
  Memory logits(extent(layout) - planted_overrun, dtype), grad(extent(layout), dtype), losses(rows, dtype);
  Memory statistics(4 * rows, arithmetic), weight(layout.classes, arithmetic), upstream(rows, dtype);
  std::vector<int64_t> target(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) target[size_t(row)] = row % 5 == 4 ? -100 : row * 7 % layout.classes;
  SoftmaxArgs args = {};
  args.dtype = dtype;
  args.logits_layout = args.probabilities_layout = args.grad_layout = layout;
  args.logits = logits.data();
  Memory probabilities(extent(layout), dtype);
  if (loss == Softmax::soft_cross_entropy) {
    args.probabilities = probabilities.data();
  } else {
    args.target = target.data();
  }
  args.weight = weight.data();
  args.ignore_index = -100;
  args.params[0] = loss == Softmax::cross_entropy ? 0.1 : 1;
  args.losses = losses.data();
  args.statistics = statistics.data();
  args.scale = 1;
  const CpuKernels& kernels = baseline::kernels;
  std::vector<SoftmaxSums> sums(size_t(chunk_count(rows, chunk)));
  in_threads(rows, chunk, [&](int64_t i, int64_t begin, int64_t end) {
    sums[size_t(i)] = kernels.softmax_targets(args, true, begin, end);
    sums[size_t(i)] = kernels.softmax_forward(loss, args, nullptr, begin, end);
  });
  args.grad = in_place ? logits.data() : grad.data();
  const int64_t scratch = softmax_scratch(layout.classes);
  in_threads(rows, chunk, [&](int64_t i, int64_t begin, int64_t end) {
    std::vector<float> of_thread(static_cast<size_t>(scratch));
    kernels.softmax_with_grad(loss, args, begin, end, of_thread.data(), &sums[size_t(i)]);
  });
  args.upstream = upstream.data();
  args.upstream_stride = 1;
  in_threads(rows, chunk,
             [&](int64_t, int64_t begin, int64_t end) { kernels.softmax_backward(loss, args, begin, end); });
  if (layout.class_stride != 1 || in_place || loss == Softmax::nll) return;
  const int64_t of_row = chunk_count(layout.classes, kSoftmaxPart);
  std::vector<SoftmaxPart> parts(size_t(rows * of_row));
  in_threads(rows * of_row, 1, [&](int64_t i, int64_t, int64_t) {
    parts[size_t(i)] = kernels.softmax_part(loss, args, i / of_row, i % of_row);
  });
  kernels.softmax_forward(loss, args, parts.data(), 0, rows);
  in_threads(rows * of_row, 1,
             [&](int64_t i, int64_t, int64_t) { kernels.softmax_backward_part(loss, args, i / of_row, i % of_row); });
}

// Rows of `columns`; a stride of 2 between the numbers of the input, where it is not dense.
void pointwise(CpuPointwise kernel, DType dtype, int64_t rows, int64_t columns, bool dense) {
  const DType arithmetic = dtype == DType::Double ? DType::Double : DType::Float;
  const int64_t count = rows * columns, step = dense ? 1 : 2;
  Memory input((count - 1) * step + 1 - planted_overrun, dtype), target(count, dtype), weight(columns, arithmetic);
  Memory output(count, dtype), upstream(count, dtype);
  PointwiseArgs args = {};
  args.arithmetic = arithmetic;
  args.output_dtype = dtype;
  args.dims = 2;
  args.sizes[0] = columns;
  args.sizes[1] = rows;
  args.input = {input.data(), dtype, dense, {step, step * columns}};
  args.target = {target.data(), dtype, true, {1, columns}};
  args.weight = {weight.data(), arithmetic, false, {1, 0}};
  args.scale = 1;
  args.output = output.data();
  constexpr int64_t kChunk = 4099;  // no multiple of a vector or a tile
  std::vector<double> sums(size_t(chunk_count(count, kChunk)));
  for (const PointwiseResult result : {PointwiseResult::Losses, PointwiseResult::Sum, PointwiseResult::SumAndGrad,
                                       PointwiseResult::Grad, PointwiseResult::CheckDomain}) {
    if (result == PointwiseResult::Grad) args.upstream = {upstream.data(), dtype, true, {1, columns}};
    in_threads(count, kChunk,
               [&](int64_t i, int64_t begin, int64_t end) { sums[size_t(i)] = kernel(result, args, begin, end); });
  }
}

void indexed(CpuPointwise kernel, DType dtype, int64_t outer, int64_t classes, int64_t inner) {
  const int64_t count = outer * classes * inner;
  Memory input(count, dtype), output(count, dtype);
  std::vector<int64_t> index(size_t(outer * inner));
  for (int64_t row = 0; row < outer * inner; ++row) index[size_t(row)] = row % 5 == 4 ? -100 : row % (classes + 1);
  PointwiseArgs args = {};
  args.arithmetic = dtype == DType::Double ? DType::Double : DType::Float;
  args.output_dtype = dtype;
  args.dims = 3;
  args.sizes[0] = inner;
  args.sizes[1] = classes;
  args.sizes[2] = outer;
  args.input = {input.data(), dtype, true, {1, inner, classes * inner}};
  args.index = index.data();
  args.ignore_index = -100;
  args.params[0] = 0.25;
  args.params[1] = 2;
  args.scale = 1;
  args.output = output.data();
  for (const PointwiseResult result : {PointwiseResult::Losses, PointwiseResult::SumAndGrad}) {
    in_threads(count, 1031, [&](int64_t, int64_t begin, int64_t end) { kernel(result, args, begin, end); });
  }
}

void row_sums(RowSums loss, DType dtype, int64_t rows, int64_t columns) {
  Memory first(rows * columns, dtype), second(rows * columns, dtype), third(rows * columns, dtype);
  Memory labels(rows, dtype), losses(rows, dtype), upstream(rows, dtype);
  Memory grads[kMostOperands] = {{rows * columns, dtype}, {rows * columns, dtype}, {rows * columns, dtype}};
  std::vector<int64_t> classes(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) classes[size_t(row)] = row % columns;
  RowSumsArgs args = {};
  args.dtype = args.result_dtype = dtype;
  args.rows = rows;
  args.columns = columns;
  void* const operands[] = {first.data(), second.data(), third.data()};
  for (int k = 0; k < kMostOperands; ++k) {
    args.operands[k] = operands[k];
    args.row_strides[k] = columns;
    args.grads[k] = grads[k].data();
  }
  const bool of_class = loss == RowSums::multi_margin;
  args.target = of_class ? static_cast<void*>(classes.data()) : labels.data();
  args.label_type = of_class                   ? LabelType::Long
                    : dtype == DType::Double   ? LabelType::Double
                    : dtype == DType::BFloat16 ? LabelType::BFloat16
                                               : LabelType::Float;
  args.params[0] = args.params[1] = 1;
  args.losses = losses.data();
  args.upstream = upstream.data();
  args.upstream_stride = 1;
  args.scale = 1;
  for (const bool backward : {false, true}) {
    in_threads(rows, 7, [&](int64_t, int64_t begin, int64_t end) {
      baseline::kernels.row_sums(loss, backward, args, begin, end);
    });
  }
}

void distillation(Divergence divergence, DType dtype, int64_t rows, int64_t classes, bool in_place) {
  const DType arithmetic = dtype == DType::Double ? DType::Double : DType::Float;
  Memory student(rows * classes, dtype), teacher(rows * classes, dtype), grad(rows * classes, dtype);
  Memory losses(rows, arithmetic), statistics(kSavedOfPair * rows, arithmetic), upstream(rows, arithmetic);
  const auto operand = [&](Memory& memory) { return RowsOperand{memory.data(), dtype, classes, 1}; };
  DistillationArgs args = {};
  args.arithmetic = arithmetic;
  args.rows = rows;
  args.classes = classes;
  args.student = operand(student);
  args.teacher = operand(teacher);
  args.divergence = divergence;
  args.temperature = 2;
  args.beta = 0.5;
  args.losses = losses.data();
  args.statistics = statistics.data();
  args.grad = operand(in_place ? student : grad);
  args.scale = 1;
  in_threads(rows, 3, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<double> scratch(size_t(distillation_scratch(classes)));
    baseline::kernels.distillation_forward(args, begin, end,
                                           divergence == Divergence::Forward ? scratch.data() : nullptr);
  });
  args.upstream = upstream.data();
  args.upstream_stride = 1;
  in_threads(rows, 3,
             [&](int64_t, int64_t begin, int64_t end) { baseline::kernels.distillation_backward(args, begin, end); });
}

// Also of numbers for which a loss computes one and does not select it.
template <class T>
void logarithms() {
  for (const T x : {T(-0.0), T(0), T(-1e-3), T(-1), T(-1e30), T(1e-42), T(INFINITY), T(-INFINITY), T(NAN)}) {
    volatile T result = baseline::log(x);
    result = baseline::functions::log(x);
    static_cast<void>(result);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mistake = count > 1 ? arguments[1] : "";
  planted_race = mistake == "race";
  planted_overrun = mistake == "overrun";
  logarithms<float>();
  logarithms<double>();
  for (const DType dtype : {DType::Float, DType::BFloat16}) {
    for (int loss = 0; loss < kSoftmaxLosses; ++loss) {
      for (const bool in_place : {false, true}) {
        softmax(Softmax(loss), dtype, {1500, 37, 1500, 0, 1, 37}, in_place);            // rows
        softmax(Softmax(loss), dtype, {1500, 37, 1500, 0, 1, 41}, in_place);            // padded ones
        softmax(Softmax(loss), dtype, {6, 70001, 6, 0, 1, 70001}, in_place);            // long ones
        softmax(Softmax(loss), dtype, {3 * 701, 37, 701, 701 * 37, 701, 1}, in_place);  // columns
        softmax(Softmax(loss), dtype, {601, 37, 601, 0, 601, 1}, in_place);             // of a matrix
      }
    }
    for (const CpuPointwise kernel : baseline::kernels.pointwise) {
      pointwise(kernel, dtype, 301, 67, true);
      pointwise(kernel, dtype, 301, 67, false);
    }
    indexed(baseline::kernels.pointwise[0], dtype, 3, 21, 101);
    indexed(baseline::kernels.pointwise[0], dtype, 301, 21, 1);
    for (int loss = 0; loss < kRowSumsLosses; ++loss) row_sums(RowSums(loss), dtype, 101, 67);
    for (const Divergence divergence : {Divergence::Forward, Divergence::Reverse, Divergence::JensenShannon}) {
      for (const bool in_place : {false, true}) distillation(divergence, dtype, 20, 2100, in_place);
    }
  }
  std::puts("done");
}
