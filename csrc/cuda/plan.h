// Which threads do what part of which row: plain arithmetic on the shape and the device.
#pragma once

#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {

// Vectors in flight a thread: 64 bytes, half of it in double, whose arithmetic needs the registers.
template <class S>
constexpr int kRowUnroll = sizeof(S) == 8 ? 2 : 4;

// Blocks of kThreads that are resident on a multiprocessor: 4 leave a thread 64 registers, 3 leave 80, 2 leave 128. A
// loss that sums more than the exponentials needs more registers.
template <class S, class Loss, bool kGrad>
constexpr int kRowBlocks = sizeof(S) == 8 || Loss::Sum::has_factors ? 2 : (kGrad || Loss::Sum::has_sum ? 3 : 4);

struct RowsPlan {
  int lanes = 1;    // threads of a row within a block: some of a warp, or all of the block
  int threads = 1;  // of a block, kThreads at most
  int parts = 1;    // blocks of a row
  int cluster = 1;  // parts, where they form a cluster
  int64_t blocks = 1;
  int slice = 0;  // logits of a part
  bool vectorised = false;
  bool resident = false;  // a slice stays in shared memory between the two passes over it
  int resident_vectors = 0;
  int consecutive = 1;  // rows that a group takes one after another, backward

  FUSEDLOSS_HD bool split() const { return parts > cluster; }
  FUSEDLOSS_HD int unfinished_of_group() const { return lanes < kWarp ? lanes : kWarp; }
  size_t resident_bytes() const { return resident ? size_t(threads / lanes) * size_t(resident_vectors) * 16 : 0; }
};

// Lanes, threads and vectors of a row, before it is shared out between blocks.
template <class S>
RowsPlan plan_row(int64_t classes) {
  constexpr int width = Vector<S>::width, kMostLoadsOfWarp = 16 * kWarp;
  RowsPlan plan;
  plan.slice = int(classes);
  // Below, heads and tails that are no vectors would be most of a row.
  plan.vectorised = classes >= 16 * width;
  const int64_t loads = plan.vectorised ? classes / width : classes;
  if (loads <= kMostLoadsOfWarp) {
    plan.lanes = int(least(kWarp, power_of_two_from(divide_up(loads, kRowUnroll<S>))));
    plan.threads = kThreads;
  } else {
    plan.lanes = plan.threads = int(least(kThreads, power_of_two_from(divide_up(loads, 2 * kRowUnroll<S>))));
  }
  return plan;
}

// Logits of one part of a row; whole vectors, which keeps the row's alignment. The last parts may be empty.
template <class S>
int slice_of(int64_t classes, int64_t parts) {
  return int(divide_up(divide_up(classes, parts), Vector<S>::width) * Vector<S>::width);
}

template <class S, class Loss>
RowsPlan plan_forward(const SoftmaxLayout& layout, const Device& device) {
  RowsPlan plan = plan_row<S>(layout.classes);
  const int64_t resident = device.resident_blocks(kRowBlocks<S, Loss, false> * kThreads / plan.threads, plan.threads);
  plan.blocks = least(divide_up(layout.rows, plan.threads / plan.lanes), resident);
  if (plan.lanes > kWarp && layout.rows * 2 <= resident) {
    // Rows that would leave half the device idle: several blocks each, while a thread still has loads to do.
    const int64_t most = layout.classes / (int64_t(plan.threads) * kRowUnroll<S> * Vector<S>::width);
    const int64_t parts = least(resident / layout.rows, most);
    if (parts > 1) {
      plan.parts = int(parts);
      plan.slice = slice_of<S>(layout.classes, parts);
      plan.blocks = layout.rows * parts;
    }
  }
  return plan;
}

// A row stays in shared memory if it fits, in up to 64 KB of a block so that the loads of one overlap the stores of
// another; a longer one in that of a cluster; what fits nowhere is read twice.
template <class S, class Loss, class F>
RowsPlan plan_forward_with_gradient(const SoftmaxLayout& layout, const Device& device, F other_shared_bytes) {
  constexpr int kMostParts = 8;
  constexpr int64_t kGoodBytes = 64 << 10;
  RowsPlan plan = plan_row<S>(layout.classes);
  const int64_t other = int64_t(other_shared_bytes(plan)), available = device.shared_bytes - other;
  const auto fits = [&](int parts, int64_t bytes) {
    return slice_of<S>(layout.classes, parts) * int64_t(sizeof(S)) <= least(bytes, available);
  };
  if (plan.lanes > kWarp && device.clusters && fits(kMostParts, available)) {
    while (plan.cluster < kMostParts && !fits(plan.cluster, kGoodBytes)) plan.cluster *= 2;
    plan.parts = plan.cluster;
    plan.slice = slice_of<S>(layout.classes, plan.parts);
  }
  plan.resident_vectors = plan.slice / Vector<S>::width;
  plan.resident = plan.vectorised && plan.resident_vectors * int64_t(16) * (plan.threads / plan.lanes) <= available;
  const int64_t resident = device.resident_blocks(kRowBlocks<S, Loss, true> * kThreads / plan.threads, plan.threads,
                                                  size_t(other) + plan.resident_bytes()) /
                           plan.parts;
  plan.blocks = least(divide_up(layout.rows, plan.threads / plan.lanes), resident > 0 ? resident : 1) * plan.parts;
  return plan;
}

// Nothing is reduced, so every block takes a slice of its own, two rounds of loads a thread: with one, a block would
// wait for its row's few numbers as long as it then works. In place, one block takes
// the whole row, so that it reads the target's logit before anything is overwritten.
template <class S, class Loss>
RowsPlan plan_backward(const SoftmaxLayout& layout, const Device& device, bool in_place) {
  constexpr int kMostConsecutive = 16;
  RowsPlan plan = plan_row<S>(layout.classes);
  const int64_t groups = plan.threads / plan.lanes;
  if (plan.lanes <= kWarp) {
    // As many rows as fill the last round of resident blocks like the others.
    const int64_t round = groups * device.multiprocessors * kRowBlocks<S, Loss, true>;
    const int64_t rounds = divide_up(layout.rows, round * least(kMostConsecutive, plan.lanes));
    plan.consecutive = int(divide_up(layout.rows, round * rounds));
  } else if (!in_place) {
    plan.slice = 2 * plan.threads * kRowUnroll<S> * Vector<S>::width;
    plan.parts = int(divide_up(layout.classes, plan.slice));
  }
  plan.blocks = divide_up(layout.rows, plan.threads / plan.lanes * plan.consecutive) * plan.parts;
  return plan;
}

}  // namespace fusedloss::FUSEDLOSS_ISA
