// How the elements of a pointwise loss are shared out between threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../common.h"

namespace fusedloss {

constexpr int64_t kChunk = 16384;  // elements summed on their own: part of the result, not of the machine
constexpr int64_t kElementsOfThread = 4 * kChunk;  // elements worth waking a thread for

// The sum of run(begin, end) over the chunks of [0, n), added in order.
template <class F>
double sum_of_chunks(int64_t n, F run) {
  if (n <= kChunk) return run(0, n);
  std::vector<double> partial((n + kChunk - 1) / kChunk);
  parallel_for(int64_t(partial.size()), kElementsOfThread / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = run(i * kChunk, std::min(n, (i + 1) * kChunk));
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

}  // namespace fusedloss
