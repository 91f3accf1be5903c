// Pairs: where the list has each, on the device, since the list may live there and must not be
// waited for; and the loss of each, from the maxima of its pixels.
#pragma once

#include "rows.cuh"

namespace salkernels {
namespace cuda {

// One block: the list turned round. Whatever in it is no place in the table is room left over.
__device__ inline void number_pairs(const Problem& p) {
  const int64_t table = p.table();
  for (int64_t i = threadIdx.x; i < table; i += kThreads) p.slots[i] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.num_pairs; i += kThreads) {
    const int64_t place = p.pairs[i];
    if (place >= 0 && place < table) p.slots[place] = int32_t(i);
  }
}

// Whether a row of the outputs belongs to a pair.
__device__ inline bool is_pair(const Problem& p, int64_t row) {
  if (p.pairs == nullptr) return true;
  const int64_t place = p.pairs[row];
  return place >= 0 && place < p.table() && p.slots[place] == row;
}

// A block for each row of the outputs: the loss of its pair, the mean of |1 − m| in an order that
// never changes, and in fp64: an fp32 sum over a large map would lose digits. A row without a pair is filled with what takes no part, of which that is 0.
template <class F>
__device__ void reduce_losses(const Problem& p) {
  SALKERNELS_SHARED(memory);
  const int64_t plane = p.grid.pixels(), first = blockIdx.x * plane;
  F* const max_sim = static_cast<F*>(p.max_sim) + first;
  double sum = 0;
  if (is_pair(p, blockIdx.x)) {
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) sum += fabs(F(1) - max_sim[i]);
  } else {
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) {
      max_sim[i] = 1;
      store_argmax(p, first + i, no_match(p));
    }
  }
  double* const of_warp = reinterpret_cast<double*>(memory);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  static_cast<F*>(p.loss)[blockIdx.x] = F(sum / double(plane));
}

}  // namespace cuda
}  // namespace salkernels
