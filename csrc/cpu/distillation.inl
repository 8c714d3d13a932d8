// Divergences of two rows; included once per instruction set.
//
// A row is brought into arrays of the arithmetic type, a block at a time (4 KB of float), so that only the reading
// knows dtypes. Its statistics are collected in one pass. What follows (a value that needs both sums, the gradient)
// reads the row again, from the cache.

#include "../kernels/cpu.h"
#include "../kernels/distillation.h"
#include "lanes.inl"
#include "widen.inl"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T>
class PairReader {
 public:
  PairReader(const DistillationArgs& args, int64_t row)
      : args_(args), row_(row), scale_(T(1 / args.temperature)), given_(args.teacher_is != TeacherIs::Logits) {}

  bool given() const { return given_; }

  // Columns [begin, begin + count), and classes of probability 0 up to a multiple of kLanes. Returns that multiple.
  int64_t read(int64_t begin, int64_t count) {
    copy(args_.student, begin, count, scale_, z);
    copy(args_.teacher, begin, count, given_ ? T(1) : scale_, w);
    if (given_) {
      const bool is_log = args_.teacher_is == TeacherIs::LogProbs;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) w[i] = log_of_given(w[i], is_log);
    }
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = count; i < padded; ++i) z[i] = w[i] = -infinity<T>();
    return padded;
  }

  alignas(64) T z[kPairBlock], w[kPairBlock];

 private:
  void copy(const RowsOperand& from, int64_t begin, int64_t count, T scale, T* to) const {
    with_storage(from.dtype, [&](auto s) {
      using S = decltype(s);
      const S* data = static_cast<const S*>(from.data) + row_ * from.row_stride + begin * from.class_stride;
      if (from.class_stride == 1 && !std::is_same_v<S, fp16>) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) to[i] = T(load(data[i])) * scale;
      } else {
        widen(data, from.class_stride, count, to);
        for (int64_t i = 0; i < count; ++i) to[i] *= scale;
      }
    });
  }

  const DistillationArgs& args_;
  int64_t row_;
  T scale_;
  bool given_;
};

// Calls f(begin, count) on the blocks of a row.
template <class F>
void over_blocks(int64_t classes, F f) {
  for (int64_t begin = 0; begin < classes; begin += kPairBlock) {
    f(begin, classes - begin < kPairBlock ? classes - begin : kPairBlock);
  }
}

template <class T>
T max_of(const T* values, int64_t count) {
  T lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lowest<T>();  // finite: a masked block is no inf - inf
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  return max_of_lanes(lanes);
}

// The exponentials of a row, each relative to the max known when its block was read: the gradient of a direction that
// needs no logarithms then reads nothing else. Null where they are not wanted.
template <class T>
struct KeptPair {
  T *q = nullptr, *p = nullptr;          // [padded classes]
  T *max_q = nullptr, *max_p = nullptr;  // of each block
};

template <bool kKeeps, class Direction, class T>
void add_block(const Direction& direction, const T* z, const T* w, int64_t padded, T max_q, T max_p, T* kept_q,
               T* kept_p, PairStatistics<double>& total) {
  T sums_q[kLanes] = {}, sums_p[kLanes] = {}, crosses[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) {
      const T gap_q = z[i + lane] - max_q, gap_p = w[i + lane] - max_p, e_q = exp(gap_q), e_p = exp(gap_p);
      sums_q[lane] += e_q;
      sums_p[lane] += e_p;
      crosses[lane] += direction.cross(e_q, gap_q, e_p, gap_p);
      if constexpr (kKeeps) {
        kept_q[i + lane] = e_q;
        kept_p[i + lane] = e_p;
      }
    }
  }
  total.sum_q += double(add_lanes(sums_q));
  total.sum_p += double(add_lanes(sums_p));
  total.cross += double(add_lanes(crosses));
}

template <class Direction, class T>
PairStatistics<double> statistics_of(const Direction& direction, PairReader<T>& reader, int64_t classes,
                                     const KeptPair<T>& kept) {
  PairStatistics<double> total = {double(lowest<T>()), 0, reader.given() ? 0.0 : double(lowest<T>()), 0, 0};
  over_blocks(classes, [&](int64_t begin, int64_t count) {
    const int64_t padded = reader.read(begin, count);
    const double of_q = double(max_of(reader.z, padded)), max_q = of_q > total.max_q ? of_q : total.max_q;
    const double of_p = reader.given() ? 0.0 : double(max_of(reader.w, padded));
    const double max_p = of_p > total.max_p ? of_p : total.max_p;
    if (begin == 0) {
      total.max_q = max_q;
      total.max_p = max_p;
    } else if (max_q > total.max_q || max_p > total.max_p) {
      total = raised<Direction>(total, max_q, max_p);
    }
    if (kept.q) {
      kept.max_q[begin / kPairBlock] = T(max_q);
      kept.max_p[begin / kPairBlock] = T(max_p);
      add_block<true>(direction, reader.z, reader.w, padded, T(max_q), T(max_p), kept.q + begin, kept.p + begin, total);
    } else {
      add_block<false, Direction, T>(direction, reader.z, reader.w, padded, T(max_q), T(max_p), nullptr, nullptr,
                                     total);
    }
  });
  return total;
}

// Value and constant of a row whose sums are complete.
template <class Direction, class T>
void add_terms(const Direction& direction, PairReader<T>& reader, int64_t classes, PairRow<T>& row) {
  double value = 0, constant = 0;
  over_blocks(classes, [&](int64_t begin, int64_t count) {
    const int64_t padded = reader.read(begin, count);
    T values[kLanes] = {}, constants[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) {
        const DivergenceTerm<T> term = direction.term(class_of(row, reader.z[i + lane], reader.w[i + lane]));
        values[lane] += term.value;
        constants[lane] += term.constant;
      }
    }
    value += double(add_lanes(values));
    constant += double(add_lanes(constants));
  });
  row.value = T(value);
  row.constant = T(constant);
}

template <class Direction, class T>
PairRow<T> complete_row(const Direction& direction, PairReader<T>& reader, int64_t classes, const KeptPair<T>& kept) {
  const PairStatistics<double> sums = statistics_of(direction, reader, classes, kept);
  const PairRow<double> found = complete<Direction>(sums, reader.given());
  PairRow<T> row = {T(found.max_q),     T(found.log_sum_q), T(found.max_p),
                    T(found.log_sum_p), T(found.value),     T(found.constant)};
  // A sum that was infinite before its max rose says nothing about the row.
  const bool finite = row.value - row.value == T(0);
  if (!Direction::in_one_pass || !finite) add_terms(direction, reader, classes, row);
  return row;
}

// The gradient of a row: `of_value` and `of_lse` are what comes from above, over the temperature.
template <class Direction, class T>
void write_gradient(const Direction& direction, PairReader<T>& reader, const PairRow<T>& row,
                    const DistillationArgs& args, int64_t at, T of_value, T of_lse, const KeptPair<T>& kept) {
  alignas(64) T gradient[kPairBlock];
  with_storage(args.grad.dtype, [&](auto s) {
    using S = decltype(s);
    S* to = static_cast<S*>(const_cast<void*>(args.grad.data)) + at * args.grad.row_stride;
    const int64_t stride = args.grad.class_stride;
    over_blocks(args.classes, [&](int64_t begin, int64_t count) {
      if (of_value == T(0) && of_lse == T(0)) {
        for (int64_t i = 0; i < count; ++i) gradient[i] = T(0);
      } else if (!Direction::needs_logarithms && kept.q) {
        const T *q = kept.q + begin, *p = kept.p + begin;
        const T of_q = exp((kept.max_q[begin / kPairBlock] - row.max_q) - row.log_sum_q);
        const T of_p = exp((kept.max_p[begin / kPairBlock] - row.max_p) - row.log_sum_p);
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
          const ClassOfPair<T> c = {q[i] * of_q, p[i] * of_p, T(0), T(0)};
          gradient[i] = of_value * direction.gradient(c, row.constant);
        }
      } else {
        reader.read(begin, count);
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
          const ClassOfPair<T> c = class_of(row, reader.z[i], reader.w[i]);
          const T of_row = weighed(of_value, direction.gradient(c, row.constant));
          gradient[i] = of_row + weighed(of_lse, c.q);
        }
      }
      if (stride == 1) {
        narrow(gradient, count, to + begin);
      } else {
        for (int64_t i = 0; i < count; ++i) to[(begin + i) * stride] = store<S>(Accumulate<S>(gradient[i]));
      }
    });
  });
}

template <class T>
T at_row(const void* data, int64_t stride, int64_t row, T otherwise) {
  return data ? static_cast<const T*>(data)[row * stride] : otherwise;
}

template <class Direction, class T>
double distil_forward(const Direction& direction, const DistillationArgs& args, int64_t begin, int64_t end,
                      void* scratch) {
  T *losses = static_cast<T*>(args.losses), *lse = static_cast<T*>(args.lse);
  T* saved = static_cast<T*>(args.statistics);
  KeptPair<T> kept;
  if (scratch) {
    const int64_t blocks = (args.classes + kPairBlock - 1) / kPairBlock, numbers = blocks * kPairBlock;
    kept.q = static_cast<T*>(scratch);
    kept.p = kept.q + numbers;
    kept.max_q = kept.p + numbers;
    kept.max_p = kept.max_q + blocks;
  }
  double sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T weight = weight_of_row<T>(args, row);
    PairReader<T> reader(args, row);
    PairRow<T> of_row = {};
    if (weight != T(0) || lse) of_row = complete_row(direction, reader, args.classes, kept);
    losses[row] = weighed(weight, of_row.value);
    sum += double(losses[row]);
    if (lse) lse[row] = of_row.max_q + of_row.log_sum_q;
    const T numbers[kSavedOfPair] = {of_row.max_q, of_row.log_sum_q, of_row.max_p, of_row.log_sum_p, of_row.constant};
    for (int i = 0; i < kSavedOfPair; ++i) saved[i * args.rows + row] = numbers[i];
    if (args.grad.data) {
      write_gradient(direction, reader, of_row, args, row, weighed(weight, T(args.scale / args.temperature)), T(0),
                     kept);
    }
  }
  return sum;
}

template <class Direction, class T>
void distil_backward(const Direction& direction, const DistillationArgs& args, int64_t begin, int64_t end) {
  const T* saved = static_cast<const T*>(args.statistics);
  for (int64_t row = begin; row < end; ++row) {
    const auto number = [&](int i) { return saved[i * args.rows + row]; };
    const PairRow<T> of_row = {number(0), number(1), number(2), number(3), T(0), number(4)};
    const T upstream = at_row(args.upstream, args.upstream_stride, row, T(1));
    const T of_lse = at_row(args.upstream_lse, args.upstream_lse_stride, row, T(0));
    PairReader<T> reader(args, row);
    write_gradient(direction, reader, of_row, args, row,
                   weighed(weight_of_row<T>(args, row), upstream * T(args.scale / args.temperature)),
                   of_lse * T(1 / args.temperature), {});
  }
}

// Calls f with the direction's functor in the arithmetic type.
template <class F>
auto with_direction(const DistillationArgs& args, F f) {
  const auto in = [&](auto zero) {
    using T = decltype(zero);
    switch (args.divergence) {
      case Divergence::Forward:
        return f(ForwardDivergence<T>(args.beta), zero);
      case Divergence::Reverse:
        return f(ReverseDivergence<T>(args.beta), zero);
      default:
        return f(JensenShannonDivergence<T>(args.beta), zero);
    }
  };
  return args.arithmetic == DType::Double ? in(double()) : in(float());
}

double distillation_forward(const DistillationArgs& args, int64_t begin, int64_t end, void* scratch) {
  return with_direction(args, [&](const auto& direction, auto zero) {
    return distil_forward<std::decay_t<decltype(direction)>, decltype(zero)>(direction, args, begin, end, scratch);
  });
}

void distillation_backward(const DistillationArgs& args, int64_t begin, int64_t end) {
  with_direction(args, [&](const auto& direction, auto zero) {
    distil_backward<std::decay_t<decltype(direction)>, decltype(zero)>(direction, args, begin, end);
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
