// Short rows that follow one another without a gap.
//
// A block brings a tile of whole rows into shared memory by vectors, one to eight threads take a row there, and a
// gradient leaves by vectors from where the logits were. Read straight from memory, a row of 10 half-precision classes
// would be ten loads of 2 bytes.
//
// Bytes a logit moves, of size s: forward s, backward 2s, forward with gradient 2s.
#include "plan.h"
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Resident on a multiprocessor: 64 registers a thread. Of 48 KB of shared memory each where a multiprocessor has them;
// one of 100 KB (8.6, 8.9, 12.0) has room for two.
constexpr int kTileBlocks = 4;

struct TilesPlan {
  int classes, lanes_log2, rows;  // rows of a tile; lanes: threads of a row, a power of two, as a division costs twenty
  int64_t tiles;

  __device__ int lanes() const { return 1 << lanes_log2; }
};

template <class S>
TilesPlan plan_tiles(const SoftmaxLayout& layout) {
  constexpr int kColumnsOfThread = 128 / sizeof(S);
  TilesPlan plan = {int(layout.classes), 0, kThreads, 0};
  for (int columns = kColumnsOfThread; columns < plan.classes; columns *= 2) {
    ++plan.lanes_log2;
    plan.rows /= 2;
  }
  plan.tiles = divide_up(layout.rows, plan.rows);
  return plan;
}

// Numbers of a tile as they lie in shared memory, aligned like those in global memory.
template <class S>
struct Tile {
  S* numbers;
  int count;

  __device__ Tile(unsigned char* bytes, const S* like, int count_)
      : numbers(reinterpret_cast<S*>(bytes + reinterpret_cast<uintptr_t>(like) % 16)), count(count_) {}

  static size_t bytes(int count) { return (size_t(count) * sizeof(S) + 31) / 16 * 16; }

  __device__ void read(const S* from) {
    constexpr int kUnroll = 4;
    const Run<S, int> run(from, count, true);
    for (int first = threadIdx.x; first < run.vectors; first += kUnroll * kThreads) {
      Vector<S> vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int v = first + u * kThreads;
        if (v < run.vectors) vectors[u] = load_vector(from + run.vector(v));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int v = first + u * kThreads;
        if (v < run.vectors) *reinterpret_cast<Vector<S>*>(numbers + run.vector(v)) = vectors[u];
      }
    }
#pragma unroll 1
    for (int scalar = threadIdx.x; scalar < run.scalars(); scalar += kThreads) {
      numbers[run.scalar(scalar)] = from[run.scalar(scalar)];
    }
  }

  __device__ void write(S* to) const {
    const Run<S, int> run(to, count, same_alignment(to, numbers));
#pragma unroll 2
    for (int v = threadIdx.x; v < run.vectors; v += kThreads) {
      store_vector(to + run.vector(v), *reinterpret_cast<const Vector<S>*>(numbers + run.vector(v)));
    }
#pragma unroll 1
    for (int scalar = threadIdx.x; scalar < run.scalars(); scalar += kThreads) {
      to[run.scalar(scalar)] = numbers[run.scalar(scalar)];
    }
  }
};

// The row of a tile that a thread goes through, of each tile the same one. Places are counted from the begin of the
// tile: from the begin of the row, each would cost another product.
template <class S, class Loss>
struct RowOfTile {
  using T = Accumulate<S>;
  static constexpr int kTogether = 4;
  const Loss& loss;
  const T* weights;
  int classes, lanes, lane, columns;  // of the row; threads; which one, and how many columns it takes
  int first, end, start;              // places: of the row, and where the thread begins

  __device__ RowOfTile(const Loss& loss_, const SoftmaxArgs& args, const TilesPlan& plan)
      : loss(loss_),
        weights(static_cast<const T*>(args.weight)),
        classes(plan.classes),
        lanes(plan.lanes()),
        lane(threadIdx.x & (lanes - 1)),
        columns((plan.classes - lane + lanes - 1) >> plan.lanes_log2) {
    const int row = threadIdx.x >> plan.lanes_log2;
    first = row * classes;
    end = first + classes;
    // Rows of an even length begin in few of the 32 banks, so that neighbours begin in different columns.
    start = first + (classes % 2 ? lane : (row + lane) % classes);
  }

  // The next columns of the thread, some of them again where fewer are left.
  __device__ void places(int& at, int (&next)[kTogether]) const {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      next[u] = at;
      at += lanes;
      if (at >= end) at -= classes;
    }
  }
  __device__ T factor(int place) const {
    return Loss::Sum::has_factors ? factor_of(loss, weights, place - first, T(0)) : T(0);
  }

  // The target's logit has been made -infinity.
  __device__ Online<S, typename Loss::Sum> statistics(const S* tile, int target) const {
    Online<S, typename Loss::Sum> online;
    int at = start;
    for (int left = columns; left > 0; left -= kTogether) {
      int next[kTogether];
      places(at, next);
      T z[kTogether], factors[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const T logit = loss.logit(load(tile[next[u]])).z;
        z[u] = u < left ? logit : -infinity<T>();
        factors[u] = u < left && next[u] != first + target ? factor(next[u]) : T(0);
      }
      online.add(z, factors);
    }
    online.merge_lanes(lanes);
    return online;
  }

  __device__ void write(S* tile, const RowGradient<S, Loss> gradient) const {
    const int target = first + gradient.target;
    int at = start;
#pragma unroll 1
    for (int left = columns; left > 0; left -= kTogether) {
      int next[kTogether];
      places(at, next);
      S logits[kTogether];  // all read before the first is overwritten, or each would wait for the one before
#pragma unroll
      for (int u = 0; u < kTogether; ++u) logits[u] = tile[next[u]];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const T value = gradient(loss, load(logits[u]), next[u] == target, factor(next[u]));
        if (u < left) tile[next[u]] = store<S>(value);
      }
    }
  }
};

// What the thread of a row's number keeps of it, and hands to the threads that go through it.
template <class S, class Loss>
struct Shared {
  double sums[2 * kWarps];

  __device__ RowStatistics<Accumulate<S>>* statistics() {
    return reinterpret_cast<RowStatistics<Accumulate<S>>*>(this + 1);
  }
  __device__ RowGradient<S, Loss>* gradients(const TilesPlan& plan) {
    return reinterpret_cast<RowGradient<S, Loss>*>(statistics() + plan.rows);
  }
  __device__ unsigned char* tile(const TilesPlan& plan) {
    return reinterpret_cast<unsigned char*>(gradients(plan) + plan.rows);
  }
  static size_t bytes(const TilesPlan& plan) {
    return sizeof(Shared) + plan.rows * (sizeof(RowStatistics<Accumulate<S>>) + sizeof(RowGradient<S, Loss>)) +
           Tile<S>::bytes(plan.rows * plan.classes);
  }
};

template <class S, class Loss, bool kForward, bool kGrad>
__global__ void __launch_bounds__(kThreads, kTileBlocks) tiles(Loss loss, CudaSoftmaxArgs args, TilesPlan plan) {
  using T = Accumulate<S>;
  auto& shared = *reinterpret_cast<Shared<S, Loss>*>(shared_memory());
  RowStatistics<T>* statistics = shared.statistics();
  RowGradient<S, Loss>* gradients = shared.gradients(plan);
  // The rows a thread is alone with, and goes through.
  const int mine = threadIdx.x, seen = threadIdx.x >> plan.lanes_log2;
  const RowOfTile<S, Loss> of_tile(loss, args, plan);
  Finish<S, Loss, !kGrad> finish(loss, args);
  const UpstreamReader<S> upstreams_of(args);  // forward alone uses none, and the compiler leaves it out

  for (int64_t number = blockIdx.x; number < plan.tiles; number += gridDim.x) {
    const int64_t first = number * plan.rows, row = first + mine;
    const int rows = int(least(plan.rows, args.logits_layout.rows - first));
    Target<T> target;
    RowStatistics<T> saved;
    Upstreams<T> upstreams;
    if (mine < rows) {
      if constexpr (kGrad) upstreams = upstreams_of(row);
      if constexpr (!kForward) saved = saved_statistics<Loss, T>(args, row);
      target = Target<T>(loss, args, row);
    }
    const S* logits = static_cast<const S*>(args.logits) + first * plan.classes;
    Tile<S> tile(shared.tile(plan), logits, rows * plan.classes);
    tile.read(logits);
    __syncthreads();

    T logit = 0;
    if (target.index >= 0) {
      S& place = tile.numbers[mine * plan.classes + target.index];
      logit = load(place);
      if constexpr (kForward) place = store<S>(-infinity<T>());
    }
    if constexpr (kForward) {
      if (Loss::Sum::has_factors && mine < plan.rows) gradients[mine].target = target.index;
      __syncthreads();
      const int index = Loss::Sum::has_factors ? gradients[seen].target : -1;
      const Online<S, typename Loss::Sum> online = of_tile.statistics(tile.numbers, index);
      if (of_tile.lane == 0) statistics[seen] = online;
      __syncthreads();
      if (mine < rows) {
        saved = statistics[mine];
        finish.row(row, target, saved, target_logit(loss, target, logit).z);
      }
    }
    if constexpr (kGrad) {
      if (mine < rows) gradients[mine] = RowGradient<S, Loss>(loss, target, upstreams, saved, logit);
      __syncthreads();
      if (seen < rows) of_tile.write(tile.numbers, gradients[seen]);
      __syncthreads();
      tile.write(static_cast<S*>(args.grad) + first * plan.classes);
    }
    __syncthreads();
  }
  if constexpr (kForward) {
    sum_of_grid(finish.sums, Workspace(args.workspace), shared.sums,
                [&](const Sums<2>& totals) { finish.write(totals); });
  }
}

template <class S, bool kForward, bool kGrad, class Loss>
cudaError_t run_tiles(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const TilesPlan plan = plan_tiles<S>(args.logits_layout);
  const size_t shared = Shared<S, Loss>::bytes(plan);
  const int64_t resident = Device().resident_blocks(kTileBlocks, kThreads, shared);
  const Launch how = {least(plan.tiles, resident), dim3(kThreads), shared};
  return launch(how, stream, tiles<S, Loss, kForward, kGrad>, loss, args, plan);
}

bool without_gaps(const SoftmaxLayout& layout) {
  return layout.inner_stride == layout.classes &&
         (layout.inner == layout.rows || layout.outer_stride == layout.inner * layout.classes);
}

// Double has no tile: twice the bytes and the registers, for rows that arithmetic holds up anyway.
template <class S, class Loss>
constexpr bool takes_tiles = sizeof(S) < sizeof(double) && Loss::reads_row && !Loss::soft;

}  // namespace

bool fit_tiles(const CudaSoftmaxArgs& args) {
  constexpr int kMostClasses = 256;
  return args.dtype != DType::Double && !args.probabilities && args.logits_layout.classes <= kMostClasses &&
         without_gaps(args.logits_layout) && (!args.grad || without_gaps(args.grad_layout));
}

int forward_by_tiles(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto) -> int {
    using S = decltype(storage);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (takes_tiles<S, Loss>) {
      if (!args.grad) return run_tiles<S, true, false>(functor, args, stream);
      if constexpr (makes_gradient_of<S, Loss>) return run_tiles<S, true, true>(functor, args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

int backward_by_tiles(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto) -> int {
    using S = decltype(storage);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (takes_tiles<S, Loss>) return run_tiles<S, false, true>(functor, args, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
