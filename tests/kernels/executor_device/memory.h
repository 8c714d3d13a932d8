// Memory of the device: the host's, each tensor's in pages of its own, with a page behind it that nobody may touch.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/mman.h>

#include <atomic>
#include <cstring>

namespace executor_device {

// Writes just before or behind a tensor that its pages let pass, found when it was freed.
inline std::atomic<int64_t> spoilt{0};

class Memory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device = c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getDevice();
    if (bytes == 0) return {nullptr, device};
    auto* block = new Block(bytes);
    return {block->data, block, &release, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static constexpr size_t kPage = 4096, kAligned = 16;
  static constexpr unsigned char kFilled = 0xFF;  // NaN in every type, and -1

  static size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

  struct Block {
    size_t bytes, pages;
    unsigned char *begin, *data;

    explicit Block(size_t bytes_) : bytes(bytes_), pages(rounded(rounded(bytes, kAligned), kPage)) {
      void* mapped = mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK(mapped != MAP_FAILED, "the executor's device is out of memory: ", bytes, " bytes asked for");
      begin = static_cast<unsigned char*>(mapped);
      data = begin + pages - rounded(bytes, kAligned);
      mprotect(begin + pages, kPage, PROT_NONE);
      memset(begin, kFilled, pages);
    }
    ~Block() {
      const auto changed = [](const unsigned char* from, const unsigned char* to) {
        while (from < to && *from == kFilled) ++from;
        return from < to;
      };
      if (changed(begin, data) || changed(data + bytes, begin + pages)) ++spoilt;
      munmap(begin, pages + kPage);
    }
  };

  static void release(void* block) { delete static_cast<Block*>(block); }
};

}  // namespace executor_device
