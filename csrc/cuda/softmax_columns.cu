// Rows whose classes lie apart, as in (N, C, d1, ...): a thread goes down the classes of a row, or of as many
// neighbouring rows as fill a vector, so that a warp reads along the inner dimension.
//
// Where such threads would be too few to fill the device, the classes are dealt out to several threads of a block
// (forward) or to several blocks (backward).
//
// Bytes a logit moves, of size s: forward s, backward 2s, forward with gradient 2s and a second read, of what the
// caches still hold.
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int kClasses = 4;  // loads in flight a thread
constexpr int kBlocks = 2;   // resident on a multiprocessor: up to 8 rows a thread need their registers

// kRows neighbouring rows as one thread sees them: their statistics, and the logits of their targets.
template <class S, int kRows>
struct Rows {
  using T = Accumulate<S>;
  Online<T> statistics[kRows];
  T logit[kRows] = {};

  // Classes first, first + step, ... of the rows that begin at `logits`.
  __device__ void collect(const S* logits, const SoftmaxLayout& layout, const Target<T> (&target)[kRows], int first,
                          int step) {
    const int classes = int(layout.classes);
    for (; first < classes; first += kClasses * step) {
      T x[kRows][kClasses];
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const int c = first + i * step;
        T values[kRows];
        read(logits + c * layout.class_stride, c < classes, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool is_target = c == target[r].index;
          logit[r] = is_target ? values[r] : logit[r];
          x[r][i] = is_target ? -infinity<T>() : values[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) statistics[r].add(x[r]);
    }
  }

  static __device__ void read(const S* logits, bool inside, T (&values)[kRows]) {
    if constexpr (kRows == 1) {
      values[0] = inside ? load(*logits) : -infinity<T>();
    } else {
      Vector<S> packed = {};
      if (inside) packed = load_vector(logits);
#pragma unroll
      for (int r = 0; r < kRows; ++r) values[r] = inside ? load(packed.values[r]) : -infinity<T>();
    }
  }

  // From the shares of the classes to the whole, in every thread; class c was collected by share c % shares.
  __device__ void merge_shares(const Target<T> (&target)[kRows]) {
    Rows* shared = reinterpret_cast<Rows*>(shared_memory());
    __syncthreads();
    shared[threadIdx.y * blockDim.x + threadIdx.x] = *this;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      statistics[r] = Online<T>();
      for (int share = 0; share < int(blockDim.y); ++share) {
        statistics[r].merge(shared[share * blockDim.x + threadIdx.x].statistics[r]);
      }
      if (target[r].counts()) {
        logit[r] = shared[target[r].index % blockDim.y * blockDim.x + threadIdx.x].logit[r];
      }
    }
  }
};

template <class S, int kRows>
__device__ void write_gradient(const S* logits, S* grad, const SoftmaxLayout& from, const SoftmaxLayout& to,
                               const RowGradient<Accumulate<S>> (&gradient)[kRows], int first, int step) {
  using T = Accumulate<S>;
  const int classes = int(from.classes);
#pragma unroll 2
  for (int c = first; c < classes; c += step) {
    T values[kRows];
    Rows<S, kRows>::read(logits + c * from.class_stride, true, values);
    S* place = grad + c * to.class_stride;
    if constexpr (kRows == 1) {
      *place = store<S>(gradient[0](values[0], c));
    } else {
      Vector<S> packed;
#pragma unroll
      for (int r = 0; r < kRows; ++r) packed.values[r] = store<S>(gradient[r](values[r], c));
      store_vector(place, packed);
    }
  }
}

template <class S, class Loss, int kRows, bool kGrad>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_columns(Loss loss, CudaSoftmaxArgs args) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int share = threadIdx.y, shares = blockDim.y;
  Finish<S, Loss> finish(loss, args);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kRows;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x * kRows; first < layout.rows; first += step) {
    const int64_t row = first + threadIdx.x * kRows;
    const bool inside = row < layout.rows;
    Target<T> target[kRows];
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (inside) target[r] = Target<T>(args, row + r);
      any = any || target[r].counts();
    }
    Rows<S, kRows> rows;
    const S* logits = logits_of<S>(args, inside ? row : 0);
    if (any) rows.collect(logits, layout, target, share, shares);
    if (shares > 1) rows.merge_shares(target);
    if (!inside) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (share == 0) finish.row(row + r, target[r], rows.statistics[r], rows.logit[r]);
    }
    if constexpr (kGrad) {
      RowGradient<T> gradient[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        gradient[r] = RowGradient<T>(loss, args, row + r, target[r], rows.statistics[r], rows.logit[r], S());
      }
      write_gradient<S, kRows>(logits, grad_of<S>(args, row), layout, args.grad_layout, gradient, share, shares);
    }
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(finish.sums, Workspace(args.workspace), shared, [&](const Sums<2>& totals) { finish.write(totals); });
}

template <class S, class Loss, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_columns(Loss loss, CudaSoftmaxArgs args, int shares) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int64_t row = (int64_t(blockIdx.x / shares) * blockDim.x + threadIdx.x) * kRows;
  if (row >= layout.rows) return;
  const S* logits = logits_of<S>(args, row);
  const T* saved = static_cast<const T*>(args.statistics);
  RowGradient<T> gradient[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Target<T> target(args, row + r);
    const RowStatistics<T> statistics = {saved[row + r], saved[layout.rows + row + r]};
    // kRows > 1 only where neighbouring rows are neighbours in memory
    const T logit = target.counts() ? load(logits[target.index * layout.class_stride + r]) : T(0);
    gradient[r] = RowGradient<T>(loss, args, row + r, target, statistics, logit, S());
  }
  write_gradient<S, kRows>(logits, grad_of<S>(args, row), layout, args.grad_layout, gradient, blockIdx.x % shares,
                           shares);
}

// Whether kRows neighbouring rows are aligned vectors at every class.
template <class S>
bool vectors_fit(const SoftmaxLayout& layout, const void* base) {
  constexpr int width = Vector<S>::width;
  const bool one_run = layout.inner == layout.rows;
  return layout.inner_stride == 1 && layout.inner % width == 0 && layout.class_stride % width == 0 &&
         (one_run || layout.outer_stride % width == 0) && same_alignment(base, nullptr);
}

template <class S>
bool by_vectors(const CudaSoftmaxArgs& args) {
  return vectors_fit<S>(args.logits_layout, args.logits) && (!args.grad || vectors_fit<S>(args.grad_layout, args.grad));
}

// Shares of the classes, at least 8 each, until every multiprocessor has its threads.
int64_t shares_of(int64_t threads, int64_t classes, int64_t most, const Device& device) {
  int64_t shares = 1;
  while (shares < most && threads * shares < int64_t(device.multiprocessors) * kBlocks * kThreads &&
         classes >= 16 * shares) {
    shares *= 2;
  }
  return shares;
}

template <class S, int kRows, bool kGrad, class Loss>
cudaError_t run_forward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const Device device;
  const int64_t threads = args.logits_layout.rows / kRows;
  const int shares = int(shares_of(threads, args.logits_layout.classes, kWarps, device));
  const int64_t x = kThreads / shares;
  const int64_t blocks = least(divide_up(threads, x), device.resident_blocks(kBlocks));
  Launch how = {blocks, dim3(unsigned(x), unsigned(shares))};
  how.shared = shares > 1 ? kThreads * sizeof(Rows<S, kRows>) : 2 * kWarps * sizeof(double);
  how.counter = Workspace(args.workspace).counter;
  return launch(how, stream, forward_columns<S, Loss, kRows, kGrad>, loss, args);
}

template <class S, int kRows, class Loss>
cudaError_t run_backward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const int64_t threads = args.logits_layout.rows / kRows;
  // In place, the thread that overwrites a target's logit is the one that has read it.
  const int64_t shares = args.in_place ? 1 : shares_of(threads, args.logits_layout.classes, 1024, Device());
  const int64_t x = threads < kThreads ? kWarp : kThreads;
  return launch({divide_up(threads, x) * shares, dim3(unsigned(x))}, stream, backward_columns<S, Loss, kRows>, loss,
                args, int(shares));
}

}  // namespace

int forward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) -> int {
    using S = decltype(storage);
    constexpr int width = Vector<S>::width;
    const bool vectors = by_vectors<S>(args);
    if (!args.grad) {
      return vectors ? run_forward<S, width, false>(functor, args, stream)
                     : run_forward<S, 1, false>(functor, args, stream);
    }
    if constexpr (makes_gradient_in_forward<S>) {
      return vectors ? run_forward<S, width, true>(functor, args, stream)
                     : run_forward<S, 1, true>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

int backward_by_columns(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) -> int {
    using S = decltype(storage);
    return by_vectors<S>(args) ? run_backward<S, Vector<S>::width>(functor, args, stream)
                               : run_backward<S, 1>(functor, args, stream);
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
