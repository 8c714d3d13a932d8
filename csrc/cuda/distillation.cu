// Divergences of two rows: a block takes a row, then another.
//
// A thread collects the statistics of its classes, kPairUnroll of them between two looks at their maxes, and the block
// merges them in a tree. What follows (a value that needs both sums, the gradient) reads the row again, from the L2
// cache. No thread needs more than its own classes and the row's few numbers.
#include "common.cuh"
// After what names the namespace.
#include "../kernels/distillation.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int kPairUnroll = 4;
// Classes whose gradient a thread has in flight; the arithmetic of doubles needs the registers.
template <class S>
constexpr int kGradientUnroll = sizeof(S) == 8 ? 1 : 4;

// A row's numbers as z, the student's logit over the temperature, and w, the teacher's or log p.
template <class S, class P>
class PairOfRows {
 public:
  using T = Accumulate<S>;

  __device__ PairOfRows(const DistillationArgs& args, int64_t row)
      : student_(static_cast<const S*>(args.student.data) + row * args.student.row_stride),
        teacher_(static_cast<const P*>(args.teacher.data) + row * args.teacher.row_stride),
        student_stride_(args.student.class_stride),
        teacher_stride_(args.teacher.class_stride),
        scale_(T(1 / args.temperature)),
        teacher_is_(args.teacher_is) {}

  __device__ bool given() const { return teacher_is_ != TeacherIs::Logits; }
  __device__ T z(int c) const { return load(student_[c * student_stride_]) * scale_; }
  __device__ T w(int c) const {
    const T number = T(load(teacher_[c * teacher_stride_]));
    return given() ? log_of_given(number, teacher_is_ == TeacherIs::LogProbs) : number * scale_;
  }

 private:
  const S* student_;
  const P* teacher_;
  int64_t student_stride_, teacher_stride_;
  T scale_;
  TeacherIs teacher_is_;
};

template <class Direction, class T>
__device__ PairStatistics<T> merged(const PairStatistics<T>& a, const PairStatistics<T>& b) {
  const T max_q = larger(a.max_q, b.max_q), max_p = larger(a.max_p, b.max_p);
  const PairStatistics<T> one = raised<Direction>(a, max_q, max_p), other = raised<Direction>(b, max_q, max_p);
  return {max_q, one.sum_q + other.sum_q, max_p, one.sum_p + other.sum_p, one.cross + other.cross};
}

template <class T>
__device__ PairStatistics<T> of_other_lane(const PairStatistics<T>& row, int mask) {
  return {shuffle_xor(row.max_q, mask), shuffle_xor(row.sum_q, mask), shuffle_xor(row.max_p, mask),
          shuffle_xor(row.sum_p, mask), shuffle_xor(row.cross, mask)};
}

// Those of the whole row in every thread.
template <class Direction, class T>
__device__ PairStatistics<T> merged_in_block(PairStatistics<T> row, PairStatistics<T>* shared) {
  for (int mask = kWarp / 2; mask; mask /= 2) row = merged<Direction>(row, of_other_lane(row, mask));
  __syncthreads();  // what the row before left there has been read
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = row;
  __syncthreads();
  row = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) row = merged<Direction>(row, shared[warp]);
  return row;
}

template <class Direction, class Pair>
__device__ auto statistics_of(const Direction& direction, const Pair& pair, int classes) {
  using T = typename Pair::T;
  PairStatistics<T> row = {lowest<T>(), T(0), pair.given() ? T(0) : lowest<T>(), T(0), T(0)};
  for (int first = threadIdx.x; first < classes; first += kPairUnroll * kThreads) {
    T z[kPairUnroll], w[kPairUnroll], max_q = row.max_q, max_p = row.max_p;
#pragma unroll
    for (int i = 0; i < kPairUnroll; ++i) {
      const int c = first + i * kThreads;
      z[i] = c < classes ? pair.z(c) : -infinity<T>();
      w[i] = c < classes ? pair.w(c) : -infinity<T>();
      max_q = larger(max_q, z[i]);
      max_p = pair.given() ? T(0) : larger(max_p, w[i]);
    }
    if (max_q > row.max_q || max_p > row.max_p) row = raised<Direction>(row, max_q, max_p);
#pragma unroll
    for (int i = 0; i < kPairUnroll; ++i) {
      const T gap_q = z[i] - max_q, gap_p = w[i] - max_p, e_q = exp(gap_q), e_p = exp(gap_p);
      row.sum_q += e_q;
      row.sum_p += e_p;
      row.cross += direction.cross(e_q, gap_q, e_p, gap_p);
    }
  }
  return row;
}

// Value and constant of a row whose sums are complete.
template <class Direction, class Pair, class T>
__device__ void add_terms(const Direction& direction, const Pair& pair, int classes, PairRow<T>& row, double* shared) {
  Sums<2> sums;
  for (int c = threadIdx.x; c < classes; c += kThreads) {
    const DivergenceTerm<T> term = direction.term(class_of(row, pair.z(c), pair.w(c)));
    sums.values[0] += double(term.value);
    sums.values[1] += double(term.constant);
  }
  sums = sum_of_block(sums, shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    shared[0] = sums.values[0];
    shared[1] = sums.values[1];
  }
  __syncthreads();
  row.value = T(shared[0]);
  row.constant = T(shared[1]);
}

template <class Direction, class S, class P, class T>
__device__ void write_gradient(const Direction& direction, const PairOfRows<S, P>& pair, const PairRow<T>& row,
                               const DistillationArgs& args, int64_t at, T of_value, T of_lse) {
  S* grad = static_cast<S*>(const_cast<void*>(args.grad.data)) + at * args.grad.row_stride;
  const bool nothing = of_value == T(0) && of_lse == T(0);
#pragma unroll kGradientUnroll < S>
  for (int c = threadIdx.x; c < int(args.classes); c += kThreads) {
    T gradient = T(0);
    if (!nothing) {
      const ClassOfPair<T> one = class_of(row, pair.z(c), pair.w(c));
      gradient = weighed(of_value, direction.gradient(one, row.constant)) + weighed(of_lse, one.q);
    }
    grad[c * args.grad.class_stride] = store<S>(gradient);
  }
}

// What the gradient of every value is multiplied by.
template <class T>
__device__ T scale_of(const DistillationArgs& args) {
  const T divisor = args.divisor ? *static_cast<const T*>(args.divisor) : T(1);
  return T(args.scale / args.temperature) / divisor;
}

template <class Direction, class S, class P>
__global__ void __launch_bounds__(kThreads) distil_forward(Direction direction, const DistillationArgs args) {
  using T = Accumulate<S>;
  const int classes = int(args.classes);
  auto* shared = reinterpret_cast<PairStatistics<T>*>(shared_memory());
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T weight = weight_of_row<T>(args, row);
    const PairOfRows<S, P> pair(args, row);
    PairRow<T> of_row = {};
    if (weight != T(0) || args.lse) {
      const auto statistics = merged_in_block<Direction>(statistics_of(direction, pair, classes), shared);
      of_row = complete<Direction>(statistics, pair.given());
      // A sum that was infinite before its max rose says nothing about the row.
      const bool finite = of_row.value - of_row.value == T(0);
      if (!Direction::in_one_pass || !finite) {
        add_terms(direction, pair, classes, of_row, reinterpret_cast<double*>(shared));
      }
    }
    if (threadIdx.x == 0) {
      static_cast<T*>(args.losses)[row] = weighed(weight, of_row.value);
      if (args.lse) static_cast<T*>(args.lse)[row] = of_row.max_q + of_row.log_sum_q;
      T* saved = static_cast<T*>(args.statistics);
      const T numbers[kSavedOfPair] = {of_row.max_q, of_row.log_sum_q, of_row.max_p, of_row.log_sum_p, of_row.constant};
      for (int i = 0; i < kSavedOfPair; ++i) saved[i * args.rows + row] = numbers[i];
    }
    if (args.grad.data) write_gradient(direction, pair, of_row, args, row, weighed(weight, scale_of<T>(args)), T(0));
  }
}

template <class Direction, class S, class P>
__global__ void __launch_bounds__(kThreads) distil_backward(Direction direction, const DistillationArgs args) {
  using T = Accumulate<S>;
  const T* saved = static_cast<const T*>(args.statistics);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const auto number = [&](int i) { return saved[i * args.rows + row]; };
    const PairRow<T> of_row = {number(0), number(1), number(2), number(3), T(0), number(4)};
    const T upstream = static_cast<const T*>(args.upstream)[row * args.upstream_stride];
    const T of_lse =
        args.upstream_lse ? static_cast<const T*>(args.upstream_lse)[row * args.upstream_lse_stride] : T(0);
    write_gradient(direction, PairOfRows<S, P>(args, row), of_row, args, row,
                   weighed(weight_of_row<T>(args, row), upstream * scale_of<T>(args)),
                   of_lse * T(1 / args.temperature));
  }
}

// Calls f with the functor and both storage types.
template <class F>
int with_pair(const DistillationArgs& args, F f) {
  const auto with_direction = [&](auto s, auto p) -> int {
    using T = Accumulate<decltype(s)>;
    switch (args.divergence) {
      case Divergence::Forward:
        return f(ForwardDivergence<T>(args.beta), s, p);
      case Divergence::Reverse:
        return f(ReverseDivergence<T>(args.beta), s, p);
      default:
        return f(JensenShannonDivergence<T>(args.beta), s, p);
    }
  };
  return with_storage(args.student.dtype, [&](auto s) -> int {
    using S = decltype(s);
    if constexpr (!std::is_same_v<S, Accumulate<S>>) {
      if (args.teacher.dtype != args.student.dtype) return with_direction(s, Accumulate<S>());
    }
    return with_direction(s, s);
  });
}

Launch grid_of_rows(const DistillationArgs& args, size_t shared) {
  constexpr int kResident = 4;
  return {least(args.rows, Device().resident_blocks(kResident)), dim3(kThreads), shared};
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

bool cuda_distils(DType student, DType teacher) {
  const bool half = student == DType::BFloat16 || student == DType::Half;
  return teacher == student || (half && teacher == DType::Float);
}

int cuda_distillation_forward(const DistillationArgs& args, CudaStream stream) {
  using namespace FUSEDLOSS_ISA;
  return with_pair(args, [&](const auto& direction, auto s, auto p) -> int {
    using Direction = std::decay_t<decltype(direction)>;
    using S = decltype(s);
    const Launch how = grid_of_rows(args, kWarps * sizeof(PairStatistics<double>));
    return launch(how, stream, distil_forward<Direction, S, decltype(p)>, direction, args);
  });
}

int cuda_distillation_backward(const DistillationArgs& args, CudaStream stream) {
  using namespace FUSEDLOSS_ISA;
  return with_pair(args, [&](const auto& direction, auto s, auto p) -> int {
    using Direction = std::decay_t<decltype(direction)>;
    return launch(grid_of_rows(args, 0), stream, distil_backward<Direction, decltype(s), decltype(p)>, direction, args);
  });
}

}  // namespace fusedloss
