// Runs a grid on one OS thread: the blocks of a cluster together, clusters one after another, all in random order.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread under way: they change whenever another is resumed.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

using Source = std::source_location;

inline std::string fault;  // the first since set_seed(); empty while all is well

// splitmix64
class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }
  uint64_t below(uint64_t limit) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % limit;
  }

 private:
  uint64_t state_ = 0;
};

inline Random random_number;

inline uint64_t volume(const dim3& size) { return uint64_t(size.x) * size.y * size.z; }
inline uint3 position(uint64_t number, const dim3& size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

// Exactly the bytes asked for, so that AddressSanitizer sees the first one beyond.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), begin_(new(std::align_val_t(16)) unsigned char[bytes]) {
    memset(begin_, 0xFF, bytes);        // NaN
    if (bytes == 0) poison(begin_, 1);  // the allocator has given one
  }
  ~SharedMemory() {
    unpoison(begin_, bytes_ > 0 ? bytes_ : 1);
    operator delete[](begin_, std::align_val_t(16));
  }
  SharedMemory(const SharedMemory&) = delete;

  // The block has gone, others of its cluster may not look any more.
  void perish() {
    memset(begin_, 0xFF, bytes_);
    poison(begin_, bytes_);
  }
  unsigned char* begin() { return begin_; }
  bool contains(const void* p) const { return p >= begin_ && p <= begin_ + bytes_; }

 private:
  size_t bytes_;
  unsigned char* begin_;
};

// Where a thread is. Meetings are in the order of how many meet.
enum Place { kShuffle, kSyncWarp, kSyncThreads, kClusterBarrier, kRunning, kExited, kPlaces };

constexpr int kLanes = 32;
struct Block;
struct Thread;

struct Warp {
  Block* block;
  uint32_t lanes;
  uint32_t at[kPlaces];  // the lanes at each place
  Thread* threads[kLanes];
  uint64_t offers[2][kLanes];  // to shuffle; two, as a fast lane offers again before a slow one has looked
  unsigned shuffles;

  Warp(Block* block_, int count) : block(block_), lanes(~0u >> (kLanes - count)), at{}, shuffles(0) {
    at[kRunning] = lanes;
  }
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster
  int threads;
  int at[kPlaces] = {};  // how many threads are at each place
  SharedMemory shared;
  std::vector<Warp> warps;
  Source sync_source;  // of the __syncthreads that threads wait at

  Block(const uint3& index_, unsigned rank_, int threads_, size_t shared_bytes)
      : index(index_), rank(rank_), threads(threads_), shared(shared_bytes) {
    at[kRunning] = threads;
    for (int first = 0; first < threads; first += kLanes) {
      warps.emplace_back(this, threads - first < kLanes ? threads - first : kLanes);
    }
  }
};

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  int lane = 0;
  uint3 index = {};
  Source source;  // of the meeting it waits at

  explicit Thread(void (*body)()) : fiber(body) {}
  uint32_t bit() const { return 1u << lane; }
  Block& block() const { return *warp->block; }
};

inline std::string text(const uint3& v) {
  return std::string("(") + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
inline std::string text(const Source& source) {
  return std::string(source.file_name()) + ":" + std::to_string(source.line());
}
inline std::string text(const Thread& thread) {
  return std::string("thread ") + text(thread.index) + " of block " + text(thread.block().index);
}
inline std::string whereabouts(const Thread& thread) {
  const char* const meetings[] = {"shuffle_xor", "__syncwarp", "__syncthreads", "cluster_barrier"};
  for (int place = kShuffle; place <= kClusterBarrier; ++place) {
    if (thread.warp->at[place] & thread.bit()) {
      return std::string("waits at ") + meetings[place] + " (" + text(thread.source) + ")";
    }
  }
  return "has exited";
}

struct Grid {
  std::function<void()> kernel;
  dim3 blocks, threads, cluster;
  size_t shared_bytes;
};

class Executor {
 public:
  // Whether the grid came to its end; `fault` says why not.
  bool run(const Grid& grid) {
    kernel_ = &grid.kernel;
    gridDim = grid.blocks;
    blockDim = grid.threads;
    failed_ = false;
    for (const uint64_t cluster : in_random_order(volume(grid.blocks) / volume(grid.cluster))) {
      enter(grid, cluster);
      run_cluster();
      leave();
      if (failed_) return false;
    }
    return true;
  }

  // ---- for the thread under way

  Block& block() { return current_->block(); }

  void meet(Place place, const Source& source) {
    if (place == kSyncThreads) check_same_barrier(source);
    current_->source = source;
    move(*current_->warp, current_->bit(), kRunning, place);
    release_if_met(*current_->warp, place);
    Fiber::suspend();
  }

  uint64_t shuffle_xor(uint64_t bits, int lane_mask, const Source& source) {
    if (lane_mask < 0 || lane_mask >= kLanes) throw std::runtime_error("shuffle_xor reaches out of the warp");
    Warp& warp = *current_->warp;
    const int lane = current_->lane;
    uint64_t* offers = warp.offers[warp.shuffles % 2];
    offers[lane] = bits;
    meet(kShuffle, source);
    return offers[lane ^ lane_mask];
  }

  unsigned char* shared_of(unsigned rank, const void* mine) {
    SharedMemory& shared = block().shared;
    if (rank >= blocks_.size()) throw std::runtime_error("cluster_shared of a block that is not in the cluster");
    if (!shared.contains(mine)) throw std::runtime_error("cluster_shared of what is not in shared memory");
    return blocks_[rank]->shared.begin() + (static_cast<const unsigned char*>(mine) - shared.begin());
  }

 private:
  static std::vector<uint64_t> in_random_order(uint64_t count) {
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number.below(i)]);
    return order;
  }

  void enter(const Grid& grid, uint64_t cluster) {
    const dim3 size = grid.cluster;
    const uint3 corner = position(cluster, {grid.blocks.x / size.x, grid.blocks.y / size.y, grid.blocks.z / size.z});
    for (unsigned rank = 0; rank < volume(size); ++rank) {
      const uint3 at = position(rank, size);
      const uint3 index = {corner.x * size.x + at.x, corner.y * size.y + at.y, corner.z * size.z + at.z};
      blocks_.push_back(std::make_unique<Block>(index, rank, int(volume(grid.threads)), grid.shared_bytes));
    }
    size_t used = 0;
    for (const auto& block : blocks_) {
      for (int number = 0; number < block->threads; ++number, ++used) {
        if (used == threads_.size()) threads_.emplace_back(run_thread);
        place(threads_[used], *block, number);
      }
      for (Warp& warp : block->warps) warps_.push_back(&warp);
    }
  }

  static void place(Thread& thread, Block& block, int number) {
    thread.warp = &block.warps[number / kLanes];
    thread.lane = number % kLanes;
    thread.index = position(number, blockDim);
    thread.warp->threads[thread.lane] = &thread;
  }

  void leave() {
    for (Warp* warp : warps_) {
      for (uint32_t left = warp->lanes & ~warp->at[kExited]; left; left &= left - 1) {
        warp->threads[std::countr_zero(left)]->fiber.abandon();
      }
    }
    warps_.clear();
    blocks_.clear();
  }

  // A warp's turn lasts for one thread or for thousands, so that it may be a lane or many barriers ahead of another.
  void run_cluster() {
    while (Warp* warp = any_running()) {
      const uint64_t turn = uint64_t(1) << random_number.below(13);
      for (uint64_t i = 0; i < turn && warp->at[kRunning]; ++i) {
        resume(any_running(*warp));
        if (failed_) return;
      }
    }
    check_deadlock();
  }

  Warp* any_running() {
    const size_t count = warps_.size(), begin = random_number.below(count);
    for (size_t i = 0; i < count; ++i) {
      Warp* warp = warps_[(begin + i) % count];
      if (warp->at[kRunning]) return warp;
    }
    return nullptr;
  }
  static Thread& any_running(const Warp& warp) {
    const int begin = int(random_number.below(kLanes));
    return *warp.threads[(begin + std::countr_zero(std::rotr(warp.at[kRunning], begin))) % kLanes];
  }

  void resume(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block().index;
    thread.fiber.resume();
  }

  static void run_thread();

  void exit() {
    Warp& warp = *current_->warp;
    move(warp, current_->bit(), kRunning, kExited);
    release_if_met(warp, kSyncWarp);
    release_if_met(warp, kSyncThreads);
    if (block().at[kExited] == block().threads) block().shared.perish();
  }

  static void move(Warp& warp, uint32_t lanes, Place from, Place to) {
    warp.at[from] &= ~lanes;
    warp.at[to] |= lanes;
    warp.block->at[from] -= std::popcount(lanes);
    warp.block->at[to] += std::popcount(lanes);
  }
  static void release(Warp& warp, Place place) { move(warp, warp.at[place], place, kRunning); }
  static void release(Block& block, Place place) {
    for (Warp& warp : block.warps) release(warp, place);
  }

  void release_if_met(Warp& warp, Place place) {
    Block& block = *warp.block;
    if (place == kShuffle && warp.at[kShuffle] == ~0u) {
      ++warp.shuffles;
      release(warp, place);
    }
    if (place == kSyncWarp && !absent(warp, place)) release(warp, place);
    if (place == kSyncThreads && block.at[kSyncThreads] + block.at[kExited] == block.threads) release(block, place);
    if (place == kClusterBarrier && block.at[kClusterBarrier] == block.threads) {
      for (const auto& other : blocks_) {
        if (other->at[kClusterBarrier] < other->threads) return;
      }
      for (const auto& other : blocks_) release(*other, place);
    }
  }

  // ---- faults

  void fail(const std::string& what) {
    failed_ = true;
    if (fault.empty()) fault = what;
  }

  // Two barriers in two branches: whether they meet is undefined in CUDA.
  void check_same_barrier(const Source& source) {
    Source& first = block().sync_source;
    if (block().at[kSyncThreads] == 0) first = source;
    if (first.line() == source.line() && first.column() == source.column()) return;
    throw std::runtime_error(std::string("__syncthreads (") + text(source) + ") while others wait at another (" +
                             text(first) + ")");
  }

  // Who does not come to the meeting; the exited need not come to one within a block.
  static uint32_t absent(const Warp& warp, int place) {
    const bool without_exited = place == kSyncWarp || place == kSyncThreads;
    return warp.lanes & ~warp.at[place] & ~(without_exited ? warp.at[kExited] : 0);
  }
  static bool meets(const Warp& warp, const Warp& other, int place) {
    if (place == kClusterBarrier) return true;
    return place == kSyncThreads ? warp.block == other.block : &warp == &other;
  }

  // Nobody runs: whoever still waits waits in vain.
  void check_deadlock() {
    for (int place = kShuffle; place <= kClusterBarrier; ++place) {
      for (const Warp* warp : warps_) {
        if (warp->at[place]) return fail(explain(*warp->threads[std::countr_zero(warp->at[place])], place));
      }
    }
  }
  std::string explain(const Thread& waiting, int place) const {
    const std::string begin = text(waiting) + " " + whereabouts(waiting) + " for ";
    for (const Warp* warp : warps_) {
      if (!meets(*waiting.warp, *warp, place) || !absent(*warp, place)) continue;
      const Thread& missing = *warp->threads[std::countr_zero(absent(*warp, place))];
      return begin + text(missing) + ", which " + whereabouts(missing);
    }
    return begin + "lanes that its warp does not have";
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;  // of the cluster under way, by rank
  std::vector<Warp*> warps_;                    // of all of them
  std::deque<Thread> threads_;                  // and of clusters to come
  Thread* current_ = nullptr;
  bool failed_ = false;
};

inline Executor executor;

inline void Executor::run_thread() {
  const auto fail = [](const std::string& what) { executor.fail(text(*executor.current_) + " throws: " + what); };
  try {
    (*executor.kernel_)();
  } catch (const std::exception& exception) {
    fail(exception.what());
  } catch (...) {
    fail("no std::exception");
  }
  executor.exit();
}

}  // namespace cuda_on_cpu
