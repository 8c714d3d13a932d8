// Pointwise losses over class indices: the losses, their sum or the gradient, with no one-hot in memory.
//
// Bytes an element moves, of size s: sum s; losses and gradient 2s; an upstream gradient of its own s more. A row's
// index comes from a cache: its 8 bytes are read by every vector of a row, or once for kClassesOfThread classes where
// they lie apart.
#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Blocks resident on a multiprocessor: 80 registers a thread, 128 for double and long formulas, which of half types,
// eight to a vector, take a few more.
template <class S, class Loss>
constexpr int kIndexedBlocks = is_long<Loss> && sizeof(S) == 2   ? 1
                               : sizeof(S) == 8 || is_long<Loss> ? 2
                                                                 : 3;
// Vectors in flight a thread, where classes lie side by side.
template <PointwiseResult kResult, class S, class Loss>
constexpr int kIndexedUnroll = is_long<Loss>                                        ? 1
                               : sizeof(S) == 4 && kResult != PointwiseResult::Grad ? 4
                                                                                    : 2;
constexpr int kClassesOfThread = 8;  // classes in flight a thread, where they lie apart

// What an index names: a class, or one of these.
enum : int { kBackground = -1, kIgnored = -2, kOutOfRange = -3 };

__device__ inline int named_by(const CudaPointwiseArgs& args, int64_t row) {
  const int64_t index = args.index[row];
  if (index == args.ignore_index) return kIgnored;
  if (index < 0 || index == args.sizes[1]) return kBackground;
  return index < args.sizes[1] ? int(index) : int(kOutOfRange);
}

template <PointwiseResult kResult, class S, class Loss>
struct Elements {
  using T = Accumulate<S>;
  static constexpr bool kSums = kResult == PointwiseResult::Sum, kGrads = kResult == PointwiseResult::Grad;

  const Loss& loss;
  const CudaPointwiseArgs& args;
  T scale = 1;   // of the gradient: 1 / n for a mean, times the upstream gradient where it is one for all
  Sums<2> sums;  // losses and rows that are not ignored

  __device__ Elements(const Loss& loss_, const CudaPointwiseArgs& args_) : loss(loss_), args(args_) {
    if constexpr (kGrads) {
      if (args.one_upstream) scale = load(*static_cast<const S*>(args.upstream.data));
      if (args.mean_of_counted) scale = T(scale / *args.counted);
    }
  }

  __device__ const S* input() const { return static_cast<const S*>(args.input.data); }
  __device__ S* output() const { return static_cast<S*>(args.output); }
  __device__ const S* upstream() const {
    return kGrads && !args.one_upstream ? static_cast<const S*>(args.upstream.data) : nullptr;
  }
  __device__ T weight(int64_t outer, int64_t column, int64_t i) const {
    if (!args.weight.data) return T(1);
    const int64_t* strides = args.weight.strides;
    return load(static_cast<const S*>(args.weight.data)[outer * strides[2] + column * strides[1] + i * strides[0]]);
  }

  // A row's loss or gradient in a column, with an upstream gradient of its own.
  __device__ T operator()(int named, int64_t column, T x, T weight, T upstream) const {
    return named < kBackground ? of_no_class(named) : at(named == column, x, upstream * weight);
  }
  __device__ T at(bool is_target, T x, T factor) const {
    const T t = T(is_target);
    if constexpr (kGrads) return loss.grad(x, t) * scale * factor;
    return loss.value(x, t) * factor;
  }
  // Whatever the logits are, which may be NaN.
  __device__ T of_no_class(int named) const { return kGrads || named == kIgnored ? T(0) : T(NAN); }

  // Done once for every row of a forward.
  __device__ void note(int named, int64_t row) {
    if constexpr (!kGrads) {
      if (kSums && named != kIgnored) sums.values[1] += 1;
      // 16 bytes at once: where several rows are bad, the host sees row and target of one of them.
      if (named == kOutOfRange) store_bits(args.bad_target, bit_cast<uint4>(BadTarget{row, args.index[row]}));
    }
  }

  __device__ void finish() const {
    if constexpr (kSums) {
      double* shared = reinterpret_cast<double*>(shared_memory());
      sum_of_grid(sums, Workspace(args.workspace), shared, [&](const Sums<2>& totals) {
        const double divisor = args.mean_of_counted ? totals.values[1] * double(args.sizes[1]) : 1.0;
        *static_cast<S*>(args.total) = store<S>(T(totals.values[0] / divisor));
      });
    }
  }
};

// Classes side by side: vectors in the order of memory. A step from one to the next adds rows and columns, so that no
// thread divides more than twice.
template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kIndexedBlocks<S, Loss>)
    indexed_rows(Loss loss, CudaPointwiseArgs args, Run<S, int64_t> run) {
  using T = Accumulate<S>;
  constexpr int width = Vector<S>::width, unroll = kIndexedUnroll<kResult, S, Loss>;
  Elements<kResult, S, Loss> element(loss, args);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int classes = int(args.sizes[1]), step_columns = int(threads * width % classes);
  const int64_t step_rows = threads * width / classes;
  int64_t row = run.vector(thread) / classes;
  int column = int(run.vector(thread) % classes);

  for (int64_t first = thread; first < run.vectors; first += unroll * threads) {
    Vector<S> x[unroll];
    int64_t rows[unroll];
    int columns[unroll], named[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      x[u] = load_vector(element.input() + run.vector(v));
      rows[u] = row;
      columns[u] = column;
      named[u] = named_by(args, row);
      row += step_rows;
      const bool carry = column >= classes - step_columns;
      column += carry ? step_columns - classes : step_columns;
      row += carry;
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      Vector<S> upstream = {};
      if (element.upstream()) upstream = load_vector(element.upstream() + run.vector(v));
      if (columns[u] == 0) element.note(named[u], rows[u]);
      T values[width], upstreams[width];
      unpack(x[u], values);
      unpack(upstream, upstreams);
      if (classes >= width) {
        // One row, or the end of one and the beginning of the next, `left` places on.
        const int left = classes - columns[u];
        int next = kBackground;
        if (left < width) {
          next = named_by(args, rows[u] + 1);
          element.note(next, rows[u] + 1);
        }
        const int place = named[u] < 0 ? -1 : named[u] - columns[u], next_place = next < 0 ? -1 : left + next;
        T factors[width];
#pragma unroll
        for (int k = 0; k < width; ++k) factors[k] = element.upstream() ? upstreams[k] : T(1);
        if (args.weight.data) {
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const bool after = k >= left;
            factors[k] *= element.weight(rows[u] + after, after ? k - left : columns[u] + k, 0);
          }
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
          values[k] = element.at(int(k == place) | int(k == next_place), values[k], factors[k]);
        }
        if (named[u] < kBackground || next < kBackground) {
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const int name = k < left ? named[u] : next;
            values[k] = name < kBackground ? element.of_no_class(name) : values[k];
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const T g = element.upstream() ? upstreams[k] : T(1);
          values[k] = element(named[u], columns[u], values[k], element.weight(rows[u], columns[u], 0), g);
          if (++columns[u] == classes && k + 1 < width) {
            columns[u] = 0;
            named[u] = named_by(args, ++rows[u]);
            element.note(named[u], rows[u]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < width; ++k) sum += values[k];
      if constexpr (!element.kSums) store_vector(element.output() + run.vector(v), pack<S>(values));
    }
    element.sums.values[0] += double(sum);
  }

  for (int64_t scalar = thread; scalar < run.scalars(); scalar += threads) {
    const int64_t i = run.scalar(scalar), of_row = i / classes, of_class = i % classes;
    const int name = named_by(args, of_row);
    if (of_class == 0) element.note(name, of_row);
    const T g = element.upstream() ? load(element.upstream()[i]) : T(1);
    const T value = element(name, of_class, load(element.input()[i]), element.weight(of_row, of_class, 0), g);
    element.sums.values[0] += double(value);
    if constexpr (!element.kSums) element.output()[i] = store<S>(value);
  }
  element.finish();
}

// kClassesOfThread classes of one row.
struct Place {
  int64_t outer = 0, group = 0, i = 0;

  FUSEDLOSS_HD Place(int64_t number, int64_t groups, int64_t inner) {
    i = number % inner;
    group = number / inner % groups;
    outer = number / inner / groups;
  }
  // The digits of a sum are those of both with a carry.
  FUSEDLOSS_HD void add(const Place& step, int64_t groups, int64_t inner) {
    i += step.i;
    group += step.group;
    outer += step.outer;
    if (i >= inner) {
      i -= inner;
      ++group;
    }
    if (group >= groups) {
      group -= groups;
      ++outer;
    }
  }
};

// Classes apart: neighbouring threads have neighbouring rows.
template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kIndexedBlocks<S, Loss>)
    indexed_columns(Loss loss, CudaPointwiseArgs args, int64_t places, Place step) {
  using T = Accumulate<S>;
  Elements<kResult, S, Loss> element(loss, args);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t classes = args.sizes[1], inner = args.sizes[0], groups = divide_up(classes, kClassesOfThread);
  Place place(thread, groups, inner);
  for (int64_t number = thread; number < places; number += threads) {
    const int64_t row = place.outer * inner + place.i;
    const int first_class = int(place.group) * kClassesOfThread;
    const int64_t first = (place.outer * classes + first_class) * inner + place.i;
    const int count = int(least(classes - first_class, kClassesOfThread)), named = named_by(args, row);
    T x[kClassesOfThread], sum = 0;
#pragma unroll
    for (int k = 0; k < kClassesOfThread; ++k) x[k] = k < count ? load(element.input()[first + k * inner]) : T(0);
    if (first_class == 0) element.note(named, row);
#pragma unroll
    for (int k = 0; k < kClassesOfThread; ++k) {
      if (k >= count) break;
      const int64_t i = first + k * inner;
      const T g = element.upstream() ? load(element.upstream()[i]) : T(1);
      const T value = element(named, first_class + k, x[k], element.weight(place.outer, first_class + k, place.i), g);
      sum += value;
      if constexpr (!element.kSums) element.output()[i] = store<S>(value);
    }
    element.sums.values[0] += double(sum);
    place.add(step, groups, inner);
  }
  element.finish();
}

__global__ void __launch_bounds__(kThreads) indexed_divisor(CudaPointwiseArgs args) {
  Sums<1> kept;
  const int64_t rows = args.sizes[2] * args.sizes[0], step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += step) {
    kept.values[0] += args.index[row] != args.ignore_index;
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(kept, Workspace(args.workspace), shared,
              [&](const Sums<1>& total) { *args.counted = total.values[0] * double(args.sizes[1]); });
}

template <PointwiseResult kResult, class S, class Loss>
cudaError_t run_kernel(const Loss& loss, const CudaPointwiseArgs& args, CudaStream stream) {
  constexpr int sums = Elements<kResult, S, Loss>::kSums ? 2 : 0;
  const int64_t inner = args.sizes[0], classes = args.sizes[1], outer = args.sizes[2];
  if (inner == 1) {
    const bool aligned = (!args.output || same_alignment(args.input.data, args.output)) &&
                         (args.one_upstream || same_alignment(args.input.data, args.upstream.data));
    const Run<S, int64_t> run(args.input.data, outer * classes, aligned);
    const int64_t work = run.vectors > run.scalars() ? run.vectors : run.scalars();
    return launch(grid_for(work, kIndexedBlocks<S, Loss>, sums), stream, indexed_rows<kResult, S, Loss>, loss, args,
                  run);
  }
  const int64_t groups = divide_up(classes, kClassesOfThread), places = outer * groups * inner;
  const Launch how = grid_for(places, kIndexedBlocks<S, Loss>, sums);
  const Place step(how.blocks * kThreads, groups, inner);
  return launch(how, stream, indexed_columns<kResult, S, Loss>, loss, args, places, step);
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

int cuda_indexed(Pointwise loss, PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  using namespace FUSEDLOSS_ISA;
  return with_indexed_functor(loss, args.input.dtype, args.params, [&](const auto& functor, auto storage) -> int {
    using S = decltype(storage);
    switch (result) {
      case PointwiseResult::Losses:
        return run_kernel<PointwiseResult::Losses, S>(functor, args, stream);
      case PointwiseResult::Sum:
        return run_kernel<PointwiseResult::Sum, S>(functor, args, stream);
      case PointwiseResult::Grad:
        return run_kernel<PointwiseResult::Grad, S>(functor, args, stream);
      default:
        return cudaErrorInvalidValue;  // backward alone makes gradients here
    }
  });
}

int cuda_indexed_divisor(const CudaPointwiseArgs& args, CudaStream stream) {
  using namespace FUSEDLOSS_ISA;
  const int64_t rows = args.sizes[2] * args.sizes[0];
  return launch(grid_for(rows, 4, 1), stream, indexed_divisor, args);
}

}  // namespace fusedloss
