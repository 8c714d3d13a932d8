// Rows whose classes lie apart, as in (N, C, d1, ...): a thread goes down the classes of a row, or of as many
// neighbouring rows as fill a vector, so that a warp reads along the inner dimension.
//
// Where such threads would be too few to fill the device, the classes are dealt out to several threads of a block
// (forward) or to several blocks (backward).
//
// Bytes a logit moves, of size s: forward s, backward 2s. A gradient in forward would read a second time what no cache
// holds any more, so that it is these two, one after the other.
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// The neighbouring rows that one load of a thread reads. Forward takes as many as fill a vector, which spends the
// fewest instructions. Backward waits for its row's numbers, so that more threads of fewer registers are faster.
template <class S>
constexpr int kForwardRows = Vector<S>::width;
template <class S>
constexpr int kBackwardRows = sizeof(S) == 8 ? 2 : 4;
// Classes that are read at once, and whether the next ones are read ahead, as the registers of those rows leave room.
template <class S, class Loss>
constexpr int kForwardClasses = sizeof(S) == 8                                             ? 2
                                : sizeof(S) == 4 || !Loss::Sum::has_sum                    ? 4
                                : Loss::Sum::has_factors && decltype(Loss::logit)::changes ? 1
                                                                                           : 2;
template <class S>
constexpr bool kReadsAhead = sizeof(S) > 2;
constexpr int kBackwardClasses = 4;
// Blocks resident on a multiprocessor: 2 leave a thread 128 registers, 3 leave 80. 4 leave 64, which suffice for the
// plainest losses in half types on sm_90.
constexpr int kForwardBlocks = 2;
template <class S, class Loss>
FUSEDLOSS_HD constexpr int backward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  if (sizeof(S) == 2 && !Loss::Sum::has_sum && !Loss::takes_power) return 4;
#endif
  return sizeof(S) == 8 || (Loss::Sum::has_factors && decltype(Loss::logit)::changes) ? 2 : 3;
}

// kRows neighbouring values, by vectors.
template <class P, int kRows>
__device__ void read_values(const P* from, Accumulate<P> (&values)[kRows]) {
  constexpr int width = kRows < Vector<P>::width ? kRows : Vector<P>::width;
#pragma unroll
  for (int i = 0; i < kRows; i += width) {
    Accumulate<P> numbers[width];
    unpack(load_vector<P, width>(from + i), numbers);
#pragma unroll
    for (int r = 0; r < width; ++r) values[i + r] = numbers[r];
  }
}

// k_c of a class for kRows neighbouring rows.
template <class P, class Loss, int kRows, class T>
__device__ void read_factors(const Loss& loss, const SoftmaxArgs& args, const P* probabilities, int c,
                             T (&factors)[kRows]) {
  T probability[kRows] = {};
  if constexpr (Loss::soft) {
    read_values<P, kRows>(probabilities + c * args.probabilities_layout.class_stride, probability);
  }
  const T weight = Loss::Sum::has_factors && args.weight ? static_cast<const T*>(args.weight)[c] : T(1);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    factors[r] = T(0);
    if constexpr (Loss::Sum::has_factors) factors[r] = loss.factor(weight, probability[r]);
  }
}

// How the classes are dealt out: a share takes every plan.shares-th. The steps from one to the next are in bytes and
// made on the host: a product of 64 bits for each class would cost as much as half of its arithmetic.
struct ColumnsPlan {
  int classes, shares;
  int64_t logits_step, grad_step;

  template <class S>
  static ColumnsPlan of(const CudaSoftmaxArgs& args, int64_t shares, S) {
    const auto step = [&](const SoftmaxLayout& layout) { return shares * layout.class_stride * int64_t(sizeof(S)); };
    return {int(args.logits_layout.classes), int(shares), step(args.logits_layout), step(args.grad_layout)};
  }
};

// Goes down the classes of a share.
template <class S>
struct Classes {
  S* at;
  int c;
  const ColumnsPlan& plan;

  __device__ Classes(S* rows, int share, int64_t class_stride, const ColumnsPlan& plan_)
      : at(rows + share * class_stride), c(share), plan(plan_) {}
  __device__ bool inside() const { return c < plan.classes; }
  __device__ void next() {
    constexpr bool reads = std::is_const_v<S>;
    using Byte = std::conditional_t<reads, const char, char>;
    at = reinterpret_cast<S*>(reinterpret_cast<Byte*>(at) + (reads ? plan.logits_step : plan.grad_step));
    c += plan.shares;
  }
};

// Some classes of kRows neighbouring rows, all read before the first is used, as bits. A class that is not there has
// logits that add nothing to a row.
template <class S, int kRows, int kClasses>
struct Pieces {
  using Piece = Vector<S, kRows>;
  using Bits = typename Piece::Bits;
  Bits pieces[kClasses];

  __device__ void read(Classes<const S>& from) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i, from.next()) {
      pieces[i] = from.inside() ? load_bits<Bits>(from.at) : bits_of_no_logits<S, kRows>();
    }
  }
  __device__ void unpack_into(Accumulate<S> (&values)[kRows], int i) const {
    unpack(bit_cast<Piece>(pieces[i]), values);
  }
};

// kRows neighbouring rows as one thread sees them: their statistics, and the logits of their targets.
template <class S, class P, class Loss, int kRows>
struct Rows {
  using T = Accumulate<S>;
  static constexpr int kClasses = kForwardClasses<S, Loss>;
  using Several = Pieces<S, kRows, kClasses>;
  Online<S, typename Loss::Sum> statistics[kRows];
  T logit[kRows] = {};

  // The first pieces have been read.
  __device__ void collect(const Loss& loss, const SoftmaxArgs& args, Several pieces, Classes<const S> from,
                          const P* probabilities, const int (&target)[kRows], int first) {
    const int classes = from.plan.classes, step = from.plan.shares;
    for (; first < classes; first += kClasses * step) {
      [[maybe_unused]] Several next;
      if constexpr (kReadsAhead<S>) next.read(from);
      T z[kRows][kClasses], factor[kRows][kClasses];
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const int c = first + i * step;
        T values[kRows], factors[kRows] = {};
        pieces.unpack_into(values, i);
        if (c < classes) read_factors<P>(loss, args, probabilities, c, factors);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool is_target = c == target[r];
          logit[r] = is_target ? values[r] : logit[r];
          z[r][i] = is_target ? -infinity<T>() : loss.logit(values[r]).z;
          factor[r][i] = is_target ? T(0) : factors[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) statistics[r].add(z[r], factor[r]);
      if constexpr (kReadsAhead<S>) {
        pieces = next;
      } else {
        pieces.read(from);
      }
    }
  }

  // Merges the shares of the classes, in every thread; share c % shares has collected class c.
  __device__ void merge_shares(const int (&target)[kRows]) {
    Rows* shared = reinterpret_cast<Rows*>(shared_memory());
    __syncthreads();
    shared[threadIdx.y * blockDim.x + threadIdx.x] = *this;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      statistics[r] = Online<S, typename Loss::Sum>();
      for (int share = 0; share < int(blockDim.y); ++share) {
        statistics[r].merge(shared[share * blockDim.x + threadIdx.x].statistics[r]);
      }
      if (target[r] >= 0) logit[r] = shared[target[r] % blockDim.y * blockDim.x + threadIdx.x].logit[r];
    }
  }
};

// The gradient in those classes.
template <class S, class P, class Loss, int kRows, int kClasses>
__device__ void write(const Pieces<S, kRows, kClasses>& pieces, const Loss& loss, const SoftmaxArgs& args,
                      const P* probabilities, Classes<S>& to, const RowGradient<S, Loss> (&gradient)[kRows]) {
#pragma unroll
  for (int i = 0; i < kClasses; ++i, to.next()) {
    if (!to.inside()) break;
    Accumulate<S> values[kRows], factors[kRows];
    read_factors<P>(loss, args, probabilities, to.c, factors);
    pieces.unpack_into(values, i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = gradient[r](loss, values[r], to.c == gradient[r].target, factors[r]);
    store_vector(to.at, pack<S>(values));
  }
}

template <class S, class P, class Loss, int kRows>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_columns(Loss loss, CudaSoftmaxArgs args, ColumnsPlan plan) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int share = threadIdx.y;
  Finish<S, Loss> finish(loss, args);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kRows;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x * kRows; first < layout.rows; first += step) {
    const int64_t row = first + threadIdx.x * kRows;
    const bool inside = row < layout.rows;
    const S* logits = logits_of<S>(args, inside ? row : 0);
    const P* probabilities = Loss::soft ? probabilities_of<P>(args, inside ? row : 0) : nullptr;
    Rows<S, P, Loss, kRows> rows;
    typename decltype(rows)::Several pieces;
    Classes<const S> from(logits, share, layout.class_stride, plan);
    pieces.read(from);  // under way while the targets are read
    int index[kRows];
    bool any = false;
    {
      Target<T> target[kRows];
      if (inside) read_targets(loss, args, row, target);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        index[r] = target[r].index;
        any = any || target[r].active;
      }
    }
    if (any) rows.collect(loss, args, pieces, from, probabilities, index, share);
    if (plan.shares > 1) rows.merge_shares(index);
    if (!inside || share > 0) continue;
    finish.save(row, rows.statistics);
    Summands<T> sums;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Whether a row without a class counts is read again: that is rare, and the registers were needed meanwhile.
      const Target<T> target = index[r] < 0 ? Target<T>(loss, args, row + r) : Target<T>(index[r], args);
      const T logit = target_logit(loss, target, rows.logit[r]).z;
      const Summands<T> one = finish.value_of(row + r, target, rows.statistics[r], logit);
      sums.loss += one.loss;
      sums.weight += one.weight;
    }
    finish.add(sums);
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(finish.sums, Workspace(args.workspace), shared, [&](const Sums<2>& totals) { finish.write(totals); });
}

template <class S, class P, class Loss, int kRows>
__global__ void __launch_bounds__(kThreads, backward_blocks<S, Loss>())
    backward_columns(Loss loss, CudaSoftmaxArgs args, ColumnsPlan plan) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int64_t row = (int64_t(blockIdx.x / plan.shares) * blockDim.x + threadIdx.x) * kRows;
  if (row >= layout.rows) return;
  const S* logits = logits_of<S>(args, row);
  const P* probabilities = Loss::soft ? probabilities_of<P>(args, row) : nullptr;
  // Under way while the rows' few numbers are worked out.
  Pieces<S, kRows, kBackwardClasses> pieces;
  const int share = int(blockIdx.x % plan.shares);
  Classes<const S> from(logits, share, layout.class_stride, plan);
  pieces.read(from);
  RowStatistics<T> statistics[kRows];
  Upstreams<T> upstreams[kRows];
  Target<T> target[kRows];
  read_statistics<Loss>(args, row, statistics);
  const UpstreamReader<S> upstreams_of(args);
#pragma unroll
  for (int r = 0; r < kRows; ++r) upstreams[r] = upstreams_of(row + r);
  read_targets(loss, args, row, target);
  T logit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // kRows > 1 only where neighbouring rows are neighbours in memory
    logit[r] = target[r].index < 0 ? T(0) : load(logits[target[r].index * layout.class_stride + r]);
  }
  RowGradient<S, Loss> gradient[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    gradient[r] = RowGradient<S, Loss>(loss, target[r], upstreams[r], statistics[r], logit[r]);
  }
  Classes<S> to(grad_of<S>(args, row), share, args.grad_layout.class_stride, plan);
  Pieces<S, kRows, kBackwardClasses> next;
  while (to.inside()) {
    next.read(from);
    write(pieces, loss, args, probabilities, to, gradient);
    pieces.read(from);
    write(next, loss, args, probabilities, to, gradient);
  }
}

// Whether `rows` neighbouring rows of numbers of `size` bytes are an aligned vector at every class.
bool vectors_fit(const SoftmaxLayout& layout, const void* base, int rows, size_t size) {
  const bool one_run = layout.inner == layout.rows;
  return layout.inner_stride == 1 && layout.inner % rows == 0 && layout.class_stride % rows == 0 &&
         (one_run || layout.outer_stride % rows == 0) && reinterpret_cast<uintptr_t>(base) % (rows * size) == 0;
}

template <class S, class P, class Loss>
bool by_vectors(const CudaSoftmaxArgs& args, int rows) {
  return vectors_fit(args.logits_layout, args.logits, rows, sizeof(S)) &&
         (!args.grad || vectors_fit(args.grad_layout, args.grad, rows, sizeof(S))) &&
         (!Loss::soft || vectors_fit(args.probabilities_layout, args.probabilities, rows, sizeof(P)));
}

// Shares of the classes, at least 8 each, until every multiprocessor has its threads.
int64_t shares_of(int64_t threads, int64_t classes, int64_t most, const Device& device) {
  constexpr int kEnoughBlocks = 2;
  int64_t shares = 1;
  while (shares < most && threads * shares < int64_t(device.multiprocessors) * kEnoughBlocks * kThreads &&
         classes >= 16 * shares) {
    shares *= 2;
  }
  return shares;
}

template <class S, class P, int kRows, class Loss>
cudaError_t run_forward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const Device device;
  const int64_t threads = args.logits_layout.rows / kRows;
  const int shares = int(shares_of(threads, args.logits_layout.classes, kWarps, device));
  const int64_t x = kThreads / shares;
  const size_t shared = shares > 1 ? kThreads * sizeof(Rows<S, P, Loss, kRows>) : 2 * kWarps * sizeof(double);
  const int64_t resident = device.resident_blocks(kForwardBlocks, kThreads, shared);
  const Launch how = {least(divide_up(threads, x), resident), dim3(unsigned(x), unsigned(shares)), shared};
  return launch(how, stream, forward_columns<S, P, Loss, kRows>, loss, args, ColumnsPlan::of(args, shares, S()));
}

template <class S, class P, int kRows, class Loss>
cudaError_t run_backward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const int64_t threads = args.logits_layout.rows / kRows;
  // In place, the thread that overwrites a target's logit is the one that has read it.
  const int64_t shares = args.in_place ? 1 : shares_of(threads, args.logits_layout.classes, 1024, Device());
  const int64_t x = threads < kThreads ? kWarp : kThreads;
  return launch({divide_up(threads, x) * shares, dim3(unsigned(x))}, stream, backward_columns<S, P, Loss, kRows>, loss,
                args, ColumnsPlan::of(args, shares, S()));
}

}  // namespace

int forward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) -> int {
    using S = decltype(storage);
    using P = decltype(probability);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::reads_row) {
      constexpr int rows = kForwardRows<S>;
      return by_vectors<S, P, Loss>(args, rows) ? run_forward<S, P, rows>(functor, args, stream)
                                                : run_forward<S, P, 1>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

int backward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) -> int {
    using S = decltype(storage);
    using P = decltype(probability);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::reads_row) {
      constexpr int rows = kBackwardRows<S>;
      return by_vectors<S, P, Loss>(args, rows) ? run_backward<S, P, rows>(functor, args, stream)
                                                : run_backward<S, P, 1>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
