// A stack that runs a body until the body suspends it: one for every CUDA thread under way.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

inline void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(begin, bytes);
#endif
}
inline void unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// A place to go on from. AddressSanitizer is told of every change of stacks.
struct Context {
  void* registers[5];
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;

  void leave_for([[maybe_unused]] const Context& other) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack, other.stack, other.stack_bytes);
#endif
  }
  void arrive_from([[maybe_unused]] Context& other) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &other.stack, &other.stack_bytes);
#endif
  }
};

// The compiler's own setjmp: swapcontext asks the kernel for the signal mask and takes 20 times as long, and a longjmp
// known to AddressSanitizer would unpoison the stack it leaves. No function may hold both halves.
[[noreturn]] __attribute__((noinline, no_sanitize_address)) inline void go_on(void** registers) {
  __builtin_longjmp(registers, 1);
}
__attribute__((noinline, no_sanitize_address)) inline void exchange(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) go_on(to);
  asm volatile("" ::: "memory");
}
__attribute__((noinline, no_sanitize_address)) inline void exchange(void** from, const ucontext_t* to) {
  if (__builtin_setjmp(from) == 0) setcontext(to);
  asm volatile("" ::: "memory");
}

class Fiber {
 public:
  explicit Fiber(void (*body)()) : body_(body) {
    const size_t bytes = kGuardBytes + kStackBytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);  // an overflow is a crash at once
    context_.stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    context_.stack_bytes = kStackBytes;
  }
  ~Fiber() {
    unpoison(context_.stack, kStackBytes);
    munmap(const_cast<unsigned char*>(static_cast<const unsigned char*>(context_.stack)) - kGuardBytes,
           kGuardBytes + kStackBytes);
  }
  Fiber(const Fiber&) = delete;

  // Goes on with the body until it suspends. A body that returned has suspended too, and is called anew next time.
  void resume() {
    running_ = this;
    resumer_.leave_for(context_);
    if (started_) {
      exchange(resumer_.registers, context_.registers);
    } else {
      start();
    }
    resumer_.arrive_from(context_);
  }

  static void suspend() {
    Fiber& self = *running_;
    self.context_.leave_for(resumer_);
    exchange(self.context_.registers, resumer_.registers);
    self.context_.arrive_from(resumer_);
  }

  // Leaves whatever is on the stack: for a body that will never be resumed.
  void abandon() {
    unpoison(context_.stack, kStackBytes);
    context_.fake_stack = nullptr;
    started_ = false;
  }

 private:
  static constexpr size_t kGuardBytes = 64 << 10;  // a page, of any size

  void start() {
    started_ = true;
    ucontext_t entry;
    getcontext(&entry);
    entry.uc_stack.ss_sp = const_cast<void*>(context_.stack);
    entry.uc_stack.ss_size = kStackBytes;
    makecontext(&entry, run, 0);
    exchange(resumer_.registers, &entry);
  }

  static void run() {
    running_->context_.arrive_from(resumer_);
    for (;;) {
      running_->body_();
      suspend();
    }
  }

  static inline Fiber* running_ = nullptr;
  static inline Context resumer_;

  Context context_;
  void (*body_)();
  bool started_ = false;
};

}  // namespace cuda_on_cpu
