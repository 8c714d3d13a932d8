// The driver of losses that are known by sums over a row. A row is read once for its sums; for a gradient it is read
// again, from the first-level cache unless it is very long, and the gradients of all operands are written together.

#include "../kernels/row_sums_functors.h"

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int64_t kRowBlock = 512;  // columns, within which sums are of the arithmetic type: 2 kB of each float operand

// A block of a row's columns in the arithmetic type, read in place or converted.
template <class T, int kOperands>
class RowBlock {
 public:
  RowBlock(const RowSumsArgs& args, int64_t row) : args_(args), row_(row) {}

  void read(int64_t begin, int64_t count) {
    with_storage(args_.dtype, [&](auto storage) {
      using S = decltype(storage);
      for (int k = 0; k < kOperands; ++k) {
        const S* from = static_cast<const S*>(args_.operands[k]) + row_ * args_.row_strides[k] + begin;
        if constexpr (std::is_same_v<S, T>) {
          x[k] = from;
        } else if constexpr (std::is_same_v<Accumulate<S>, T>) {
          widen(from, count, buffer_[k]);
          x[k] = buffer_[k];
        }
      }
    });
  }

  const T* x[kOperands];

 private:
  const RowSumsArgs& args_;
  int64_t row_;
  T buffer_[kOperands][kRowBlock];
};

// Where the gradients of a block go: in place, or into a buffer that is then converted. One that is not wanted goes
// into a buffer too.
template <class T, int kOperands>
class RowGradients {
 public:
  RowGradients(const RowSumsArgs& args, int64_t row) : args_(args), row_(row) {}

  void begin(int64_t begin) {
    const bool in_place = args_.dtype == (sizeof(T) == sizeof(double) ? DType::Double : DType::Float);
    for (int k = 0; k < kOperands; ++k) {
      to[k] = in_place && args_.grads[k] ? static_cast<T*>(args_.grads[k]) + row_ * args_.columns + begin : buffer_[k];
    }
  }
  void end(int64_t begin, int64_t count) {
    with_storage(args_.dtype, [&](auto storage) {
      using S = decltype(storage);
      if constexpr (!std::is_same_v<S, T> && std::is_same_v<Accumulate<S>, T>) {
        for (int k = 0; k < kOperands; ++k) {
          if (args_.grads[k]) narrow(buffer_[k], count, static_cast<S*>(args_.grads[k]) + row_ * args_.columns + begin);
        }
      }
    });
  }

  T* to[kOperands];

 private:
  const RowSumsArgs& args_;
  int64_t row_;
  T buffer_[kOperands][kRowBlock];
};

template <class T, class Loss>
FUSEDLOSS_HD void numbers_at(const T* const (&x)[Loss::operands], int64_t i, T (&numbers)[Loss::operands]) {
#pragma GCC unroll 4
  for (int k = 0; k < Loss::operands; ++k) numbers[k] = x[k][i];
}

// Adds the terms of columns [begin, end) of a block.
template <class T, class Loss>
void add_terms(const Loss& loss_, const RowFacts<T>& facts_, const T* const (&from)[Loss::operands], int64_t begin,
               int64_t end, double (&total)[Loss::sums]) {
  const Loss loss = loss_;
  const RowFacts<T> facts = facts_;
  const T* x[Loss::operands];
  for (int k = 0; k < Loss::operands; ++k) x[k] = from[k];
  T lanes[Loss::sums][kLanes] = {};
  const auto add = [&](int64_t i, int lane) __attribute__((always_inline)) {
    T numbers[Loss::operands], terms[Loss::sums];
    numbers_at<T, Loss>(x, i, numbers);
    loss.terms(numbers, facts, terms);
#pragma GCC unroll 4
    for (int s = 0; s < Loss::sums; ++s) lanes[s][lane] += terms[s];
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < end; ++lane) add(i + lane, lane);
  for (int s = 0; s < Loss::sums; ++s) total[s] += double(add_lanes(lanes[s]));
}

template <class T, class Loss>
void write_gradients(const Loss& loss_, const RowFacts<T>& facts_, const T (&coefficients)[Loss::coefficients],
                     const T* const (&from)[Loss::operands], T* const (&to)[Loss::operands], int64_t count) {
  const Loss loss = loss_;
  const RowFacts<T> facts = facts_;
  T c[Loss::coefficients];
  for (int k = 0; k < Loss::coefficients; ++k) c[k] = coefficients[k];
  const T* x[Loss::operands];
  T* grads[Loss::operands];
  for (int k = 0; k < Loss::operands; ++k) {
    x[k] = from[k];
    grads[k] = to[k];
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T numbers[Loss::operands], made[Loss::operands];
    numbers_at<T, Loss>(x, i, numbers);
    loss.gradients(numbers, facts, c, made);
#pragma GCC unroll 4
    for (int k = 0; k < Loss::operands; ++k) grads[k][i] = made[k];
  }
}

// A row of the loss: its facts, its sums, and its gradients.
template <class T, class Loss>
struct SummedRow {
  const Loss& loss;
  const RowSumsArgs& args;
  int64_t row, target = -1;  // of a loss that takes a class: a column that adds nothing
  bool out_of_range = false;
  RowFacts<T> facts = {};
  RowBlock<T, Loss::operands> block;
  T sums[Loss::sums];

  SummedRow(const Loss& loss, const RowSumsArgs& args, int64_t row)
      : loss(loss), args(args), row(row), block(args, row) {
    if constexpr (takes_labels<Loss>) facts.label = T(label_of(args, row));
    if constexpr (takes_class<Loss>) {
      target = static_cast<const int64_t*>(args.target)[row];
      out_of_range = uint64_t(target) >= uint64_t(args.columns);
      if (out_of_range) return;
      facts.own = number_of<T>(args.operands[0], args.dtype, row * args.row_strides[0] + target);
      facts.weight = weight_of_class<T>(args, target);
    }
    double total[Loss::sums] = {};
    for (int64_t begin = 0; begin < args.columns; begin += kRowBlock) {
      const int64_t count = block_at(begin), skipped = target - begin;
      block.read(begin, count);
      if (takes_class<Loss> && skipped >= 0 && skipped < count) {
        add_terms<T>(loss, facts, block.x, 0, skipped, total);
        add_terms<T>(loss, facts, block.x, skipped + 1, count, total);
      } else {
        add_terms<T>(loss, facts, block.x, 0, count, total);
      }
    }
    for (int s = 0; s < Loss::sums; ++s) sums[s] = T(total[s]);
  }

  int64_t block_at(int64_t begin) const { return args.columns - begin < kRowBlock ? args.columns - begin : kRowBlock; }

  void write(T upstream) {
    T coefficients[Loss::coefficients];
    loss.gradient(sums, facts, upstream, coefficients);
    RowGradients<T, Loss::operands> gradients(args, row);
    for (int64_t begin = 0; begin < args.columns; begin += kRowBlock) {
      const int64_t count = block_at(begin);
      if (args.columns > kRowBlock) block.read(begin, count);  // otherwise it is there
      gradients.begin(begin);
      write_gradients<T>(loss, facts, coefficients, block.x, gradients.to, count);
      if constexpr (takes_class<Loss>) {
        if (target >= begin && target < begin + count)
          gradients.to[0][target - begin] = Loss::own_gradient(sums, coefficients);
      }
      gradients.end(begin, count);
    }
  }
};

template <class T, class Loss>
RowSumsTotal run_row_sums(const Loss& loss, bool backward, const RowSumsArgs& args, int64_t begin, int64_t end) {
  RowSumsTotal total = {0, -1};
  for (int64_t i = begin; i < end; ++i) {
    SummedRow<T, Loss> row(loss, args, i);
    if (row.out_of_range) return {0, i};
    if (backward) {
      row.write(number_of<T>(args.upstream, args.result_dtype, i * args.upstream_stride) * T(args.scale));
    } else {
      const T value = loss.value(row.sums, row.facts);
      if (args.losses) set_number_of(args.losses, args.result_dtype, i, value);
      total.loss += double(value);
    }
  }
  return total;
}

inline RowSumsTotal row_sums(RowSums loss, bool backward, const RowSumsArgs& args, int64_t begin, int64_t end) {
  const auto run = [&](const auto& functor, auto zero) {
    return run_row_sums<decltype(zero)>(functor, backward, args, begin, end);
  };
  if (args.dtype == DType::Double)
    return with_row_sums<double>(loss, args.params, [&](const auto& functor) { return run(functor, 0.0); });
  return with_row_sums<float>(loss, args.params, [&](const auto& functor) { return run(functor, 0.0f); });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
