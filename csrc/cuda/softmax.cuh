// What the softmax kernels share: online statistics, the target of a row, what a finished row leaves behind, and its
// gradient.
#pragma once

#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {

// RowStatistics of the logits seen so far.
template <class T>
struct Online : RowStatistics<T> {
  using RowStatistics<T>::max, RowStatistics<T>::rest;

  // Finite, so that a row of -infinity masks is no inf - inf.
  __device__ Online() : RowStatistics<T>{lowest<T>(), T(0)} {}

  // One rescale for all of them: -infinity stands for no logit.
  template <int kCount>
  __device__ void add(const T (&logits)[kCount]) {
    T peak = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) peak = logits[i] > peak ? logits[i] : peak;
    rest *= exp(max - peak);
    max = peak;
#pragma unroll
    for (int i = 0; i < kCount; ++i) rest += exp(logits[i] - peak);
  }

  __device__ void merge(const RowStatistics<T>& other) {
    const T peak = other.max > max ? other.max : max;
    rest = rest * exp(max - peak) + other.rest * exp(other.max - peak);
    max = peak;
  }

  // Over 2, 4, .. 32 neighbouring lanes; every lane gets the same bits.
  __device__ void merge_lanes(int lanes) {
    T peak = max;
    for (int mask = lanes / 2; mask; mask /= 2) {
      const T other = shuffle_xor(peak, mask);
      peak = other > peak ? other : peak;
    }
    rest *= exp(max - peak);
    max = peak;
    for (int mask = lanes / 2; mask; mask /= 2) rest += shuffle_xor(rest, mask);
  }
};

// index -1: the row is ignored, or its target is out of range. Neither reads memory by the target.
template <class T>
struct Target {
  int index = -1;
  T weight = 0;
  bool out_of_range = false;

  __device__ Target() {}
  __device__ Target(const SoftmaxArgs& args, int64_t row) {
    const int64_t given = args.target[row];
    if (given == args.ignore_index) return;
    out_of_range = uint64_t(given) >= uint64_t(args.logits_layout.classes);
    if (out_of_range) return;
    index = int(given);
    weight = args.weight ? static_cast<const T*>(args.weight)[given] : T(1);
  }
  __device__ bool counts() const { return index >= 0; }
};

__device__ inline int64_t row_offset(const SoftmaxLayout& layout, int64_t row) {
  if (layout.inner == layout.rows) return row * layout.inner_stride;
  return row / layout.inner * layout.outer_stride + row % layout.inner * layout.inner_stride;
}

template <class S>
__device__ const S* logits_of(const SoftmaxArgs& args, int64_t row) {
  return static_cast<const S*>(args.logits) + row_offset(args.logits_layout, row);
}
template <class S>
__device__ S* grad_of(const SoftmaxArgs& args, int64_t row) {
  return static_cast<S*>(args.grad) + row_offset(args.grad_layout, row);
}

// Adds up losses and the divisor of a mean over the rows that a thread finishes.
template <class S, class Loss>
struct Finish {
  using T = Accumulate<S>;
  const Loss& loss;
  const CudaSoftmaxArgs& args;
  Sums<2> sums;  // losses, divisor

  __device__ Finish(const Loss& loss_, const CudaSoftmaxArgs& args_) : loss(loss_), args(args_) {}

  __device__ void row(int64_t row, const Target<T>& target, const RowStatistics<T>& statistics, T logit) {
    T value = 0;
    if (target.counts()) {
      value = loss(complete(statistics, logit)).loss * target.weight;
      sums.values[1] += Loss::mean_by_weight ? double(target.weight) : 1.0;
    } else if (target.out_of_range) {
      value = T(NAN);
      // 16 bytes at once: where several rows are bad, the host sees row and target of one of them.
      store_vector_bits(args.bad_target, bit_cast<uint4>(BadTarget{row, args.target[row]}));
    }
    sums.values[0] += double(value);
    if (args.losses) static_cast<S*>(args.losses)[row] = store<S>(value);
    T* saved = static_cast<T*>(args.statistics);
    saved[row] = statistics.max;
    saved[args.logits_layout.rows + row] = statistics.rest;
  }

  __device__ void write(const Sums<2>& totals) const {
    const double total = totals.values[0], divisor = totals.values[1];
    if (args.total) *static_cast<S*>(args.total) = store<S>(T(args.mean ? total / divisor : total));
    if (!args.grad || !args.mean) *static_cast<T*>(args.divisor) = args.mean ? T(divisor) : T(1);
  }
};

// The gradient of one row: factor * exp(x - max), and `own` at the target; 0 where the row does not count.
template <class T>
struct RowGradient {
  T max = 0, factor = 0, own = 0;
  int target = -1;

  __device__ RowGradient() {}

  template <class S, class Loss>
  __device__ RowGradient(const Loss& loss, const CudaSoftmaxArgs& args, int64_t row, const Target<T>& to,
                         const RowStatistics<T>& statistics, T logit, S)
      : target(to.index) {
    if (!to.counts()) return;
    const Row<T> completed = complete(statistics, logit);
    const T upstream = args.upstream ? load(static_cast<const S*>(args.upstream)[row * args.upstream_stride]) : T(1);
    const T scale = args.mean ? upstream / *static_cast<const T*>(args.divisor) : upstream;
    const T a = scale * to.weight * loss(completed).a;
    max = completed.max;
    factor = a * completed.inverse;
    own = -a * completed.q;
  }

  __device__ T operator()(T logit, int column) const {
    if (target < 0) return T(0);  // the logits of a row that does not count may be NaN
    return column == target ? own : factor * exp(logit - max);
  }
};

// The two drivers; which one serves a call is the layout's matter.
int forward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int forward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);
int backward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream);

}  // namespace fusedloss::FUSEDLOSS_ISA
