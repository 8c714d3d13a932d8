// Rows whose classes lie side by side.
//
// A row belongs to a group of `lanes` threads: 1 to 32 of a warp for short rows, a block for long ones, and several
// blocks where rows are few (forward) or where one must stay on the chip (forward with gradient, as a cluster).
//
// Bytes a logit moves, of size s: forward s, backward 2s, forward with gradient 2s where the row is resident.
#include "plan.h"
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <class T>
struct Shared {
  // Two of each, used in turn: one barrier a row is then enough.
  RowStatistics<T> warps[2][kWarps], block[2];
  double sums[2 * kWarps];
};

template <class S>
__device__ Vector<S>* resident_rows() {
  static_assert(sizeof(Shared<Accumulate<S>>) % 16 == 0, "vectors follow");
  return reinterpret_cast<Vector<S>*>(shared_memory() + sizeof(Shared<Accumulate<S>>));
}

// k_c along a row, which the loss makes from class weights and probabilities; 0 where it sums no k_c.
template <class P, class Loss, class T>
struct Factors {
  const Loss& loss;
  const T* weights;
  const P* probabilities;

  __device__ Factors(const Loss& loss_, const SoftmaxArgs& args, int64_t row)
      : loss(loss_),
        weights(static_cast<const T*>(args.weight)),
        probabilities(Loss::soft ? probabilities_of<P>(args, row) : nullptr) {}

  __device__ T of(int column, T probability) const {
    if constexpr (!Loss::Sum::has_factors) return T(0);
    return loss.factor(weights ? weights[column] : T(1), probability);
  }
  __device__ T operator()(int column) const { return of(column, Loss::soft ? load(probabilities[column]) : T(0)); }

  // Reads the factors of neighbouring columns; probabilities as vectors where they are aligned.
  template <int kCount>
  __device__ void read(int column, T (&factors)[kCount]) const {
    constexpr int width = Vector<P>::width;
    if constexpr (Loss::soft) {
      if (same_alignment(probabilities + column, nullptr)) {
#pragma unroll
        for (int i = 0; i < kCount; i += width) {
          const Vector<P> packed = load_vector(probabilities + column + i);
#pragma unroll
          for (int k = 0; k < width; ++k) factors[i + k] = of(column + i + k, load(packed.values[k]));
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) factors[k] = (*this)(column + k);
  }
};

// A slice of a row as one thread of its group sees it.
template <class S, class P, class Loss>
struct Slice {
  using T = Accumulate<S>;
  static constexpr int width = Vector<S>::width;
  const Loss& loss;
  const S* logits;
  const Factors<P, Loss, T> factors;
  int first_column;
  Run<S, int> run;
  int lane, lanes;

  __device__ Slice(const Loss& loss_, const SoftmaxArgs& args, int64_t row, const S* also, int begin, int end,
                   const RowsPlan& plan)
      : loss(loss_),
        logits(logits_of<S>(args, row) + begin),
        factors(loss_, args, row),
        first_column(begin),
        run(logits, end - begin, plan.vectorised && (!also || same_alignment(logits - begin, also))),
        lane(threadIdx.x % plan.lanes),
        lanes(plan.lanes) {}

  // Statistics without the target; the vectors are kept where `resident` points.
  __device__ Online<T, typename Loss::Sum> statistics(int target, Vector<S>* resident) const {
    Online<T, typename Loss::Sum> online;
    for (int first = lane; first < run.vectors; first += kRowUnroll<S> * lanes) {
      Vector<S> packed[kRowUnroll<S>];
#pragma unroll
      for (int u = 0; u < kRowUnroll<S>; ++u) {
        const int v = first + u * lanes;
        if (v < run.vectors) packed[u] = load_vector(logits + run.vector(v));
      }
#pragma unroll
      for (int u = 0; u < kRowUnroll<S>; ++u) {
        const int v = first + u * lanes;
        if (v >= run.vectors) break;
        if (resident) resident[v] = packed[u];
        T z[width], factor[width];
#pragma unroll
        for (int k = 0; k < width; ++k) z[k] = loss.logit(load(packed[u].values[k])).z;
        factors.read(first_column + run.vector(v), factor);
        // The target is nearly never in this vector, so that looking for its place costs nothing.
        const int place = target - first_column - run.vector(v);
        if (!Loss::soft && unsigned(place) < unsigned(width)) {
#pragma unroll
          for (int k = 0; k < width; ++k) {
            z[k] = k == place ? -infinity<T>() : z[k];
            factor[k] = k == place ? T(0) : factor[k];
          }
        }
        online.add(z, factor);
      }
    }
#pragma unroll 1
    for (int first = lane; first < run.scalars(); first += kRowUnroll<S> * lanes) {
      T z[kRowUnroll<S>], factor[kRowUnroll<S>];
#pragma unroll
      for (int u = 0; u < kRowUnroll<S>; ++u) {
        const int i = run.scalar(first + u * lanes);
        const bool taken = first + u * lanes < run.scalars() && i + first_column != target;
        z[u] = taken ? loss.logit(load(logits[i])).z : -infinity<T>();
        factor[u] = taken ? factors(first_column + i) : T(0);
      }
      online.add(z, factor);
    }
    return online;
  }

  // Places first, first + lanes, ... of the row's vectors.
  template <int kPlaces>
  __device__ void read(int first, const Vector<S>* resident, Vector<S> (&packed)[kPlaces]) const {
#pragma unroll
    for (int u = 0; u < kPlaces; ++u) {
      const int v = first + u * lanes;
      if (v < run.vectors) packed[u] = resident ? resident[v] : load_vector(logits + run.vector(v));
    }
  }

  template <int kPlaces>
  __device__ void write(const RowGradient<T, Loss>& gradient, S* grad, int first, Vector<S> (&packed)[kPlaces]) const {
#pragma unroll
    for (int u = 0; u < kPlaces; ++u) {
      const int v = first + u * lanes;
      if (v >= run.vectors) break;
      const int column = first_column + run.vector(v);
      T factor[width];
      factors.read(column, factor);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        packed[u].values[k] = store<S>(gradient(loss, load(packed[u].values[k]), column + k, factor[k]));
      }
      store_vector(grad + run.vector(v), packed[u]);
    }
  }

  // All vectors from place `first` on, and the scalars.
  __device__ void write_from(int first, const RowGradient<T, Loss>& gradient, S* grad,
                             const Vector<S>* resident) const {
    constexpr int kPlaces = 2;  // what is read lies in shared memory, or at least in the second-level cache
    for (; first < run.vectors; first += kPlaces * lanes) {
      Vector<S> packed[kPlaces];
      read(first, resident, packed);
      write(gradient, grad, first, packed);
    }
#pragma unroll 1
    for (int scalar = lane; scalar < run.scalars(); scalar += lanes) {
      const int i = run.scalar(scalar), column = first_column + i;
      grad[i] = store<S>(gradient(loss, load(logits[i]), column, factors(column)));
    }
  }
};

// Merges the statistics of a row's threads; every one of them gets the result.
template <class T, class Sum>
__device__ Online<T, Sum> merge_group(Online<T, Sum> mine, const RowsPlan& plan, Shared<T>& shared, int turn) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine.merge_lanes(plan.lanes < kWarp ? plan.lanes : kWarp);
  const auto merge_stored = [&](int count, auto stored) {
    mine = Online<T, Sum>();
    if (lane < count) mine.merge(*stored(lane));
    mine.merge_lanes(kWarp);
  };
  if (plan.lanes > kWarp) {
    if (lane == 0) shared.warps[turn][warp] = mine;
    __syncthreads();
    merge_stored(blockDim.x / kWarp, [&](int i) { return &shared.warps[turn][i]; });
  } else {
    __syncwarp();  // what the lanes have read so far may be overwritten after this
  }
  if (plan.cluster > 1) {
    if (threadIdx.x == 0) shared.block[turn] = mine;
    cluster_barrier();
    merge_stored(plan.cluster, [&](int rank) { return cluster_shared(&shared.block[turn], rank); });
  }
  return mine;
}

template <class S, class P, class Loss, bool kGrad>
__global__ void __launch_bounds__(kThreads, kRowBlocks<S, Loss, kGrad>)
    forward_rows(Loss loss, CudaSoftmaxArgs args, RowsPlan plan) {
  using T = Accumulate<S>;
  auto& shared = *reinterpret_cast<Shared<T>*>(shared_memory());
  const int64_t rows = args.logits_layout.rows;
  const int lane = threadIdx.x % plan.lanes, group = threadIdx.x / plan.lanes, groups = blockDim.x / plan.lanes;
  const int parts = plan.parts, part = blockIdx.x % parts;
  const int classes = int(args.logits_layout.classes);
  const int begin = int(least(classes, int64_t(part) * plan.slice));
  const int end = int(least(classes, int64_t(begin) + plan.slice));
  Vector<S>* resident = kGrad && plan.resident ? resident_rows<S>() + group * plan.resident_vectors : nullptr;
  RowStatistics<T>* partial = reinterpret_cast<RowStatistics<T>*>(Workspace(args.workspace).partial);
  Finish<S, Loss, !kGrad> finish(loss, args);

  int turn = 0;
  for (int64_t first = blockIdx.x / parts * groups; first < rows; first += gridDim.x / parts * groups, turn ^= 1) {
    const int64_t row = first + group;
    const Target<T> target = row < rows ? Target<T>(loss, args, row) : Target<T>();
    const int64_t inside = row < rows ? row : 0;
    S* grad = kGrad ? grad_of<S>(args, inside) : nullptr;
    const Slice<S, P, Loss> slice(loss, args, inside, grad, begin, row < rows ? end : begin, plan);
    Online<T, typename Loss::Sum> statistics;
    const T logit = target.index < 0 ? T(0) : load(logits_of<S>(args, inside)[target.index]);
    if (target.active) statistics = slice.statistics(target.index, resident);
    statistics = merge_group(statistics, plan, shared, turn);
    if (lane == 0 && row < rows) {
      if (plan.split()) {
        partial[row * parts + part] = statistics;
      } else if (part == 0) {
        finish.row(row, target, statistics, target_logit(loss, target, logit).z);
      }
    }
    if constexpr (kGrad) {
      const RowGradient<T, Loss> gradient(loss, args, row, target, statistics, logit, S());
      slice.write_from(lane, gradient, grad + begin, resident);
    }
  }
  if (plan.cluster > 1) cluster_barrier();  // no block goes while another may still read its shared memory

  const Workspace workspace(args.workspace);
  if (plan.split()) {
    if (!is_last_block(workspace.counter, shared.sums)) return;
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
      const Target<T> target(loss, args, row);
      Online<T, typename Loss::Sum> statistics;
      for (int i = 0; i < parts; ++i) statistics.merge(partial[row * parts + i]);
      const T logit = target.index < 0 ? T(0) : load(logits_of<S>(args, row)[target.index]);
      finish.row(row, target, statistics, target_logit(loss, target, logit).z);
    }
    const Sums<2> totals = sum_of_block(finish.sums, shared.sums);
    if (threadIdx.x == 0) finish.write(totals);
  } else {
    sum_of_grid(finish.sums, workspace, shared.sums, [&](const Sums<2>& totals) { finish.write(totals); });
  }
}

template <class S, class P, class Loss>
__global__ void __launch_bounds__(kThreads, kRowBlocks<S, Loss, true>)
    backward_rows(Loss loss, CudaSoftmaxArgs args, RowsPlan plan) {
  using T = Accumulate<S>;
  const int64_t rows = args.logits_layout.rows;
  const int group = threadIdx.x / plan.lanes, groups = blockDim.x / plan.lanes;
  const T* saved = static_cast<const T*>(args.statistics);
  const int64_t wanted = int64_t(blockIdx.x / plan.parts) * groups + group, row = wanted < rows ? wanted : rows - 1;
  const int begin = int(blockIdx.x % plan.parts) * plan.slice;
  const int end = int(least(args.logits_layout.classes, int64_t(begin) + plan.slice));
  S* grad = grad_of<S>(args, row);
  const Slice<S, P, Loss> slice(loss, args, row, grad, begin, wanted < rows ? end : begin, plan);

  Vector<S> packed[kRowUnroll<S>];  // under way while the row's few numbers are worked out
  slice.read(slice.lane, nullptr, packed);
  const Target<T> target(loss, args, row);
  const T logit = target.index < 0 ? T(0) : load(logits_of<S>(args, row)[target.index]);
  if (args.in_place) __syncthreads();  // all threads of a row have its target's logit before one overwrites it
  const RowStatistics<T> statistics = read_saved<typename Loss::Sum>(saved, rows, row);
  const RowGradient<T, Loss> gradient(loss, args, row, target, statistics, logit, S());
  slice.write(gradient, grad + begin, slice.lane, packed);
  slice.write_from(slice.lane + kRowUnroll<S> * slice.lanes, gradient, grad + begin, nullptr);
}

template <class S, class P, class Loss>
cudaError_t run_forward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const RowsPlan plan = plan_forward<S, Loss>(args.logits_layout, Device());
  const Launch how = {plan.blocks, dim3(plan.threads), sizeof(Shared<Accumulate<S>>), 1,
                      Workspace(args.workspace).counter};
  return launch(how, stream, forward_rows<S, P, Loss, false>, loss, args, plan);
}

template <class S, class P, class Loss>
cudaError_t run_forward_with_gradient(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  constexpr auto kernel = forward_rows<S, P, Loss, true>;
  constexpr int64_t shared = sizeof(Shared<Accumulate<S>>);
  const auto how = [&](const RowsPlan& plan) {
    return Launch{plan.blocks, dim3(plan.threads), shared + plan.resident_bytes(), unsigned(plan.cluster),
                  Workspace(args.workspace).counter};
  };
  Device device;
  RowsPlan plan = plan_forward_with_gradient<S, Loss>(args.logits_layout, device, shared);
  if (plan.cluster > 1 && !cluster_fits(how(plan), stream, kernel)) {
    device.clusters = 0;
    plan = plan_forward_with_gradient<S, Loss>(args.logits_layout, device, shared);
  }
  return launch(how(plan), stream, kernel, loss, args, plan);
}

template <class S, class P, class Loss>
cudaError_t run_backward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const RowsPlan plan = plan_backward<S>(args.logits_layout, args.in_place);
  return launch({plan.blocks, dim3(plan.threads)}, stream, backward_rows<S, P, Loss>, loss, args, plan);
}

}  // namespace

int forward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) -> int {
    using S = decltype(storage);
    using P = decltype(probability);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::reads_row) {
      if (!args.grad) return run_forward<S, P>(functor, args, stream);
      if constexpr (makes_gradient_of<S, Loss>) return run_forward_with_gradient<S, P>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

int backward_by_rows(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) -> int {
    if constexpr (std::decay_t<decltype(functor)>::reads_row) {
      return run_backward<decltype(storage), decltype(probability)>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
