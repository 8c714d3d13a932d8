// Every op of the package: its schema, its autograd side, and its kernels on each device.

#include "distillation_in_place.h"
#include "pointwise.h"
#include "row_sums.h"
#include "softmax.h"

namespace fusedloss {
namespace {

template <class F>
void for_each_device(F f) {
  for (const Device& device : devices()) {
    // The ops live as long as the process.
    auto& m = *new torch::Library(torch::Library::IMPL, "fusedloss", device.key, __FILE__, __LINE__);
    f(device, m);
  }
}

template <class F>
void for_each_op_in_place(F f) {
  f("scale_");
  for (const char* name : kDistillationInPlace) f(name);
  for (int i = 0; i < kSoftmaxLosses; ++i) {
    for (const std::string& name : softmax_ops_in_place(softmax_loss(i))) f(name);
  }
}

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_FRAGMENT(fusedloss, m) {
  using namespace fusedloss;
  m.def("scale_(Tensor(a!) data, Tensor factor) -> ()");
  for (int i = 0; i < kPointwiseLosses; ++i) define_pointwise(m, pointwise_loss(i));
  for (int i = 0; i < kSoftmaxLosses; ++i) define_softmax(m, softmax_loss(i));
  for (int i = 0; i < kRowSumsLosses; ++i) define_row_sums(m, row_sums_loss(i));
  define_distillation(m);
  define_distillation_in_place(m);
  for_each_device([](const Device& device, torch::Library& on_device) {
    device.implement_scale(on_device);
    for (int i = 0; i < kPointwiseLosses; ++i) device.implement_pointwise(on_device, pointwise_loss(i));
    for (int i = 0; i < kSoftmaxLosses; ++i) device.implement_softmax(on_device, softmax_loss(i));
    for (int i = 0; i < kRowSumsLosses; ++i) device.implement_row_sums(on_device, row_sums_loss(i));
    device.implement_distillation(on_device);
  });
}

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  using namespace fusedloss;
  for (int i = 0; i < kPointwiseLosses; ++i) implement_pointwise_under_autograd(m, pointwise_loss(i));
  for (int i = 0; i < kSoftmaxLosses; ++i) implement_softmax_under_autograd(m, softmax_loss(i));
  for (int i = 0; i < kRowSumsLosses; ++i) implement_row_sums_under_autograd(m, row_sums_loss(i));
  implement_distillation_under_autograd(m);
  for_each_op_in_place([&](const std::string& name) { refuse_derivatives_in_place(m, name); });
}

TORCH_LIBRARY_IMPL(fusedloss, ADInplaceOrView, m) {
  fusedloss::for_each_op_in_place([&](const std::string& name) { fusedloss::count_changes(m, name); });
}

TORCH_LIBRARY_IMPL(fusedloss, Negative, m) {
  fusedloss::for_each_op_in_place([&](const std::string& name) { fusedloss::refuse_negated_views(m, name); });
}
