// Pairs: their numbers, on the device, since the mask may live there and must not be waited for;
// and the loss of each, from the maxima of its pixels.
#pragma once

#include "rows.cuh"

namespace salkernels {
namespace cuda {

// One block: pairs are numbered in the row-major order of the mask. The count stands after the
// table. A pair beyond `capacity` gets -2, and its loss is NaN: there is nobody to be told.
__device__ inline void number_pairs(const Problem& p) {
  SALKERNELS_SHARED(memory);
  int32_t* const of_warp = reinterpret_cast<int32_t*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t keys = p.maps[1].samples, queries = p.maps[0].samples, table = p.table();
  int64_t before = 0;  // pairs of earlier rounds
  for (int64_t first = 0; first < table; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    bool on = false;
    if (i < table) {
      const int64_t group = i / keys / queries, query = i / keys % queries, key = i % keys;
      on = p.mask[group * p.mask_strides[0] + query * p.mask_strides[1] +
                  key * p.mask_strides[2]] != 0;
    }
    const uint32_t votes = __ballot_sync(0xffffffffu, on);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int64_t slot = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) slot += of_warp[w];
      before += of_warp[w];
    }
    if (i < table) p.slots[i] = !on ? -1 : slot < p.capacity ? int32_t(slot) : -2;
    __syncthreads();
  }
  if (threadIdx.x == 0) p.slots[table] = int32_t(before < p.capacity ? before : p.capacity);
}

__device__ inline int64_t num_pairs(const Problem& p) {
  return p.slots == nullptr ? p.table() : p.slots[p.table()];
}

// Blocks 0 to G·N·M: the loss of a pair, the mean of |1 − m| in an order that never changes.
// The rest, if any: one row of argmax and max_sim, cleared if it belongs to no pair.
template <class F>
__device__ void reduce_losses(const Problem& p) {
  SALKERNELS_SHARED(memory);
  const int64_t table = p.table(), plane = p.grid.pixels();
  if (blockIdx.x >= table) {
    const int64_t row = blockIdx.x - table;
    if (row < num_pairs(p)) return;
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) {
      static_cast<F*>(p.max_sim)[row * plane + i] = 0;
      if (p.wide_index) {
        static_cast<int32_t*>(p.argmax)[row * plane + i] = 0;
      } else {
        static_cast<uint8_t*>(p.argmax)[row * plane + i] = 0;
      }
    }
    return;
  }
  const int64_t slot = p.slots == nullptr ? int64_t(blockIdx.x) : p.slots[blockIdx.x];
  F sum = 0;
  if (slot >= 0) {
    const F* max_sim = static_cast<const F*>(p.max_sim) + slot * plane;
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) sum += fabs(F(1) - max_sim[i]);
  }
  F* const of_warp = reinterpret_cast<F*>(memory);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  static_cast<F*>(p.loss)[blockIdx.x] = slot == -2 ? F(NAN) : sum / F(plane);
}

}  // namespace cuda
}  // namespace salkernels
