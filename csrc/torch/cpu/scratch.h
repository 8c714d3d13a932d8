// Scratch memory of a CPU's kernels.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace fusedloss {

// Room for each of torch's threads, which the calling thread takes before a kernel writes: where there is none the call
// raises, and no gradient is half-written over its logits. The calling thread keeps it: 128 KB for each thread, or its
// longest row.
class Scratch {
 public:
  // 0: none is wanted.
  explicit Scratch(size_t bytes) : lines_((bytes + sizeof(Line) - 1) / sizeof(Line)) {
    if (lines_ == 0) return;
    static thread_local std::unique_ptr<Line[]> kept;
    static thread_local size_t size = 0;
    // A thread of a parallel region, which runs the whole call, has a number too.
    const size_t threads = std::max(at::get_num_threads(), at::get_thread_num() + 1), needed = lines_ * threads;
    if (size < needed) {
      kept.reset();
      size = 0;
      kept.reset(new (std::nothrow) Line[needed]);  // each thread is the first to touch its own part
      TORCH_CHECK(kept, "can't allocate memory: ", needed * sizeof(Line), " bytes for the kernels of ", threads,
                  " threads");
      size = needed;
    }
    begin_ = kept.get();
  }

  // That of the running thread, or null.
  void* get() const { return lines_ ? begin_ + lines_ * at::get_thread_num() : nullptr; }

 private:
  // Of a cache: two threads share none, and no vector is stored across two.
  struct alignas(64) Line {
    char bytes[64];
  };
  size_t lines_;
  Line* begin_ = nullptr;
};

}  // namespace fusedloss
