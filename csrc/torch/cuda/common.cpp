#include "common.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace fusedloss {
namespace {

constexpr int kMaxDevices = AnswerOfEach::kMost;

std::atomic<BadTarget*> flags{nullptr};

BadTarget* allocate_flags() {
  // Never freed: kernels may still be running when the process ends. Allowed while a CUDA graph is being captured.
  c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* memory = nullptr;
  C10_CUDA_CHECK(cudaHostAlloc(&memory, kMaxDevices * sizeof(BadTarget), cudaHostAllocPortable | cudaHostAllocMapped));
  auto* allocated = static_cast<BadTarget*>(memory);
  for (int device = 0; device < kMaxDevices; ++device) allocated[device] = {-1, 0};
  BadTarget* expected = nullptr;
  return flags.compare_exchange_strong(expected, allocated) ? allocated : expected;
}

}  // namespace

BadTarget* bad_target(c10::DeviceIndex device) {
  TORCH_CHECK(device < kMaxDevices, "fusedloss knows ", kMaxDevices, " CUDA devices, got number ", int(device));
  BadTarget* all = flags.load();
  return (all ? all : allocate_flags()) + device;
}

bool has_kernels(c10::DeviceIndex device) {
  static AnswerOfEach answers;
  return answers.get(device, [&] {
    c10::cuda::CUDAGuard guard(device);
    return cuda_has_kernels();
  });
}

bool has_kernels_of(const ForCuda& loss, c10::DeviceIndex device) {
  if (!loss.has_kernels) return has_kernels(device);
  return loss.answers.get(device, [&] {
    c10::cuda::CUDAGuard guard(device);
    return loss.has_kernels();
  });
}

// Calls on a stream run one after another, and each leaves the counter in its workspace at 0. So they share one, which
// spares each an allocation and a memset. It stays, as torch's streams do: 72 KB for each stream that has been used.
Tensor workspace_of(const c10::cuda::CUDAStream& stream) {
  const auto fresh = [&] {
    return Tensor(empty_on_cuda({kCudaWorkspaceBytes}, std::nullopt, at::kByte, stream.device())).zero_();
  };
  // The number of a stream that is not torch's may go to another one, and a captured graph runs on any stream.
  const bool of_torch = stream.id() == 0 || stream.id() % 2 == 1;
  if (!of_torch || c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return fresh();
  static std::mutex mutex;
  static auto* workspaces = new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Tensor>;
  const std::lock_guard lock(mutex);
  Tensor& workspace = (*workspaces)[{stream.device_index(), stream.id()}];
  if (!workspace.defined()) workspace = fresh();
  return workspace;
}

void raise_bad_target() {
  BadTarget* all = flags.load();
  if (!all) return;
  for (int device = 0; device < kMaxDevices; ++device) {
    BadTarget& flag = all[device];
    if (__atomic_load_n(&flag.row, __ATOMIC_ACQUIRE) < 0) continue;
    const int64_t target = __atomic_load_n(&flag.target, __ATOMIC_RELAXED);
    const int64_t row = __atomic_exchange_n(&flag.row, int64_t(-1), __ATOMIC_ACQ_REL);
    if (row < 0) continue;  // another thread raises it
    TORCH_CHECK_VALUE(target != kNegativeVariance.target, "var has negative entry/entries. An earlier call on ",
                      kCudaName, ":", device, " had them, whose losses are NaN.");
    TORCH_CHECK_INDEX(false, "Target ", target, " is out of bounds. It stood in row ", row, " of an earlier call on ",
                      kCudaName, ":", device, ", whose loss is NaN.");
  }
}

void implement_scale_on_cuda(torch::Library& m) {
  m.impl("scale_", [](Tensor data, const Tensor& factor) {
    check_factor(data, factor);
    const auto dtype = kernel_dtype(data.scalar_type());
    const bool wide = factor.scalar_type() != data.scalar_type();
    if (!dtype || (wide && factor.scalar_type() != arithmetic_type(data.scalar_type())) ||
        !data.is_non_overlapping_and_dense()) {
      data.mul_(factor);
      return;
    }
    c10::cuda::CUDAGuard guard(data.device());
    check_launch(cuda_scale(*dtype, data.mutable_data_ptr(), data.numel(), factor.const_data_ptr(), wide,
                            c10::cuda::getCurrentCUDAStream().stream()));
  });
}

}  // namespace fusedloss
