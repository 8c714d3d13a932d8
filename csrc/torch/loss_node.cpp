#include "loss_node.h"

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

namespace fusedloss {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::PackedArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// What compiled autograd hands to a backward, as values: it runs them while it traces, and again without a compiler.
struct KeptValues final : Kept {
  variable_list saved;
  std::vector<bool> wanted;

  explicit KeptValues(PackedArgs&& packed) {
    call.loss = packed.unpack<int64_t>();
    call.reduction = packed.unpack<int64_t>();
    call.ignore_index = packed.unpack<int64_t>();
    call.flags = packed.unpack<int64_t>();
    const auto params = packed.unpack<std::vector<double>>();
    call.params.assign(params.begin(), params.end());
    of_forward.made = packed.unpack<bool>();
    saved = packed.unpack<variable_list>();
    wanted = packed.unpack<std::vector<bool>>();
    of_forward.left = std::move(saved.back());
    saved.pop_back();
  }

  static PackedArgs packed(const Kept& kept, size_t inputs) {
    PackedArgs packed;
    packed.pack(kept.call.loss);
    packed.pack(kept.call.reduction);
    packed.pack(kept.call.ignore_index);
    packed.pack(kept.call.flags);
    packed.pack(std::vector<double>(kept.call.params.begin(), kept.call.params.end()));
    packed.pack(kept.of_forward.made);
    const SavedTensors tensors = kept.tensors();
    variable_list saved(tensors.begin(), tensors.end());
    saved.push_back(kept.of_forward.left);
    packed.pack(saved);
    std::vector<bool> wanted;
    for (size_t i = 0; i < inputs; ++i) wanted.push_back(kept.wants(i));
    packed.pack(wanted);
    return packed;
  }

  SavedTensors tensors() const override {
    SavedTensors tensors;
    std::copy(saved.begin(), saved.end(), tensors.begin());
    return tensors;
  }
  bool wants(size_t input) const override { return wanted[input]; }
};

// "CrossEntropy" of cross_entropy.
std::string joined_words(const std::string& name) {
  std::string joined;
  bool begins = true;
  for (const char letter : name) {
    if (letter != '_') joined += begins && 'a' <= letter && letter <= 'z' ? char(letter - 'a' + 'A') : letter;
    begins = letter == '_';
  }
  return joined;
}

class LossNode final : public Node, public Kept {
 public:
  LossNode(const Backward& backward, SavedCall&& call, GradientOfForward&& of_forward)
      : Kept(std::move(call), std::move(of_forward)), backward(backward) {}

  void save(size_t i, const Tensor& tensor) { saved[i] = SavedVariable(tensor, /*is_output=*/false); }

  // What a printed loss shows behind grad_fn.
  std::string name() const override {
    if (!backward.op) return std::string("fusedloss::") + backward.name;
    std::string name = base_name(backward.op(call.loss));
    // custom_<name>_<digest> is a loss of a user's own.
    if (name.rfind("custom_", 0) == 0 && name.rfind('_') > 7) name = name.substr(7, name.rfind('_') - 7);
    return "fusedloss::" + joined_words(name) + "Backward";
  }

  SavedTensors tensors() const override {
    TORCH_CHECK(!freed, torch::autograd::ERR_BACKWARD_TWICE);
    SavedTensors tensors;
    for (size_t i = 0; i < kMostSaved; ++i) tensors[i] = saved[i].unpack();
    return tensors;
  }

  // Asked while the engine runs the node alone.
  bool wants(size_t input) const override { return const_cast<LossNode*>(this)->task_should_compute_output(input); }

  variable_list apply(variable_list&& upstreams) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return backward.run(*this, upstreams);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& tensor : saved) tensor.reset_data();
    of_forward.left.reset();
    freed = true;
  }

  // Compiled autograd asks what a graph of the backward is made for, and then makes it.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(std::string(backward.name));
    for (const int64_t number : {call.loss, call.reduction, call.ignore_index, call.flags}) args.collect(number);
    args.collect(c10::ArrayRef<double>(call.params));
    args.collect(c10::ArrayRef<SavedVariable>(saved), /*is_output=*/false);
    args.collect(of_forward.made);
    args.collect(of_forward.left);
  }

  variable_list apply_with_saved(const variable_list& upstreams, SwapSavedVariables& swapped) override {
    for (SavedVariable& tensor : saved) swapped.before(tensor);
    swapped.before(of_forward.left);
    const PackedArgs packed = KeptValues::packed(*this, num_outputs());
    std::vector<at::TypePtr> types;
    for (const at::IValue& value : packed.vec()) types.push_back(value.type());
    const auto run = [&backward = backward](const variable_list& given, const std::vector<at::IValue>& values) {
      KeptValues kept((PackedArgs(values)));
      return backward.run(kept, given);
    };
    namespace compiled = torch::dynamo::autograd;
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function = compiler->bind_function(swapped.get_py_compiler(), backward.name, run, types,
                                                         /*is_custom_function=*/true, backward.traceable);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    const variable_list gradients =
        compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, upstreams, packed.vec(),
                                compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(next_edges())));
    for (SavedVariable& tensor : saved) swapped.after(tensor);
    swapped.after(of_forward.left);
    return gradients;
  }

 private:
  const Backward& backward;
  std::array<SavedVariable, kMostSaved> saved;
  bool freed = false;
};

// An owner of nodes as the edges of this torch have it; that of torch 2.11 is a std::shared_ptr.
template <class Owner, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Owner, std::shared_ptr<Node>>) {
    return std::shared_ptr<LossNode>(new LossNode(std::forward<Arguments>(arguments)...),
                                     [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<LossNode>(std::forward<Arguments>(arguments)...);
  }
}

}  // namespace

void differentiate(const Backward& backward, SavedCall call, GradientOfForward of_forward,
                   c10::ArrayRef<const Tensor*> inputs, c10::ArrayRef<const Tensor*> saved,
                   c10::ArrayRef<const Tensor*> results) {
  const auto requires_grad = [](const Tensor* input) { return input->requires_grad(); };
  if (!at::GradMode::is_enabled() || std::none_of(inputs.begin(), inputs.end(), requires_grad)) return;
  const auto node =
      make_node<decltype(torch::autograd::Edge::function)>(backward, std::move(call), std::move(of_forward));
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const Tensor* input : inputs) edges.push_back(torch::autograd::impl::gradient_edge(*input));
  node->set_next_edges(std::move(edges));
  size_t i = 0;
  for (const Tensor* tensor : saved) {
    if (tensor && tensor->defined()) node->save(i, *tensor);
    ++i;
  }
  for (const Tensor* result : results) torch::autograd::set_history(*result, node);
}

}  // namespace fusedloss
