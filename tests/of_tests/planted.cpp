// Small kernels, each right or with one planted mistake, for the tests of the executor:
//   planted SEED CASE [NUMBER...]
// prints the result, the last error and the fault, a line each.
#include <cuda_on_cpu.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using cuda_on_cpu::device;

constexpr int kWarp = 32;

struct Configuration {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  Configuration(const dim3& blocks, const dim3& threads, size_t shared_bytes, unsigned cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;
};

template <class... P, class... A>
cudaError_t launch(const dim3& blocks, const dim3& threads, size_t shared_bytes, unsigned cluster, void (*kernel)(P...),
                   A... arguments) {
  const Configuration configuration(blocks, threads, shared_bytes, cluster);
  return cudaLaunchKernelEx(&configuration.config, kernel, arguments...);
}

std::vector<double> one_to(long count) {
  std::vector<double> values(count);
  std::iota(values.begin(), values.end(), 1);
  return values;
}

// ---- sums

__device__ double sum_of_warp(double value) {
  for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <bool kBarrier>
__device__ double sum_of_block(double value) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = sum_of_warp(value);
  if (lane == 0) shared[warp] = value;
  if (kBarrier) __syncthreads();
  if (warp > 0) return 0;
  return sum_of_warp(lane < warps ? shared[lane] : 0);
}

template <bool kBarrier>
__global__ void __launch_bounds__(1024) block_sum(const double* values, long count, double* sum) {
  double own = 0;
  for (long i = threadIdx.x; i < count; i += blockDim.x) own += values[i];
  own = sum_of_block<kBarrier>(own);
  if (threadIdx.x == 0) *sum = own;
}

// The warps that wait for nobody are at the second sum, five shuffles on, while the first warp reads those of the
// first.
template <bool kBarrier>
__global__ void two_block_sums(double* sums) {
  const double first = sum_of_block<true>(1);
  if (kBarrier) __syncthreads();
  const double second = sum_of_block<true>(2);
  if (threadIdx.x == 0) {
    sums[0] = first;
    sums[1] = second;
  }
}

// A sum over a number of blocks whose last one adds what the others left.
__global__ void grid_sum(const double* values, long count, double* partial, unsigned* counter, double* sum) {
  double own = 0;
  for (long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) own += values[i];
  own = sum_of_block<true>(own);
  __syncthreads();
  bool* last = reinterpret_cast<bool*>(shared_memory());
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = own;
    thread_fence();
    *last = atomic_increment_to(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  __syncthreads();
  own = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) own += partial[block];
  own = sum_of_block<true>(own);
  if (threadIdx.x == 0) *sum = own;
}

template <bool kBarrier>
double run_block_sum(const long* numbers) {
  const std::vector<double> values = one_to(numbers[0]);
  double sum = -1;
  launch(1, unsigned(numbers[1]), numbers[1] / kWarp * sizeof(double), 1, block_sum<kBarrier>, values.data(),
         numbers[0], &sum);
  return sum;
}

// How many of the two are wrong.
template <bool kBarrier>
double run_two_block_sums(const long*) {
  double sums[2] = {};
  launch(1, 256, 8 * sizeof(double), 1, two_block_sums<kBarrier>, sums);
  return (sums[0] != 256) + (sums[1] != 512);
}

double run_grid_sum(const long* numbers) {
  const std::vector<double> values = one_to(numbers[0]);
  std::vector<double> partial(numbers[1]);
  unsigned counter = 0;
  double sum = -1;
  launch(unsigned(numbers[1]), 64, 2 * sizeof(double), 1, grid_sum, values.data(), numbers[0], partial.data(), &counter,
         &sum);
  return sum;
}

// ---- copies of floats, four at a time

template <bool kTail>
__global__ void copy(const float* from, float* to, int count) {
  const int thread = threadIdx.x;
  for (int vector = thread; vector < count / 4; vector += blockDim.x) {
    store_bits(to + 4 * vector, load_bits<uint4>(from + 4 * vector));
  }
  if (kTail && thread < count % 4) to[count - 1 - thread] = from[count - 1 - thread];
}

__global__ void copy_beyond_the_end(const float* from, float* to, int count) {
  for (int i = threadIdx.x; i <= count; i += blockDim.x) to[i % count] = from[i];
}

// How many elements a copy leaves wrong. numbers: count, offset of the source in elements
template <class Kernel>
double run_copy(Kernel kernel, const long* numbers) {
  const int count = int(numbers[0]), offset = int(numbers[1]);
  std::vector<float> from(count + offset, 1.5f), to(count, -1.0f);
  launch(1, 64, 0, 1, kernel, from.data() + offset, to.data(), count);
  return double(std::count(to.begin(), to.end(), -1.0f));
}

// ---- shared memory

__global__ void write_shared(int bytes) {
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared_memory()[i] = 1;
}

double run_write_shared(const long* numbers) {
  launch(1, 32, numbers[0], 1, write_shared, int(numbers[1]));
  return 0;
}

__global__ void count_nan(int count, double* nans) {
  for (int i = 0; i < count; ++i) {
    float& value = reinterpret_cast<float*>(shared_memory())[i];
    *nans += value != value;
    value = 0;
  }
}

double run_count_nan(const long* numbers) {
  double nans = 0;
  launch(unsigned(numbers[0]), 1, numbers[1] * sizeof(float), 1, count_nan, int(numbers[1]), &nans);
  return nans;
}

// Lanes tell their neighbour a value.
template <bool kBarrier>
__global__ void neighbours(int* wrong) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x;
  shared[lane] = lane;
  if (kBarrier) __syncwarp();
  *wrong += shared[(lane + 1) % kWarp] != (lane + 1) % kWarp;
}

template <bool kBarrier>
double run_neighbours(const long*) {
  int wrong = 0;
  launch(1, kWarp, kWarp * sizeof(int), 1, neighbours<kBarrier>, &wrong);
  return wrong;
}

// ---- clusters: blocks tell each other their number, and stay until the others have read it

enum class Missing { nothing, before, after };

template <Missing kMissing>
__global__ void cluster_sum(double* sums) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const unsigned rank = cluster_rank(), blocks = 4;
  if (threadIdx.x == 0) *shared = 1 + blockIdx.x;
  if (kMissing != Missing::before) cluster_barrier();
  double sum = 0;
  if (threadIdx.x == 1) {
    for (unsigned i = 1; i <= blocks; ++i) sum += *cluster_shared(shared, (rank + i) % blocks);
    sums[blockIdx.x] = sum;
  }
  if (kMissing != Missing::after) cluster_barrier();
}

// How many of the blocks have a wrong sum. numbers: clusters
template <Missing kMissing>
double run_cluster_sum(const long* numbers) {
  std::vector<double> sums(4 * numbers[0], -1);
  launch(unsigned(sums.size()), 64, sizeof(double), 4, cluster_sum<kMissing>, sums.data());
  int wrong = 0;
  for (size_t block = 0; block < sums.size(); ++block) wrong += sums[block] != 16 * double(block / 4) + 10;
  return wrong;
}

// ---- where threads are and when

__global__ void number_threads(int* seen) {
  const dim3 grid = gridDim, block = blockDim;
  const int in_grid = (blockIdx.z * grid.y + blockIdx.y) * grid.x + blockIdx.x;
  const int in_block = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
  ++seen[in_grid * block.x * block.y * block.z + in_block];
}

// How many threads were not run exactly once.
double run_number_threads(const long*) {
  std::vector<int> seen(4 * 3 * 2 * 5 * 7 * 2);
  launch(dim3(4, 3, 2), dim3(5, 7, 2), 0, 2, number_threads, seen.data());
  return double(seen.size()) - double(std::count(seen.begin(), seen.end(), 1));
}

__global__ void note_block(unsigned* counter, unsigned* order) {
  order[atomic_increment_to(counter, ~0u)] = blockIdx.x;
}

// The order in which eight blocks ran, as a number.
double run_block_order(const long*) {
  unsigned counter = 0, order[8];
  launch(8, 1, 0, 1, note_block, &counter, order);
  double digits = 0;
  for (const unsigned block : order) digits = 10 * digits + block;
  return digits;
}

// ---- what hangs, or is undefined

__global__ void barrier_or_shuffle() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    shuffle_xor(1, 1);
  }
}

__global__ void barrier_in_two_branches() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_lane_7() {
  if (threadIdx.x == 39) return;
  shuffle_xor(1.0f, 1);
}

__global__ void shuffle_of_everybody() { shuffle_xor(1.0, 1); }

__global__ void cluster_barrier_without_a_thread() {
  if (blockIdx.x == 1 && threadIdx.x == 3) return;
  cluster_barrier();
}

__global__ void throw_in_thread_5() {
  if (threadIdx.x == 5) throw std::runtime_error("planted");
  __syncthreads();
}

__global__ void share_beyond_the_cluster() { cluster_shared(shared_memory(), 2); }

__global__ void barriers_without_the_exited() {
  if (threadIdx.x % 3 == 0) return;
  __syncwarp();
  __syncthreads();
}

template <class Kernel>
double run_two_blocks_of(Kernel kernel, unsigned threads) {
  launch(2, threads, 0, 2, kernel);
  return 0;
}

// Whether a launch after a fault runs as if there had been none.
double run_after_a_fault(const long* numbers) {
  launch(1, 64, 0, 1, throw_in_thread_5);
  cudaGetLastError();
  return run_block_sum<true>(numbers);
}

// ---- what CUDA refuses

__global__ void nothing() {}

// numbers: grid x y z, block x y z, bytes of shared memory, blocks of a cluster, bytes asked for first
double run_launch(const long* numbers) {
  const auto size = [&](int i) {
    return dim3(unsigned(numbers[i]), unsigned(numbers[i + 1]), unsigned(numbers[i + 2]));
  };
  if (numbers[8]) cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, int(numbers[8]));
  return launch(size(0), size(3), size_t(numbers[6]), unsigned(numbers[7]), nothing);
}

double run_launch_on_a_small_device(const long* numbers) {
  device.multiprocessors = 4;
  device.shared_bytes = device.shared_bytes_of_multiprocessor = 4096;
  return run_launch(numbers);
}

double run_launch_without_clusters(const long* numbers) {
  device.clusters = false;
  return run_launch(numbers);
}

// How many clusters a device of four multiprocessors holds. numbers: bytes of shared memory, blocks of a cluster
double run_active_clusters(const long* numbers) {
  device.multiprocessors = 4;
  const Configuration configuration(unsigned(numbers[1]), 256, size_t(numbers[0]), unsigned(numbers[1]));
  int count = -1;
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  cudaOccupancyMaxActiveClusters(&count, nothing, &configuration.config);
  return count;
}

double run_count_launches(const long*) {
  int multiprocessors = 0, clusters = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, 0);
  for (unsigned blocks = 0; blocks < 3; ++blocks) launch(blocks, 32, 0, 1, nothing);
  cudaGetLastError();
  return 100 * double(cuda_on_cpu::launches) + 10 * (multiprocessors == 132) + clusters;
}

// ----

const std::map<std::string, std::function<double(const long*)>> kCases = {
    {"block sum", run_block_sum<true>},
    {"block sum without barrier", run_block_sum<false>},
    {"two block sums", run_two_block_sums<true>},
    {"two block sums without barrier", run_two_block_sums<false>},
    {"grid sum", run_grid_sum},
    {"copy", [](const long* numbers) { return run_copy(copy<true>, numbers); }},
    {"copy without tail", [](const long* numbers) { return run_copy(copy<false>, numbers); }},
    {"copy beyond the end", [](const long* numbers) { return run_copy(copy_beyond_the_end, numbers); }},
    {"write shared", run_write_shared},
    {"count nan", run_count_nan},
    {"neighbours", run_neighbours<true>},
    {"neighbours without barrier", run_neighbours<false>},
    {"cluster sum", run_cluster_sum<Missing::nothing>},
    {"cluster sum without barrier before", run_cluster_sum<Missing::before>},
    {"cluster sum without barrier after", run_cluster_sum<Missing::after>},
    {"number threads", run_number_threads},
    {"block order", run_block_order},
    {"barrier or shuffle", [](const long*) { return run_two_blocks_of(barrier_or_shuffle, 32); }},
    {"barrier in two branches", [](const long*) { return run_two_blocks_of(barrier_in_two_branches, 64); }},
    {"shuffle without a lane", [](const long*) { return run_two_blocks_of(shuffle_without_lane_7, 64); }},
    {"shuffle in half a warp", [](const long*) { return run_two_blocks_of(shuffle_of_everybody, 48); }},
    {"cluster barrier short", [](const long*) { return run_two_blocks_of(cluster_barrier_without_a_thread, 32); }},
    {"throw", [](const long*) { return run_two_blocks_of(throw_in_thread_5, 64); }},
    {"share beyond the cluster", [](const long*) { return run_two_blocks_of(share_beyond_the_cluster, 1); }},
    {"barriers without the exited", [](const long*) { return run_two_blocks_of(barriers_without_the_exited, 50); }},
    {"after a fault", run_after_a_fault},
    {"launch", run_launch},
    {"launch on a small device", run_launch_on_a_small_device},
    {"launch without clusters", run_launch_without_clusters},
    {"active clusters", run_active_clusters},
    {"count launches", run_count_launches},
};

}  // namespace

int main(int count, char** words) {
  if (count < 3 || !kCases.count(words[2])) return 2;
  cuda_on_cpu::set_seed(strtoull(words[1], nullptr, 10));
  std::vector<long> numbers(16);
  for (int i = 3; i < count; ++i) numbers[i - 3] = atol(words[i]);
  const double result = kCases.at(words[2])(numbers.data());
  printf("%.17g\n%d\n%s\n", result, int(cudaGetLastError()), cuda_on_cpu::fault.c_str());
}
