// Losses that are known by sums over a row. A warp or a block takes a row at a time and reads it once for its sums; for
// a gradient it reads it again, mostly from a cache, and writes the gradients of all operands together.
#include "common.cuh"

#include "../kernels/row_sums_functors.h"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <class S>
constexpr int kRowSumsBlocks = sizeof(S) == 8 ? 2 : 4;  // resident on a multiprocessor

// Neighbouring columns that a thread takes at a time: a vector, of double one number.
template <class S>
constexpr int kRowSumsWidth = sizeof(S) == 8 ? 1 : Vector<S>::width;

template <class S, class Loss, int kWidth>
struct ThreadOfRow {
  using T = Accumulate<S>;
  static constexpr int kOperands = Loss::operands, kSums = Loss::sums, kUnroll = 2;

  const Loss& loss;
  const CudaRowSumsArgs& args;
  const int64_t row;
  const int lanes, lane, columns;
  const S* operands[kOperands];
  RowFacts<T> facts = {};
  int target = -1;  // of a loss that takes a class: a column that adds nothing

  __device__ ThreadOfRow(const Loss& loss, const CudaRowSumsArgs& args, int64_t row, int lanes)
      : loss(loss), args(args), row(row), lanes(lanes), lane(threadIdx.x % lanes), columns(int(args.columns)) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      operands[k] = static_cast<const S*>(args.operands[k]) + row * args.row_strides[k];
    }
    if constexpr (takes_labels<Loss>) facts.label = T(label_of(args, row));
    if constexpr (takes_class<Loss>) {
      const int64_t given = static_cast<const int64_t*>(args.target)[row];
      if (uint64_t(given) < uint64_t(columns)) {
        target = int(given);
        facts.own = load(operands[0][target]);
        facts.weight = weight_of_class<T>(args, given);
      } else {  // no hinge is open, so that the gradient is 0; the loss is NaN
        facts.own = infinity<T>();
        facts.weight = args.losses || args.total ? T(NAN) : T(0);
        if (lane == 0 && (args.losses || args.total))
          store_bits(args.bad_target, bit_cast<uint4>(BadTarget{row, given}));
      }
    }
  }

  __device__ void read(int column, T (&x)[kOperands][kWidth]) const {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) unpack(load_vector<S, kWidth>(operands[k] + column), x[k]);
  }

  // In every thread of the row. `of_warps` is shared memory.
  __device__ void sum(T (&sums)[kSums], T* of_warps) const {
    double totals[kSums] = {};
    const int step = lanes * kWidth;
    for (int first = lane * kWidth; first < columns; first += kUnroll * step) {
      T part[kSums] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int column = first + u * step;
        if (column >= columns) break;
        T x[kOperands][kWidth];
        read(column, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          T numbers[kOperands], terms[kSums];
#pragma unroll
          for (int k = 0; k < kOperands; ++k) numbers[k] = x[k][i];
          loss.terms(numbers, facts, terms);
          if (takes_class<Loss> && column + i == target) continue;
#pragma unroll
          for (int s = 0; s < kSums; ++s) part[s] += terms[s];
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) totals[s] += double(part[s]);
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      sums[s] = T(totals[s]);
#pragma unroll
      for (int mask = kWarp / 2; mask; mask /= 2) sums[s] += shuffle_xor(sums[s], mask);
    }
    if (lanes > kWarp) {
      __syncthreads();  // the row before has been read
      if (lane % kWarp == 0) {
        for (int s = 0; s < kSums; ++s) of_warps[lane / kWarp * kSums + s] = sums[s];
      }
      __syncthreads();
      for (int s = 0; s < kSums; ++s) {
        sums[s] = of_warps[s];
        for (int warp = 1; warp < kWarps; ++warp) sums[s] += of_warps[warp * kSums + s];
      }
    }
  }

  __device__ void write(const T (&sums)[kSums], T upstream) const {
    T coefficients[Loss::coefficients];
    loss.gradient(sums, facts, upstream, coefficients);
    for (int column = lane * kWidth; column < columns; column += lanes * kWidth) {
      T x[kOperands][kWidth], made[kOperands][kWidth];
      read(column, x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        T numbers[kOperands], grads[kOperands];
#pragma unroll
        for (int k = 0; k < kOperands; ++k) numbers[k] = x[k][i];
        loss.gradients(numbers, facts, coefficients, grads);
        if constexpr (takes_class<Loss>) {
          if (column + i == target) grads[0] = Loss::own_gradient(sums, coefficients);
        }
#pragma unroll
        for (int k = 0; k < kOperands; ++k) made[k][i] = grads[k];
      }
#pragma unroll
      for (int k = 0; k < kOperands; ++k) {
        S* grad = static_cast<S*>(args.grads[k]);
        if (grad) store_vector(grad + row * args.columns + column, pack<S>(made[k]));
      }
    }
  }
};

template <bool kBackward, int kWidth, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kRowSumsBlocks<S>)
    row_sums_kernel(Loss loss, CudaRowSumsArgs args, int lanes) {
  using T = Accumulate<S>;
  const int rows = kThreads / lanes;  // of a block at a time
  double* shared = reinterpret_cast<double*>(shared_memory());
  Sums<1> total;
  for (int64_t first = int64_t(blockIdx.x) * rows; first < args.rows; first += int64_t(gridDim.x) * rows) {
    const int64_t row = first + threadIdx.x / lanes;
    if (row >= args.rows) break;  // whole warps
    const ThreadOfRow<S, Loss, kWidth> thread(loss, args, row, lanes);
    T sums[Loss::sums];
    thread.sum(sums, reinterpret_cast<T*>(shared));
    if constexpr (kBackward) {
      thread.write(sums, number_of<T>(args.upstream, args.result_dtype, row * args.upstream_stride) * T(args.scale));
    } else if (thread.lane == 0) {
      const T value = loss.value(sums, thread.facts);
      if (args.losses) set_number_of(args.losses, args.result_dtype, row, value);
      total.values[0] += double(value);
    }
  }
  if constexpr (!kBackward) {
    if (!args.total) return;
    sum_of_grid(total, Workspace(args.workspace), shared, [&](const Sums<1>& all) {
      set_number_of(args.total, args.result_dtype, 0, T(all.values[0] / args.divisor));
    });
  }
}

// ---- host side

template <class S>
bool reads_vectors(const CudaRowSumsArgs& args) {
  constexpr int width = kRowSumsWidth<S>;
  bool all = width > 1 && args.columns % width == 0;
  for (int k = 0; k < kMostOperands; ++k) {
    all = all && args.row_strides[k] % width == 0 && same_alignment(args.operands[k], nullptr) &&
          same_alignment(args.grads[k], nullptr);
  }
  return all;
}

template <bool kBackward>
int run_row_sums(RowSums loss, const CudaRowSumsArgs& args, CudaStream stream) {
  return with_storage(args.dtype, [&](auto storage) -> int {
    using S = decltype(storage);
    return with_row_sums<Accumulate<S>>(loss, args.params, [&](const auto& functor) -> int {
      using Loss = std::decay_t<decltype(functor)>;
      constexpr int kMostLoadsOfLane = 8;
      const bool vectors = reads_vectors<S>(args);
      const int64_t loads = args.columns / (vectors ? kRowSumsWidth<S> : 1);
      const int lanes = loads <= kMostLoadsOfLane * kWarp ? kWarp : kThreads;
      Launch how = {least(divide_up(args.rows, kThreads / lanes), Device().resident_blocks(kRowSumsBlocks<S>)),
                    dim3(kThreads)};
      how.shared = kWarps * size_t(Loss::sums) * sizeof(double);
      if constexpr (kRowSumsWidth<S> > 1) {
        if (vectors)
          return launch(how, stream, row_sums_kernel<kBackward, kRowSumsWidth<S>, S, Loss>, functor, args, lanes);
      }
      return launch(how, stream, row_sums_kernel<kBackward, 1, S, Loss>, functor, args, lanes);
    });
  });
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

int cuda_row_sums_forward(RowSums loss, const CudaRowSumsArgs& args, CudaStream stream) {
  return FUSEDLOSS_ISA::run_row_sums<false>(loss, args, stream);
}

int cuda_row_sums_backward(RowSums loss, const CudaRowSumsArgs& args, CudaStream stream) {
  return FUSEDLOSS_ISA::run_row_sums<true>(loss, args, stream);
}

}  // namespace fusedloss
