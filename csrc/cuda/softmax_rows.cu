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

// What the first warp of a row has still to finish: lanes finish a row each, all at once.
template <class T>
struct alignas(16) Unfinished {
  RowStatistics<T> statistics;
  T logit;  // of the target, as it is stored
};

template <class S, class Loss>
struct alignas(16) Shared {
  using T = Accumulate<S>;
  // Two of each, used in turn: a warp may be a row ahead of another.
  RowStatistics<T> warps[2][kWarps], block[2];
  RowGradient<S, Loss> gradient[2];
  double sums[2 * kWarps];

  // Followed by these, of each group, and by the vectors of rows that stay on the chip.
  __device__ Unfinished<T>* unfinished(int group, const RowsPlan& plan) {
    return reinterpret_cast<Unfinished<T>*>(this + 1) + group * plan.unfinished_of_group();
  }
  __device__ Vector<S>* resident(int group, const RowsPlan& plan) {
    return reinterpret_cast<Vector<S>*>(unfinished(blockDim.x / plan.lanes, plan)) + group * plan.resident_vectors;
  }
  static size_t bytes(const RowsPlan& plan) {
    return sizeof(Shared) + plan.threads / plan.lanes * plan.unfinished_of_group() * sizeof(Unfinished<T>);
  }
};

// factor_of along a row.
template <class P, class Loss, class T>
struct Factors {
  const Loss& loss;
  const T* weights;
  const P* probabilities;

  __device__ Factors(const Loss& loss_, const SoftmaxArgs& args, int64_t row)
      : loss(loss_),
        weights(static_cast<const T*>(args.weight)),
        probabilities(Loss::soft ? probabilities_of<P>(args, row) : nullptr) {}

  __device__ T of(int column, T probability) const { return factor_of(loss, weights, column, probability); }
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
    if (!Loss::soft && !weights) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) factors[k] = of(column, T(0));
      return;
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

  // The target is nearly never in a vector, so that looking for its place costs nothing.
  __device__ int place_in(int v, int target) const { return target - first_column - run.vector(v); }

  // Statistics without the target; the vectors are kept where `resident` points.
  template <bool kGrad>
  __device__ Online<S, typename Loss::Sum> statistics(int target, Vector<S>* resident) const {
    // Vectors with one rescale: 16 numbers, or what the registers leave room for.
    constexpr bool few = kGrad || Loss::Sum::has_entropy || sizeof(S) == 8;
    constexpr int together = few ? 1 : 16 / width;
    Online<S, typename Loss::Sum> online;
    const S* at = logits + run.vector(lane);
    for (int first = lane; first < run.vectors; first += kRowUnroll<S> * lanes) {
      typename Vector<S>::Bits vectors[kRowUnroll<S>];
#pragma unroll
      for (int u = 0; u < kRowUnroll<S>; ++u, at += lanes * width) {
        const bool inside = first + u * lanes < run.vectors;
        vectors[u] = inside ? load_bits<typename Vector<S>::Bits>(at) : bits_of_no_logits<S>();
      }
#pragma unroll
      for (int u = 0; u < kRowUnroll<S>; u += together) {
        T z[together * width], factor[together * width];
#pragma unroll
        for (int i = 0; i < together; ++i) {
          const int v = first + (u + i) * lanes, place = place_in(v, target);
          const auto vector = bit_cast<Vector<S>>(vectors[u + i]);
          if (resident && v < run.vectors) resident[v] = vector;
          T x[width], factors_here[width] = {};
          unpack(vector, x);
          if (v < run.vectors) factors.read(first_column + run.vector(v), factors_here);
          const bool holds_target = !Loss::soft && unsigned(place) < unsigned(width);
#pragma unroll
          for (int k = 0; k < width; ++k) {
            z[i * width + k] = loss.logit(x[k]).z;
            factor[i * width + k] = factors_here[k];
          }
          if (holds_target) {
#pragma unroll
            for (int k = 0; k < width; ++k) {
              if (k == place) z[i * width + k] = -infinity<T>();
              if (k == place) factor[i * width + k] = T(0);
            }
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
  __device__ void read(int first, const Vector<S>* resident, Vector<S> (&vectors)[kPlaces]) const {
#pragma unroll
    for (int u = 0; u < kPlaces; ++u) {
      const int v = first + u * lanes;
      if (v < run.vectors) vectors[u] = resident ? resident[v] : load_vector(logits + run.vector(v));
    }
  }

  template <int kPlaces>
  __device__ void write(const RowGradient<S, Loss>& gradient, S* grad, int first,
                        const Vector<S> (&vectors)[kPlaces]) const {
#pragma unroll
    for (int u = 0; u < kPlaces; ++u) {
      const int v = first + u * lanes, place = place_in(v, gradient.target);
      if (v >= run.vectors) break;
      T x[width], factor[width] = {};
      unpack(vectors[u], x);
      factors.read(first_column + run.vector(v), factor);
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = gradient.elsewhere(loss, x[k], factor[k]);
      if (!Loss::soft && unsigned(place) < unsigned(width)) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (k == place) x[k] = gradient.own;
        }
      }
      store_vector(grad + run.vector(v), pack<S>(x));
    }
  }

  // All vectors from place `first` on, and the scalars: kPlaces at a time, which are read before the first is written.
  template <int kPlaces>
  __device__ void write_from(int first, const RowGradient<S, Loss>& gradient, S* grad,
                             const Vector<S>* resident) const {
    for (; first < run.vectors; first += kPlaces * lanes) {
      Vector<S> vectors[kPlaces];
      read(first, resident, vectors);
      write(gradient, grad, first, vectors);
    }
#pragma unroll 1
    for (int scalar = lane; scalar < run.scalars(); scalar += kPlaces * lanes) {
      S stored[kPlaces];
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) {
        if (scalar + u * lanes < run.scalars()) stored[u] = logits[run.scalar(scalar + u * lanes)];
      }
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) {
        if (scalar + u * lanes >= run.scalars()) break;
        const int i = run.scalar(scalar + u * lanes), column = first_column + i;
        grad[i] = store<S>(gradient(loss, load(stored[u]), column == gradient.target, factors(column)));
      }
    }
  }

  __device__ void clear(S* grad) const {
    for (int v = lane; v < run.vectors; v += lanes) store_vector(grad + run.vector(v), Vector<S>{});
    for (int scalar = lane; scalar < run.scalars(); scalar += lanes) grad[run.scalar(scalar)] = S{};
  }
};

// The statistics of a row's threads merged: in all of a group within a warp, else in the first warp.
template <class S, class Loss>
__device__ Online<S, typename Loss::Sum> merge_group(Online<S, typename Loss::Sum> mine, const RowsPlan& plan,
                                                     Shared<S, Loss>& shared, int turn) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine.merge_lanes(plan.lanes < kWarp ? plan.lanes : kWarp);
  const auto merge_stored = [&](int count, auto stored) {
    mine = Online<S, typename Loss::Sum>();
    if (lane < count) mine.merge(*stored(lane));
    mine.merge_lanes(kWarp);
  };
  if (plan.lanes > kWarp) {
    if (lane == 0) shared.warps[turn][warp] = mine;
    __syncthreads();
    if (warp == 0) merge_stored(blockDim.x / kWarp, [&](int i) { return &shared.warps[turn][i]; });
  } else {
    __syncwarp();  // what the lanes have read so far may be overwritten after this
  }
  if (plan.cluster > 1) {
    if (threadIdx.x == 0) shared.block[turn] = mine;
    cluster_barrier();
    if (warp == 0) merge_stored(plan.cluster, [&](int rank) { return cluster_shared(&shared.block[turn], rank); });
  }
  return mine;
}

template <class S, class P, class Loss, bool kGrad>
__global__ void __launch_bounds__(kThreads, kRowBlocks<S, Loss, kGrad>)
    forward_rows(Loss loss, CudaSoftmaxArgs args, RowsPlan plan) {
  using T = Accumulate<S>;
  auto& shared = *reinterpret_cast<Shared<S, Loss>*>(shared_memory());
  const int64_t rows = args.logits_layout.rows;
  const int lane = threadIdx.x % plan.lanes, group = threadIdx.x / plan.lanes, groups = blockDim.x / plan.lanes;
  const int parts = plan.parts, part = blockIdx.x % parts;
  const int classes = int(args.logits_layout.classes);
  const int begin = int(least(classes, int64_t(part) * plan.slice));
  const int end = int(least(classes, int64_t(begin) + plan.slice));
  Vector<S>* resident = kGrad && plan.resident ? shared.resident(group, plan) : nullptr;
  RowStatistics<T>* partial = reinterpret_cast<RowStatistics<T>*>(Workspace(args.workspace).partial);
  Finish<S, Loss, !kGrad> finish(loss, args);

  // A thread alone would leave 31 lanes idle for the 150 instructions that finish a row.
  Unfinished<T>* unfinished = shared.unfinished(group, plan);
  const bool finishes = part == 0 && !plan.split() && lane < kWarp;
  const int64_t stride = gridDim.x / parts * groups;
  int kept = 0;
  const auto finish_rows = [&](int64_t last) {
    __syncwarp();
    const int64_t row = last - (kept - 1 - lane) * stride;
    if (lane < kept && row < rows) {
      const Target<T> target(loss, args, row);
      finish.row(row, target, unfinished[lane].statistics, target_logit(loss, target, unfinished[lane].logit).z);
    }
    kept = 0;
    __syncwarp();
  };

  // A row's target is read a row ahead and its logit is first looked at when the row is done, so that nothing waits for
  // one load after another.
  const auto given_of = [&](int64_t row) {
    return typename Target<T>::Given{Loss::soft || row >= rows ? 0 : target_of(args, row)};
  };
  int turn = 0;
  int64_t row = blockIdx.x / parts * groups + group;
  auto given = given_of(row);
  for (; row - group < rows; row += stride, turn ^= 1) {
    const Target<T> target = row < rows ? Target<T>(given, loss, args) : Target<T>();
    given = given_of(row + stride);
    const int64_t inside = row < rows ? row : 0;
    S* grad = kGrad ? grad_of<S>(args, inside) : nullptr;
    const Slice<S, P, Loss> slice(loss, args, inside, grad, begin, row < rows ? end : begin, plan);
    Online<S, typename Loss::Sum> statistics;
    const S stored = slice.logits[target.index < 0 ? 0 : target.index - begin];
    if (target.active) statistics = slice.template statistics<kGrad>(target.index, resident);
    statistics = merge_group<S, Loss>(statistics, plan, shared, turn);
    const T logit = load(stored);
    if (plan.split()) {
      if (lane == 0 && row < rows) partial[row * parts + part] = statistics;
    } else if (finishes) {
      if (lane == 0) unfinished[kept] = {statistics, logit};
      if (++kept == plan.unfinished_of_group()) finish_rows(row);
    }
    if constexpr (kGrad) {
      RowGradient<S, Loss> gradient;
      if (lane < kWarp) {
        gradient = RowGradient<S, Loss>(loss, target, UpstreamReader<S>(args)(inside), statistics, logit);
      }
      if (plan.lanes > kWarp) {
        if (lane == 0) shared.gradient[turn] = gradient;
        __syncthreads();
        gradient = shared.gradient[turn];
      }
      if (gradient.active) {
        slice.template write_from<1>(lane, gradient, grad + begin, resident);  // from shared memory, mostly
      } else {
        slice.clear(grad + begin);
      }
    }
  }
  if (finishes && kept > 0) finish_rows(row - stride);
  if (plan.cluster > 1) cluster_barrier();  // no block goes while another may still read its shared memory

  const Workspace workspace(args.workspace);
  if (plan.split()) {
    if (!is_last_block(workspace.counter, shared.sums)) return;
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
      const Target<T> target(loss, args, row);
      Online<S, typename Loss::Sum> statistics;
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

// A group takes plan.consecutive rows one after another. Its first lanes set up the gradient of a row each, all at
// once; a row of a block has one thread do it while the others' loads are under way.
template <class S, class P, class Loss>
__global__ void __launch_bounds__(kThreads, kRowBlocks<S, Loss, true>)
    backward_rows(Loss loss, CudaSoftmaxArgs args, RowsPlan plan) {
  using T = Accumulate<S>;
  auto* gradients = reinterpret_cast<RowGradient<S, Loss>*>(shared_memory());
  const int64_t rows = args.logits_layout.rows;
  const int lane = threadIdx.x % plan.lanes, group = threadIdx.x / plan.lanes, groups = blockDim.x / plan.lanes;
  const int64_t first = (int64_t(blockIdx.x / plan.parts) * groups + group) * plan.consecutive;
  const int count = first < rows ? int(least(plan.consecutive, rows - first)) : 0;
  const int begin = int(blockIdx.x % plan.parts) * plan.slice;
  const int end = int(least(args.logits_layout.classes, int64_t(begin) + plan.slice));
  const auto slice_of = [&](int64_t row) {
    return Slice<S, P, Loss>(loss, args, row, grad_of<S>(args, row), begin, end, plan);
  };

  Vector<S> vectors[kRowUnroll<S>];
  if (count > 0) slice_of(first).read(lane, nullptr, vectors);
  gradients += group * plan.consecutive;
  if (lane < count) {
    const int64_t row = first + lane;
    const RowStatistics<T> statistics = saved_statistics<Loss, T>(args, row);
    const Upstreams<T> upstreams = UpstreamReader<S>(args)(row);
    const Target<T> target(loss, args, row);
    const T logit = target.index < 0 ? T(0) : load(logits_of<S>(args, row)[target.index]);
    gradients[lane] = RowGradient<S, Loss>(loss, target, upstreams, statistics, logit);
  }
  // In place, it is by now that all targets' logits are known before one is overwritten.
  if (plan.lanes > kWarp) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  for (int i = 0; i < count; ++i) {
    const Slice<S, P, Loss> slice = slice_of(first + i);
    S* grad = grad_of<S>(args, first + i) + begin;
    const RowGradient<S, Loss> gradient = gradients[i];
    if (!gradient.active) {
      slice.clear(grad);
      continue;
    }
    if (i > 0) slice.read(lane, nullptr, vectors);
    slice.write(gradient, grad, lane, vectors);
    slice.template write_from<kRowUnroll<S>>(lane + kRowUnroll<S> * plan.lanes, gradient, grad, nullptr);
  }
}

template <class S, class P, class Loss>
cudaError_t run_forward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const RowsPlan plan = plan_forward<S, Loss>(args.logits_layout, Device());
  const Launch how = {plan.blocks, dim3(plan.threads), Shared<S, Loss>::bytes(plan)};
  return launch(how, stream, forward_rows<S, P, Loss, false>, loss, args, plan);
}

template <class S, class P, class Loss>
cudaError_t run_forward_with_gradient(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  constexpr auto kernel = forward_rows<S, P, Loss, true>;
  const auto how = [&](const RowsPlan& plan) {
    return Launch{plan.blocks, dim3(plan.threads), Shared<S, Loss>::bytes(plan) + plan.resident_bytes(),
                  unsigned(plan.cluster)};
  };
  Device device;
  const auto planned = [&] {
    return plan_forward_with_gradient<S, Loss>(args.logits_layout, device, Shared<S, Loss>::bytes);
  };
  RowsPlan plan = planned();
  if (plan.cluster > 1) {
    const int64_t clusters = resident_clusters(how(plan), stream, kernel);
    if (clusters == 0) {
      device.clusters = 0;
      plan = planned();
    } else {
      // One cluster more than run at once would take as long as all the others.
      plan.blocks = least(plan.blocks, clusters * plan.cluster);
    }
  }
  return launch(how(plan), stream, kernel, loss, args, plan);
}

template <class S, class P, class Loss>
cudaError_t run_backward(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const RowsPlan plan = plan_backward<S, Loss>(args.logits_layout, Device(), args.in_place);
  const size_t shared = plan.threads / plan.lanes * plan.consecutive * sizeof(RowGradient<S, Loss>);
  return launch({plan.blocks, dim3(plan.threads), shared}, stream, backward_rows<S, P, Loss>, loss, args, plan);
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
