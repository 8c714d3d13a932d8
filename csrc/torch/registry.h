// The losses of a family that can be added to.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <string>

namespace fusedloss {

// Readers take no lock, so it never moves; losses are never freed, as their ops live as long as the process.
template <class Loss>
class Registry {
 public:
  static constexpr int64_t kMost = 1 << 14;

  template <class... Arguments>
  Loss& add(const std::string& op, const Arguments&... arguments) {
    TORCH_CHECK(count_ < kMost, op, ": expected at most ", kMost, " losses of a family in a process");
    auto* loss = new Loss(op, count_, arguments...);
    losses_[size_t(count_++)].store(loss, std::memory_order_release);
    return *loss;
  }
  Loss& operator[](int64_t number) const { return *losses_[size_t(number)].load(std::memory_order_acquire); }

 private:
  std::array<std::atomic<Loss*>, kMost> losses_{};
  int64_t count_ = 0;
};

// Where the ops of a loss that is added are defined or implemented, for the life of the process.
inline torch::Library& library_of(torch::Library::Kind kind, c10::DispatchKey key) {
  return *new torch::Library(kind, "fusedloss", key, __FILE__, __LINE__);
}

}  // namespace fusedloss
