// The CUDA entry points for tests that have no torch tensors on a GPU: plain arguments, run by the executor.
#include <cuda_on_cpu.h>

#include "cuda/plan.h"
#include "cuda/pointwise.cuh"

namespace {

template <class Args>
Args arguments(const double* params) {
  Args args = {};
  for (int i = 0; i < fusedloss::kMaxParams; ++i) args.params[i] = params[i];
  return args;
}
template <class Args>
Args arguments(int dtype, const double* params) {
  Args args = arguments<Args>(params);
  args.dtype = fusedloss::DType(dtype);
  return args;
}

// A loss that no list names.
template <class T>
struct Custom {
  T factor;
  explicit Custom(const double* params) : factor(T(params[0])) {}
  T value(T x, T t) const { return factor * x * x * t; }
  T grad(T x, T t) const { return factor * 2 * x * t; }
  T grad_target(T x, T) const { return factor * x * x; }
};

// Filled with what an earlier call may have left there: anything, and a counter of 0.
struct Workspace {
  alignas(16) unsigned char bytes[fusedloss::kCudaWorkspaceBytes];
  Workspace() { fill(); }
  void fill() {
    memset(bytes, 0xA5, sizeof bytes);
    memset(bytes, 0, sizeof(unsigned));
  }
  // What a call returns, unless its kernels left the counter so that the next call would go wrong.
  int error_or(int error) const {
    unsigned counter = 0;
    memcpy(&counter, bytes, sizeof counter);
    return error != 0 ? error : counter == 0 ? 0 : int(cudaErrorLaunchFailure);
  }
};

fusedloss::SoftmaxLayout layout(const int64_t* of) { return {of[0], of[1], of[2], of[3], of[4], of[5]}; }

// The plan of rows; what: 0 forward, 1 forward with gradient, 2 backward.
template <class S, class Loss>
fusedloss::cuda::RowsPlan rows_plan(int what, const fusedloss::SoftmaxLayout& of, bool in_place) {
  const fusedloss::cuda::Device device;
  const auto other_shared_bytes = [](const fusedloss::cuda::RowsPlan& plan) {
    return 1024 + plan.threads / plan.lanes * plan.unfinished_of_group() * 32;
  };
  if (what == 0) return fusedloss::cuda::plan_forward<S, Loss>(of, device);
  if (what == 1) return fusedloss::cuda::plan_forward_with_gradient<S, Loss>(of, device, other_shared_bytes);
  return fusedloss::cuda::plan_backward<S, Loss>(of, device, in_place);
}

}  // namespace

extern "C" {

void pretend(uint64_t seed, int multiprocessors, int shared_bytes, int clusters) {
  cuda_on_cpu::set_seed(seed);
  cuda_on_cpu::device = {};
  cuda_on_cpu::device.multiprocessors = multiprocessors;
  cuda_on_cpu::device.shared_bytes = shared_bytes;
  cuda_on_cpu::device.clusters = clusters != 0;
}

// From here on, until pretend() is called, launches are checked for another device and not run.
void only_plan(int shared_bytes_of_multiprocessor, int threads_of_multiprocessor) {
  cuda_on_cpu::device.shared_bytes_of_multiprocessor = shared_bytes_of_multiprocessor;
  cuda_on_cpu::device.threads_of_multiprocessor = threads_of_multiprocessor;
  cuda_on_cpu::device.runs = false;
}
void last_launch(int64_t* of) {
  const cudaLaunchConfig_t& config = cuda_on_cpu::last_launch;
  of[0] = config.gridDim.x;
  of[1] = cuda_on_cpu::volume(config.blockDim);
  of[2] = int64_t(config.dynamicSmemBytes);
}
void plan_rows(int what, int dtype, int64_t rows, int64_t classes, int in_place, int64_t* of) {
  fusedloss::cuda::with_storage(fusedloss::DType(dtype), [&](auto storage) {
    using S = decltype(storage);
    using Loss = fusedloss::cuda::Focal<fusedloss::cuda::Accumulate<S>>;
    const auto plan = rows_plan<S, Loss>(what, {rows, classes, rows, 0, 1, classes}, in_place);
    const int64_t found[] = {plan.lanes,       plan.threads,
                             plan.parts,       plan.cluster,
                             plan.blocks,      plan.slice,
                             plan.resident,    plan.resident_vectors,
                             plan.consecutive, int64_t(plan.resident_bytes())};
    memcpy(of, found, sizeof found);
    return 0;
  });
}

const char* fault() { return cuda_on_cpu::fault.c_str(); }
int64_t launches() { return cuda_on_cpu::launches; }

// What a pointwise call is given, as kernels.py fills it; the custom loss where its number is negative.
struct PointwiseCall {
  int64_t loss, result, arithmetic, one_upstream, output_dtype, total_dtype, count, dims;
  int64_t sizes[fusedloss::kMaxDims];
  fusedloss::Operand input, target, weight, third, upstream;
  double params[fusedloss::kMaxParams];
  double scale, divisor;
  void *output, *total;
  int64_t bad_target[2];
};

int run_pointwise(PointwiseCall* call) {
  auto args = arguments<fusedloss::CudaPointwiseArgs>(call->params);
  Workspace workspace;
  fusedloss::BadTarget bad = {-1, 0};
  args.bad_target = &bad;
  args.arithmetic = fusedloss::DType(call->arithmetic);
  args.input = call->input;
  args.target = call->target;
  args.weight = call->weight;
  args.third = call->third;
  args.upstream = call->upstream;
  args.one_upstream = call->one_upstream;
  args.dims = int(call->dims);
  for (int d = 0; d < args.dims; ++d) args.sizes[d] = call->sizes[d];
  args.output = call->output;
  args.output_dtype = fusedloss::DType(call->output_dtype);
  args.scale = call->scale;
  args.count = call->count;
  args.total = call->total;
  args.total_dtype = fusedloss::DType(call->total_dtype);
  args.divisor = call->divisor;
  args.workspace = workspace.bytes;
  const auto result = fusedloss::PointwiseResult(call->result);
  const int error = call->loss < 0 ? fusedloss::cuda::run_pointwise<Custom>(result, args, nullptr)
                                   : fusedloss::cuda_pointwise(fusedloss::Pointwise(call->loss), result, args, nullptr);
  call->bad_target[0] = bad.row;
  call->bad_target[1] = bad.target;
  return workspace.error_or(error);
}

// As the kernels divide where there are so many elements.
int64_t quotient(int64_t number, int64_t size, int64_t count) {
  fusedloss::CudaPointwiseArgs args = {};
  args.dims = 1;
  args.sizes[0] = size;
  args.count = count;
  const auto numbering = fusedloss::cuda::numbering_of(fusedloss::PointwiseResult::Sum, args);
  return numbering.narrow ? int64_t(numbering.quotient(uint32_t(number), 0)) : numbering.quotient(number, 0);
}

// layout: outer, classes, inner; weight_strides: outer, class, inner. The gradient of a mean finds its own divisor.
int run_indexed(int loss, int result, int dtype, const double* params, const int64_t* layout, const void* input,
                const int64_t* index, int64_t ignore_index, const void* weight, const int64_t* weight_strides,
                void* output, const void* upstream, int64_t upstream_stride, void* total, int mean,
                int64_t* bad_target) {
  auto args = arguments<fusedloss::CudaPointwiseArgs>(params);
  Workspace workspace;
  fusedloss::BadTarget bad = {-1, 0};
  double counted = 0;
  const auto of = fusedloss::DType(dtype);
  args.dims = 3;
  for (int d = 0; d < 3; ++d) args.sizes[d] = layout[2 - d];
  args.input = {input, of, true, {}};
  args.index = index;
  args.ignore_index = ignore_index;
  args.weight = {weight, of, false, {weight_strides[2], weight_strides[1], weight_strides[0]}};
  args.output = output;
  args.output_dtype = of;
  args.upstream = {upstream, of, true, {}};
  args.one_upstream = upstream_stride == 0;
  args.count = layout[0] * layout[1] * layout[2];
  args.total = total;
  args.total_dtype = of;
  args.scale = args.divisor = 1;
  args.mean_of_counted = mean != 0;
  args.counted = &counted;
  args.bad_target = &bad;
  args.workspace = workspace.bytes;
  const auto what = fusedloss::PointwiseResult(result);
  int error = 0;
  if (mean && what == fusedloss::PointwiseResult::Grad) error = fusedloss::cuda_indexed_divisor(args, nullptr);
  error = workspace.error_or(error);
  workspace.fill();
  if (error == 0) error = fusedloss::cuda_indexed(fusedloss::Pointwise(loss), what, args, nullptr);
  bad_target[0] = bad.row;
  bad_target[1] = bad.target;
  return workspace.error_or(error);
}

// What a softmax call is given, as kernels.py fills it.
struct SoftmaxCall {
  int64_t what, loss, dtype, wide, byte_target, wide_probabilities, ignore_index, mean, zero_for_none, in_place;
  int64_t upstream_stride, upstream_second_stride;
  double params[fusedloss::kMaxParams];
  int64_t logits_layout[6], probabilities_layout[6], grad_layout[6];
  const void *logits, *target, *probabilities, *weight, *sample_weight, *upstream, *upstream_second;
  void *losses, *second, *total, *statistics, *divisor, *grad;
  int64_t bad_target[2];
};

// what: 0 divisor, 1 forward, 2 backward
int run_softmax(SoftmaxCall* call) {
  auto args = arguments<fusedloss::CudaSoftmaxArgs>(int(call->dtype), call->params);
  Workspace workspace;
  fusedloss::BadTarget bad = {-1, 0};
  args.wide = call->wide;
  args.logits_layout = layout(call->logits_layout);
  args.probabilities_layout = layout(call->probabilities_layout);
  args.grad_layout = layout(call->grad_layout);
  args.logits = call->logits;
  args.target = call->target;
  args.byte_target = call->byte_target;
  args.probabilities = call->probabilities;
  args.wide_probabilities = call->wide_probabilities;
  args.weight = call->weight;
  args.sample_weight = call->sample_weight;
  args.ignore_index = call->ignore_index;
  args.losses = call->losses;
  args.second = call->second;
  args.total = call->total;
  args.mean = call->mean;
  args.zero_for_none = call->zero_for_none;
  args.statistics = call->statistics;
  args.divisor = call->divisor;
  args.grad = call->grad;
  args.upstream = call->upstream;
  args.upstream_stride = call->upstream_stride;
  args.upstream_second = call->upstream_second;
  args.upstream_second_stride = call->upstream_second_stride;
  args.in_place = call->in_place;
  args.bad_target = &bad;
  args.workspace = workspace.bytes;
  const auto entry = call->what == 0   ? fusedloss::cuda_softmax_divisor
                     : call->what == 1 ? fusedloss::cuda_softmax_forward
                                       : fusedloss::cuda_softmax_backward;
  const int error = entry(fusedloss::Softmax(call->loss), args, nullptr);
  call->bad_target[0] = bad.row;
  call->bad_target[1] = bad.target;
  return workspace.error_or(error);
}

// What a loss of row sums is given, as executor.py fills it.
struct RowSumsCall {
  int64_t backward, loss, dtype, result_dtype, label_type, rows, columns, upstream_stride;
  int64_t row_strides[fusedloss::kMostOperands];
  double params[fusedloss::kMaxParams];
  double scale, divisor;
  const void* operands[fusedloss::kMostOperands];
  const void *target, *weight, *upstream;
  void *losses, *total;
  void* grads[fusedloss::kMostOperands];
  int64_t bad_target[2];
};

int run_row_sums(RowSumsCall* call) {
  auto args = arguments<fusedloss::CudaRowSumsArgs>(int(call->dtype), call->params);
  Workspace workspace;
  fusedloss::BadTarget bad = {-1, 0};
  args.result_dtype = fusedloss::DType(call->result_dtype);
  args.label_type = fusedloss::LabelType(call->label_type);
  args.rows = call->rows;
  args.columns = call->columns;
  for (int k = 0; k < fusedloss::kMostOperands; ++k) {
    args.operands[k] = call->operands[k];
    args.row_strides[k] = call->row_strides[k];
    args.grads[k] = call->grads[k];
  }
  args.target = call->target;
  args.weight = call->weight;
  args.upstream = call->upstream;
  args.upstream_stride = call->upstream_stride;
  args.losses = call->losses;
  args.total = call->total;
  args.scale = call->scale;
  args.divisor = call->divisor;
  args.bad_target = &bad;
  args.workspace = workspace.bytes;
  const auto entry = call->backward ? fusedloss::cuda_row_sums_backward : fusedloss::cuda_row_sums_forward;
  const int error = entry(fusedloss::RowSums(call->loss), args, nullptr);
  call->bad_target[0] = bad.row;
  call->bad_target[1] = bad.target;
  return workspace.error_or(error);
}

int run_scale(int dtype, void* data, int64_t count, const void* factor, int wide) {
  return fusedloss::cuda_scale(fusedloss::DType(dtype), data, count, factor, wide != 0, nullptr);
}

}  // extern "C"
