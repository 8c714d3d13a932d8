// The devices that have kernels, in one table: to add one, add its line in devices.cpp and its folder beside cpu/ and
// cuda/.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/OptionalArrayRef.h>
#include <torch/library.h>

#include <array>
#include <atomic>

namespace fusedloss {

struct PointwiseLoss;
struct RowSumsLoss;
struct SoftmaxLoss;

// Yes or no for each device of a type, asked once.
class AnswerOfEach {
 public:
  static constexpr int kMost = 64;

  template <class Ask>
  bool get(c10::DeviceIndex device, Ask ask) {
    if (device < 0 || device >= kMost) return false;
    std::atomic<Answer>& answer = answers_[size_t(device)];
    if (answer.load(std::memory_order_relaxed) == Answer::Unknown)
      answer.store(ask() ? Answer::Yes : Answer::No, std::memory_order_relaxed);
    return answer.load(std::memory_order_relaxed) == Answer::Yes;
  }

 private:
  enum class Answer : signed char { Unknown, No, Yes };
  std::array<std::atomic<Answer>, kMost> answers_{};
};

// Which GPUs there are kernels of a loss for: one of the list has them wherever this build has, one compiled apart
// where its library says so.
struct ForCuda {
  bool compiled;          // false: for the CPU alone
  bool (*has_kernels)();  // of a loss compiled apart: whether for the current device; otherwise null
  mutable AnswerOfEach answers;
};

struct Device {
  const char* name;  // "cpu"
  c10::DeviceType type;
  c10::DispatchKey key;       // its ops are registered under it
  c10::DispatchKeySet plain;  // kernels can read a tensor that has no other keys as it is
  int64_t most_classes;       // of a row
  bool host_reads;            // the host can read a number of a tensor without waiting for the device
  // Whether forward makes the gradient of a loss over rows unasked. On a CPU that saves a read and an exponential, and
  // multiplying takes no longer than a backward of its own. A GPU would move 4 logits instead of 3 where the upstream
  // gradient is not 1.
  bool row_gradient_in_forward_pays;
  bool vectors_begin_alike;               // kernels read and write vectors only where both begin alike
  bool autocast_refuses_probabilities;    // torch's autocast raises for binary_cross_entropy
  bool margins_of_halves;                 // torch's multi_margin_loss takes half types
  bool rows_of_any_two_dtypes;            // kernels read a student beside a teacher of any dtype
  bool (*has_kernels)(c10::DeviceIndex);  // whether this build has code for that device
  bool (*runs)(const ForCuda&);           // whether a loss was compiled for devices of the type
  bool (*has_kernels_of)(const ForCuda&, c10::DeviceIndex);  // and has code for that one
  bool (*runs_class_indices)(bool has_third);                // and over class indices
  // Memory for what a kernel writes, every element of it: past the dispatcher, which takes longer than the rest of a
  // small loss, and past the filling that torch's deterministic mode adds. Contiguous where no strides are given.
  at::TensorBase (*empty)(at::IntArrayRef sizes, at::OptionalIntArrayRef strides, at::ScalarType, c10::Device);
  void (*implement_scale)(torch::Library&);
  void (*implement_pointwise)(torch::Library&, const PointwiseLoss&);
  void (*implement_softmax)(torch::Library&, const SoftmaxLoss&);
  void (*implement_row_sums)(torch::Library&, const RowSumsLoss&);
  void (*implement_distillation)(torch::Library&);
};

c10::ArrayRef<Device> devices();

// Why a loss that was compiled apart does not run on a device.
constexpr const char* kForCpuAlone = "a loss that was compiled for the CPU alone";
constexpr const char* kForOtherGpus = "a loss that was compiled for other GPUs";

// The line of a tensor's device; raises where there is none.
const Device& device_for(const at::Tensor& tensor);

}  // namespace fusedloss
