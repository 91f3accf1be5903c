// Pairs: which part of the list belongs to a group, found on the device, since the list may live
// there and must not be waited for; and the loss of each, from the maxima of its pixels.
//
//   pairs   3 7 8 | 17 20 | 36 -1 -1      places in (G, N, M), ascending, then room left over
//   group     0       1      2
#pragma once

#include "rows.cuh"

namespace salkernels {
namespace cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The place of entry i, or the size of the table for room left over.
__device__ inline int64_t pair_place(const Problem& p, int64_t i) {
  if (p.pairs == nullptr) return i;
  const int64_t place = p.pairs[i], table = p.table();
  return place >= 0 && place < table ? place : table;
}

// How many entries of the list lie before a place: a warp takes 32 probes at a time.
__device__ inline int64_t pairs_before(const Problem& p, int64_t place) {
  if (p.pairs == nullptr) return place;
  const int lane = threadIdx.x % 32;
  int64_t first = 0, count = p.num_pairs;
  while (count > 0) {
    // Pieces of `step` entries; the last one of each is probed.
    const int64_t step = (count + 31) / 32, begin = lane * step;
    const int64_t probe = begin + step < count ? begin + step : count;
    const bool less = begin < count && pair_place(p, first + probe - 1) < place;
    const int64_t passed = __popc(__ballot_sync(kAllLanes, less)) * step;
    first += passed < count ? passed : count;
    // Of the piece that was not passed the last entry is known.
    count = passed < count ? (step < count - passed ? step : count - passed) - 1 : 0;
  }
  return first;
}

// A block for each 8 rows of the outputs: the losses of these pairs, each the mean of |1 - m| in an
// order that never changes, and in fp64: an fp32 sum over a large map would lose digits. A row
// without a pair is filled with what takes no part, of which that is 0.
//
//   thread t: pair t % 8 of the block, pixels t / 8, t / 8 + 32, ...
template <class F>
__device__ void reduce_losses(const Problem& p) {
  SALKERNELS_SHARED(memory);
  const int64_t plane = p.grid.pixels();
  const int64_t slot = blockIdx.x * int64_t(kLossPairs) + threadIdx.x % kLossPairs;
  const bool exists = slot < p.num_pairs, paired = exists && pair_place(p, slot) < p.table();
  F* const max_sim = static_cast<F*>(p.max_sim) + slot;
  double sum = 0;
  if (paired) {
    // So many loads are on their way side by side: a block waits for memory a few times in all.
    constexpr int kStep = kThreads / kLossPairs, kLoads = 16;
    double sums[4] = {};
    int64_t i = threadIdx.x / kLossPairs;
    for (; i + (kLoads - 1) * kStep < plane; i += kLoads * kStep) {
      F values[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) values[j] = max_sim[(i + j * kStep) * p.num_pairs];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) sums[j % 4] += fabs(F(1) - values[j]);
    }
    // The rest likewise; behind the end is what costs nothing.
    F values[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = i + j * kStep;
      values[j] = at < plane ? max_sim[at * p.num_pairs] : F(1);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sums[j % 4] += fabs(F(1) - values[j]);
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  } else if (exists) {
    for (int64_t i = threadIdx.x / kLossPairs; i < plane; i += kThreads / kLossPairs) {
      max_sim[i * p.num_pairs] = 1;
      store_argmax(p, match_index(p, slot, i), no_match(p));
    }
  }
  double* const of_warp = reinterpret_cast<double*>(memory);
  for (int step = 16; step >= kLossPairs; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % 32 < kLossPairs) {
    of_warp[threadIdx.x / 32 * kLossPairs + threadIdx.x % 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kLossPairs || !exists) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w * kLossPairs + threadIdx.x];
  static_cast<F*>(p.loss)[slot] = F(sum / double(plane));
}

// One block: the mean of the losses, in an order that never changes.
template <class F>
__device__ void mean_loss(const Problem& p) {
  SALKERNELS_SHARED(memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.num_pairs; i += kThreads) {
    sum += static_cast<const F*>(p.loss)[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  double* const of_warp = reinterpret_cast<double*>(memory);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  *static_cast<F*>(p.mean) = F(sum / double(p.num_pairs));
}

}  // namespace cuda
}  // namespace salkernels
