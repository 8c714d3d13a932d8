// What the softmax kernels share: online statistics, the target of a row, the results of a finished row, and its
// gradient.
#pragma once

#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {

// RowStatistics of the logits of type S seen so far.
template <class S, class Sum>
struct Online : RowStatistics<Accumulate<S>> {
  using T = Accumulate<S>;
  using RowStatistics<T>::max, RowStatistics<T>::sum_without_target, RowStatistics<T>::sum, RowStatistics<T>::mass;

  // Finite, so that a row of -infinity masks is no inf - inf.
  __device__ Online() : RowStatistics<T>{lowest<T>(), T(0), T(0), T(0)} {}
  __device__ explicit Online(const RowStatistics<T>& statistics) : RowStatistics<T>(statistics) {}

  __device__ void raise(T to) {
    const T gap = max - to, shrunk = exponential<S>(gap);
    Sum::raise(static_cast<RowStatistics<T>&>(*this), gap, shrunk);
    sum_without_target *= shrunk;
    max = to;
  }

  // Adds kCount logits with one rescale; z = -infinity with factor 0 stands for no logit.
  template <int kCount>
  __device__ void add(const T (&z)[kCount], const T (&factor)[kCount]) {
    T peak = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) peak = larger(peak, z[i]);
    raise(peak);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T gap = z[i] - peak, e = exponential<S>(gap);
      sum_without_target += e;
      Sum::add(sum, Column<T>{e, gap, factor[i]});
      if constexpr (Sum::has_factors) mass += factor[i];
    }
  }

  __device__ void merge(const RowStatistics<T>& statistics) {
    Online other(statistics);
    const T peak = larger(max, other.max);
    raise(peak);
    other.raise(peak);
    sum_without_target += other.sum_without_target;
    if constexpr (Sum::has_sum) sum += other.sum;
    if constexpr (Sum::has_factors) mass += other.mass;
  }

  // Over 2, 4, .. 32 neighbouring lanes; every lane gets the same bits.
  __device__ void merge_lanes(int lanes) {
    T peak = max;
    over_lanes(lanes, [&](int mask) { peak = larger(peak, shuffle_xor(peak, mask)); });
    raise(peak);
    over_lanes(lanes, [&](int mask) {
      sum_without_target += shuffle_xor(sum_without_target, mask);
      if constexpr (Sum::has_sum) sum += shuffle_xor(sum, mask);
      if constexpr (Sum::has_factors) mass += shuffle_xor(mass, mask);
    });
  }
  // A loop that is not unrolled costs ten instructions a step.
  template <class F>
  static __device__ void over_lanes(int lanes, F f) {
    if (lanes == kWarp) {
#pragma unroll
      for (int mask = kWarp / 2; mask; mask /= 2) f(mask);
    } else {
#pragma unroll 1
      for (int mask = lanes / 2; mask; mask /= 2) f(mask);
    }
  }
};

// The bits of logits that add nothing to a row. As bits: chosen instead of a vector that is read, half types would be
// put together number by number.
template <class S, int kCount = Vector<S>::width>
__device__ typename Vector<S, kCount>::Bits bits_of_no_logits() {
  Vector<S, kCount> vector;
#pragma unroll
  for (int k = 0; k < kCount; ++k) vector.values[k] = store<S>(-infinity<Accumulate<S>>());
  return bit_cast<typename Vector<S, kCount>::Bits>(vector);
}

// `complete`, and for half types, whose own rounding is coarser, with half of its instructions.
template <class S, class Loss, class T = Accumulate<S>>
__device__ Row<T> completed(const RowStatistics<T>& statistics, T logit, T weight) {
  if constexpr (sizeof(S) != 2) {
    return complete<Loss>(statistics, logit, weight);
  } else {
    using Sum = typename Loss::Sum;
    const bool target_is_max = logit >= statistics.max;
    Online<S, Sum> all(statistics);
    all.raise(target_is_max ? logit : statistics.max);
    const T gap = logit - all.max, own = exponential<S>(gap), without = all.sum_without_target;
    const T factor = factor_of_target<Loss>(weight), inverse = divide(T(1), without + own);
    const T log_total = log1p_for_halves(target_is_max ? without : (without - T(1)) + own);
    Sum::add(all.sum, Column<T>{own, gap, factor});
    return {log_total - gap, own * inverse, without * inverse, all.max, inverse, log_total, all.sum, all.mass + factor};
  }
}

// index -1: the row is ignored, its target is out of range, which reads no memory, or targets are probabilities.
template <class T>
struct Target {
  int index = -1;
  T weight = 0;
  bool counts = false, active = false;  // active: there is a gradient, or a second result
  bool out_of_range = false;

  __device__ Target() {}
  template <class Loss>
  __device__ Target(const Loss& loss, const SoftmaxArgs& args, int64_t row)
      : Target(Given{Loss::soft ? 0 : target_of(args, row)}, loss, args) {}

  struct Given {
    int64_t index;  // as it stands in memory
  };
  template <class Loss>
  __device__ Target(Given target, const Loss&, const SoftmaxArgs& args) {
    if constexpr (Loss::soft) {
      counts = active = true;
      weight = T(1);
    } else {
      const int64_t given = target.index;
      const bool ignored = given == args.ignore_index;
      out_of_range = !ignored && uint64_t(given) >= uint64_t(args.logits_layout.classes);
      counts = !ignored && !out_of_range;
      active = counts || (ignored && Loss::second_of_ignored && (args.second || args.upstream_second));
      if (counts) *this = Target(int(given), args);
    }
  }
  // Of a class that is known to count.
  __device__ Target(int index_, const SoftmaxArgs& args)
      : index(index_),
        weight(args.weight ? static_cast<const T*>(args.weight)[index_] : T(1)),
        counts(true),
        active(true) {}
};

// 0: the row has no loss, whatever its logits. Read where it is needed: forward_rows has no register to keep it in.
template <class T>
__device__ T sample_weight_of(const SoftmaxArgs& args, int64_t row) {
  return args.sample_weight ? static_cast<const T*>(args.sample_weight)[row] : T(1);
}

// What a row adds to the divisor of a mean.
template <class Loss, class T>
__device__ T weight_in_mean(const Target<T>& target, T sample_weight) {
  return target.counts && sample_weight != T(0) ? sample_weight * weight_in_mean<Loss>(target.weight) : T(0);
}

// The targets of neighbouring rows, all read before the first is looked at.
template <class Loss, class T, int kRows>
__device__ void read_targets(const Loss& loss, const SoftmaxArgs& args, int64_t row, Target<T> (&targets)[kRows]) {
  typename Target<T>::Given given[kRows] = {};
  if constexpr (!Loss::soft) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) given[r].index = target_of(args, row + r);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) targets[r] = Target<T>(given[r], loss, args);
}

template <class S>
__device__ const S* logits_of(const SoftmaxArgs& args, int64_t row) {
  return static_cast<const S*>(args.logits) + row_offset(args.logits_layout, row);
}
template <class S>
__device__ S* grad_of(const SoftmaxArgs& args, int64_t row) {
  return static_cast<S*>(args.grad) + row_offset(args.grad_layout, row);
}
template <class P>
__device__ const P* probabilities_of(const SoftmaxArgs& args, int64_t row) {
  return static_cast<const P*>(args.probabilities) + row_offset(args.probabilities_layout, row);
}

// Results and upstream gradients are of the storage type or, where wide, of its arithmetic type.
template <class S>
__device__ void store_result(void* to, int64_t i, Accumulate<S> value, bool wide) {
  if (wide) {
    static_cast<Accumulate<S>*>(to)[i] = value;
  } else {
    static_cast<S*>(to)[i] = store<S>(value);
  }
}
template <class S>
__device__ Accumulate<S> upstream_of(const void* from, int64_t i, bool wide) {
  return wide ? static_cast<const Accumulate<S>*>(from)[i] : load(static_cast<const S*>(from)[i]);
}

// What a row, or a few neighbouring ones, add to the sum and to the divisor of a mean.
template <class T>
struct Summands {
  T loss = 0, weight = 0;
};

// Adds up losses and the divisor of a mean over the rows that a thread finishes.
template <class S, class Loss, bool kSecond = true>
struct Finish {
  using T = Accumulate<S>;
  const Loss& loss;
  const CudaSoftmaxArgs& args;
  Sums<2> sums;  // losses, divisor

  __device__ Finish(const Loss& loss_, const CudaSoftmaxArgs& args_) : loss(loss_), args(args_) {}

  // `logit` is z of the target, -infinity where there is none.
  __device__ void row(int64_t row, const Target<T>& target, const RowStatistics<T>& statistics, T logit) {
    if constexpr (Loss::reads_row) {
      const RowStatistics<T> one[] = {statistics};
      save(row, one);
    }
    add(value_of(row, target, statistics, logit));
  }
  __device__ void add(const Summands<T>& summands) {
    sums.values[0] += double(summands.loss);
    sums.values[1] += double(summands.weight);
  }
  __device__ Summands<T> value_of(int64_t row, const Target<T>& target, const RowStatistics<T>& statistics,
                                  T logit) const {
    T value = 0, weight = 0, sample_weight;
    if constexpr (Loss::reads_row) {
      if (target.active) {
        const Row<T> all = completed<S, Loss>(statistics, logit, target.weight);
        if (target.counts) value = loss.value(all, target.weight);
        if (kSecond && args.second) store_result<S>(args.second, row, loss.second(all), args.wide);
      } else if (kSecond && args.second) {
        store_result<S>(args.second, row, target.out_of_range ? T(NAN) : T(0), args.wide);
      }
      sample_weight = sample_weight_of<T>(args, row);  // forward_rows has no register to keep it in
    } else {
      sample_weight = sample_weight_of<T>(args, row);
      if (target.counts) value = loss.value(logit, target.weight);
    }
    if (target.counts) {
      value = sample_weight == T(0) ? T(0) : sample_weight * value;
      weight = weight_in_mean<Loss>(target, sample_weight);
    }
    if (target.out_of_range) {
      value = T(NAN);
      // 16 bytes at once: where several rows are bad, the host sees row and target of one of them.
      store_bits(args.bad_target, bit_cast<uint4>(BadTarget{row, target_of(args, row)}));
    }
    if (args.losses) store_result<S>(args.losses, row, value, args.wide);
    return {value, weight};
  }

  // For the backward, the statistics of neighbouring rows.
  template <int kRows, class Statistics>
  __device__ void save(int64_t row, const Statistics (&statistics)[kRows]) const {
    T* saved = static_cast<T*>(args.statistics) + row;
    const int64_t rows = args.logits_layout.rows;
    save_numbers<kRows>(saved, [&](int r) { return statistics[r].max; });
    save_numbers<kRows>(saved + rows, [&](int r) { return statistics[r].sum_without_target; });
    if constexpr (Loss::Sum::saved >= 3) {
      save_numbers<kRows>(saved + 2 * rows, [&](int r) { return Loss::Sum::third(statistics[r]); });
    }
    if constexpr (Loss::Sum::saved == 4) {
      save_numbers<kRows>(saved + 3 * rows, [&](int r) { return statistics[r].mass; });
    }
  }
  // Vectors of rows begin where those of the arithmetic type do.
  template <int kRows, class F>
  static __device__ void save_numbers(T* to, F number) {
    if constexpr (kRows == 1) {
      *to = number(0);
    } else {
      constexpr int width = Vector<T>::width;
#pragma unroll
      for (int r = 0; r < kRows; r += width) {
        Vector<T> vector;
#pragma unroll
        for (int k = 0; k < width; ++k) vector.values[k] = number(r + k);
        store_vector(to + r, vector);
      }
    }
  }

  __device__ void write(const Sums<2>& totals) const {
    const double total = totals.values[0];
    const double divisor = reduction_divisor(args.mean, args.zero_for_none, totals.values[1]);
    if (args.total) store_result<S>(args.total, 0, T(total / divisor), args.wide);
    if (!args.grad || !args.mean) *static_cast<T*>(args.divisor) = T(divisor);
  }
};

// z of the target's logit.
template <class Loss, class T>
__device__ ZAndSlope<T> target_logit(const Loss& loss, const Target<T>& target, T logit) {
  if (target.index < 0) return {-infinity<T>(), T(0)};
  return loss.logit(logit);
}

// The upstream gradients of a row's two results.
template <class T>
struct Upstreams {
  T loss, second;
  bool has_loss, has_second;
};

// Reads them. A mean has one upstream gradient, divided once for all rows of a thread: 20 instructions.
template <class S>
struct UpstreamReader {
  using T = Accumulate<S>;
  const CudaSoftmaxArgs& args;
  T of_all = 1;

  __device__ explicit UpstreamReader(const CudaSoftmaxArgs& args_) : args(args_) {
    if (args.upstream && !args.upstream_stride) of_all = upstream_of<S>(args.upstream, 0, args.wide);
    if (args.mean) of_all /= *static_cast<const T*>(args.divisor);
  }
  __device__ Upstreams<T> operator()(int64_t row) const {
    const T each = args.upstream_stride ? upstream_of<S>(args.upstream, row * args.upstream_stride, args.wide) : of_all;
    const T sample_weight = sample_weight_of<T>(args, row);
    T second = 0;
    if (args.upstream_second) {
      second = upstream_of<S>(args.upstream_second, row * args.upstream_second_stride, args.wide);
    }
    return {each * sample_weight, second, sample_weight != T(0), args.upstream_second != nullptr};
  }
};

// The statistics of a row, or of neighbouring rows, as the forward has saved them.
template <class Loss, class T>
__device__ RowStatistics<T> saved_statistics(const CudaSoftmaxArgs& args, int64_t row) {
  return read_saved<typename Loss::Sum>(static_cast<const T*>(args.statistics), args.logits_layout.rows, row);
}
template <class Loss, class T, int kRows>
__device__ void read_statistics(const CudaSoftmaxArgs& args, int64_t row, RowStatistics<T> (&statistics)[kRows]) {
  if constexpr (kRows == 1) {
    statistics[0] = saved_statistics<Loss, T>(args, row);
  } else {
    constexpr int width = Vector<T>::width;
    const T* saved = static_cast<const T*>(args.statistics) + row;
    T numbers[Loss::Sum::saved * kRows];
#pragma unroll
    for (int i = 0; i < Loss::Sum::saved * kRows; i += width) {
      const Vector<T> vector = load_vector(saved + i / kRows * args.logits_layout.rows + i % kRows);
#pragma unroll
      for (int k = 0; k < width; ++k) numbers[i + k] = vector.values[k];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) statistics[r] = read_saved<typename Loss::Sum>(numbers, kRows, r);
  }
}

// The gradient of one row: some 250 instructions to set up, so that one thread does it for all of a row.
template <class S, class Loss>
struct RowGradient {
  using T = Accumulate<S>;
  T max = 0, own = 0;
  ColumnCoefficients<T> columns = {};
  int target = -1;
  bool active = false;  // otherwise all zeros, whatever the logits are

  __device__ RowGradient() {}

  // x: the target's logit as it is stored, where there is one. What else is read from memory is read before the target
  // is looked at, so that nobody waits for one load after another.
  __device__ RowGradient(const Loss& loss, const Target<T>& to, const Upstreams<T>& upstreams,
                         const RowStatistics<T>& statistics, T x)
      : target(to.index) {
    const bool counts = to.counts && upstreams.has_loss;
    active = counts || (to.active && Loss::second_of_ignored && upstreams.has_second);
    if (!active) return;
    const T upstream = counts ? upstreams.loss : T(0), weight = counts ? to.weight : T(0), second = upstreams.second;
    const ZAndSlope<T> logit = target_logit(loss, to, x);
    const Row<T> row = completed<S, Loss>(statistics, logit.z, to.weight);
    const GradientOfRow<T> gradient = gradient_of_row(loss, row, logit, weight, upstream, second);
    max = row.max;
    own = gradient.own;
    columns = gradient.columns;
  }

  // In a column that is not the target's, in an active row: for vectors, most of which do not hold the target.
  __device__ T elsewhere(const Loss& loss, T x, T factor) const {
    const ZAndSlope<T> logit = loss.logit(x);
    const T gap = logit.z - max, e = exponential<S>(gap);
    const T value = column_gradient<typename Loss::Sum>(columns, Column<T>{e, gap, factor});
    return decltype(loss.logit)::changes ? value * logit.slope : value;
  }

  // In any column, without a branch.
  __device__ T operator()(const Loss& loss, T x, bool is_target, T factor) const {
    const T value = elsewhere(loss, x, factor);
    return active ? (is_target ? own : value) : T(0);
  }
};

// k_c, which a loss makes from the weight and the probability of a class; 0 where it sums no k_c.
template <class Loss, class T>
__device__ T factor_of(const Loss& loss, const T* weights, int column, T probability) {
  if constexpr (!Loss::Sum::has_factors) return T(0);
  return loss.factor(weights ? weights[column] : T(1), probability);
}

// Whether a loss makes its gradient in the forward kernel; the others launch both.
template <class S, class Loss>
constexpr bool makes_gradient_of = makes_gradient_in_forward<S> && !Loss::Sum::has_sum && Loss::reads_row;

// Calls f with a functor, a storage type and that of the probabilities.
template <class F>
int with_types(Softmax loss, const SoftmaxArgs& args, F f) {
  return with_functor(loss, args, [&](const auto& functor, auto storage) -> int {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::soft) {
      return with_probabilities(args, storage, [&](auto probability) { return f(functor, storage, probability); });
    } else {
      return f(functor, storage, storage);
    }
  });
}

// The drivers. The layout decides between short rows, rows and columns; a loss that reads only the target's logit has
// its own.
bool fit_tiles(const CudaSoftmaxArgs& args);
int forward_by_tiles(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_by_tiles(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int forward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int forward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int forward_of_targets(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_of_targets(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);

}  // namespace fusedloss::FUSEDLOSS_ISA
