// Preloaded, it lets the k-th large allocation fail, as where memory ends; glibc's functions serve all others.
#include <atomic>
#include <cerrno>
#include <cstddef>

namespace {

std::atomic<long> left{0};  // large allocations until one fails; 0: none does
std::atomic<size_t> large{0};

bool fails(size_t bytes) { return bytes >= large.load() && left.load() > 0 && left.fetch_sub(1) == 1; }

}  // namespace

extern "C" {

void* __libc_malloc(size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void fail_allocation(long k, size_t bytes) {
  large = bytes;
  left = k;
}

// How many more would have had to come; 0 where one failed.
long allocations_left() { return left.exchange(0); }

void* malloc(size_t bytes) {
  if (!fails(bytes)) return __libc_malloc(bytes);
  errno = ENOMEM;
  return nullptr;
}

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  if (fails(bytes)) return ENOMEM;
  *memory = __libc_memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}
}
