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
// Blocks resident on a multiprocessor: 2 leave a thread 128 registers, 3 leave 80. 4 leave 64, which suffice for half
// types on sm_90; for others ptxas would spill in the focal loss.
constexpr int kForwardBlocks = 2;
template <class S, class Loss>
FUSEDLOSS_HD constexpr int backward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  if (sizeof(S) == 2 && !Loss::Sum::has_sum) return 4;
#endif
  return sizeof(S) == 8 ? 2 : 3;
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

// Some classes of kRows neighbouring rows, all read before the first is used.
template <class S, int kRows, int kClasses>
struct Pieces {
  Vector<S, kRows> pieces[kClasses] = {};

  __device__ void read(const SoftmaxArgs& args, const S* logits, int first, int step) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      const int c = first + i * step;
      if (c < args.logits_layout.classes)
        pieces[i] = load_vector<S, kRows>(logits + c * args.logits_layout.class_stride);
    }
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

  // Classes first, first + step, ... of the rows that begin at `logits`; the first pieces have been read.
  __device__ void collect(const Loss& loss, const SoftmaxArgs& args, Several pieces, const S* logits,
                          const P* probabilities, const int (&target)[kRows], int first, int step) {
    const int classes = int(args.logits_layout.classes);
    for (; first < classes; first += kClasses * step) {
      [[maybe_unused]] Several next;
      if constexpr (kReadsAhead<S>) next.read(args, logits, first + kClasses * step, step);
      T z[kRows][kClasses], factor[kRows][kClasses];
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const int c = first + i * step;
        T values[kRows], factors[kRows] = {};
        unpack(pieces.pieces[i], values);
        if (c < classes) read_factors<P>(loss, args, probabilities, c, factors);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool is_target = c == target[r];
          logit[r] = is_target ? values[r] : logit[r];
          z[r][i] = is_target || c >= classes ? -infinity<T>() : loss.logit(values[r]).z;
          factor[r][i] = is_target ? T(0) : factors[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) statistics[r].add(z[r], factor[r]);
      if constexpr (kReadsAhead<S>) {
        pieces = next;
      } else {
        pieces.read(args, logits, first + kClasses * step, step);
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
                      const P* probabilities, S* grad, const RowGradient<S, Loss> (&gradient)[kRows], int first,
                      int step) {
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const int c = first + i * step;
    if (c >= args.logits_layout.classes) break;
    Accumulate<S> values[kRows], factors[kRows];
    read_factors<P>(loss, args, probabilities, c, factors);
    unpack(pieces.pieces[i], values);
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = gradient[r](loss, values[r], c, factors[r]);
    store_vector(grad + c * args.grad_layout.class_stride, pack<S>(values));
  }
}

template <class S, class P, class Loss, int kRows>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_columns(Loss loss, CudaSoftmaxArgs args) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int share = threadIdx.y, shares = blockDim.y;
  Finish<S, Loss> finish(loss, args);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kRows;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x * kRows; first < layout.rows; first += step) {
    const int64_t row = first + threadIdx.x * kRows;
    const bool inside = row < layout.rows;
    const S* logits = logits_of<S>(args, inside ? row : 0);
    const P* probabilities = Loss::soft ? probabilities_of<P>(args, inside ? row : 0) : nullptr;
    Rows<S, P, Loss, kRows> rows;
    typename decltype(rows)::Several pieces;
    pieces.read(args, logits, share, shares);  // under way while the targets are read
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
    if (any) rows.collect(loss, args, pieces, logits, probabilities, index, share, shares);
    if (shares > 1) rows.merge_shares(index);
    if (!inside || share > 0) continue;
    finish.save(row, rows.statistics);
    Target<T> target[kRows];
    read_targets(loss, args, row, target);  // again, from the cache: meanwhile the registers were needed
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      finish.value_of(row + r, target[r], rows.statistics[r], target_logit(loss, target[r], rows.logit[r]).z);
    }
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(finish.sums, Workspace(args.workspace), shared, [&](const Sums<2>& totals) { finish.write(totals); });
}

template <class S, class P, class Loss, int kRows>
__global__ void __launch_bounds__(kThreads, backward_blocks<S, Loss>())
    backward_columns(Loss loss, CudaSoftmaxArgs args, int shares) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int64_t row = (int64_t(blockIdx.x / shares) * blockDim.x + threadIdx.x) * kRows;
  if (row >= layout.rows) return;
  const S* logits = logits_of<S>(args, row);
  const P* probabilities = Loss::soft ? probabilities_of<P>(args, row) : nullptr;
  // Under way while the rows' few numbers are worked out.
  Pieces<S, kRows, kBackwardClasses> pieces;
  int first = int(blockIdx.x % shares);
  pieces.read(args, logits, first, shares);
  RowStatistics<T> statistics[kRows];
  Upstreams<T> upstreams[kRows];
  Target<T> target[kRows];
  read_statistics<Loss>(args, row, statistics);
#pragma unroll
  for (int r = 0; r < kRows; ++r) upstreams[r] = upstreams_of<S>(args, row + r);
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
  S* grad = grad_of<S>(args, row);
  for (; first < layout.classes; first += kBackwardClasses * shares) {
    Pieces<S, kRows, kBackwardClasses> next;
    next.read(args, logits, first + kBackwardClasses * shares, shares);
    write(pieces, loss, args, probabilities, grad, gradient, first, shares);
    pieces = next;
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
  const int64_t blocks = least(divide_up(threads, x), device.resident_blocks(kForwardBlocks));
  Launch how = {blocks, dim3(unsigned(x), unsigned(shares))};
  how.shared = shares > 1 ? kThreads * sizeof(Rows<S, P, Loss, kRows>) : 2 * kWarps * sizeof(double);
  how.counter = Workspace(args.workspace).counter;
  return launch(how, stream, forward_columns<S, P, Loss, kRows>, loss, args);
}

template <class S, class P, int kRows, class Loss>
cudaError_t run_backward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const int64_t threads = args.logits_layout.rows / kRows;
  // In place, the thread that overwrites a target's logit is the one that has read it.
  const int64_t shares = args.in_place ? 1 : shares_of(threads, args.logits_layout.classes, 1024, Device());
  const int64_t x = threads < kThreads ? kWarp : kThreads;
  return launch({divide_up(threads, x) * shares, dim3(unsigned(x))}, stream, backward_columns<S, P, Loss, kRows>, loss,
                args, int(shares));
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
