// The kernels of the backward and the plan that launches them:
//
//      sort_pairs             where the pairs of each query and of each key are
//          |
//      16-bit features, and all samples of a window fit a tile?
//          | yes              | no
//      gradient_tile      list_terms          the terms of every row, to memory
//      V = W X on             |
//      tensor cores       some channels of all rows of a window fit shared memory?
//                             | yes              | no, or float64
//                         gradient_rows       gather
//                         terms read rows     terms read rows from memory, or from the
//                         from shared memory  second-level cache
//
// gradient_tile needs no lists, since the weights of a window are a matrix in shared memory. The
// gradient of a row is written by one block in every case: nothing is added atomically.
#pragma once

#include "plan.h"

namespace salkernels {
namespace cuda {

SALKERNELS_BACKWARD_KERNELS(SALKERNELS_DEFINE_KERNEL)

inline void add_gradient_rows(Plan& plan, const Problem& p) {
  const int64_t rows = p.nodes() * p.grid.pixels(), words = p.tiling.slice_words;
  if (words == 0) {  // no slice is narrow enough
    SALKERNELS_ADD_BY_DTYPE(plan, gather, p.dtype, ceil_div(rows, kWarps), 1, 0);
    return;
  }
  const int64_t width = words * (p.dtype == kFloat32 ? 1 : 2);
  const int64_t blocks = p.units() * ceil_div(p.channels, width);
  const int64_t bytes = rows_shared_bytes(p, words);
  switch (p.dtype) {
    case kBFloat16: SALKERNELS_ADD(plan, gradient_rows_bf16, blocks, 1, bytes); break;
    case kFloat16: SALKERNELS_ADD(plan, gradient_rows_fp16, blocks, 1, bytes); break;
    default:
      if (words == 64) {
        SALKERNELS_ADD(plan, gradient_rows_wide, blocks, 1, bytes);
      } else {
        SALKERNELS_ADD(plan, gradient_rows_fp32, blocks, 1, bytes);
      }
  }
}

inline Plan plan_backward(Problem& p, int64_t shared_limit) {
  Plan plan;
  const int64_t rows = p.groups * (p.maps[0].samples + p.maps[1].samples) + 2;
  plan.require_numbers(p);
  SALKERNELS_ADD(plan, sort_pairs, ceil_div(rows, kWarps), 1, 0);
  if (tile_tiling(p, shared_limit)) {
    const Tiling& t = p.tiling;
    const int64_t bytes =
        gradient_shared_bytes(t.units * p.group_nodes() * p.window_pixels(), t.stages);
    const int64_t blocks = ceil_div(p.units(), t.units);
    if (p.dtype == kBFloat16) {
      SALKERNELS_ADD(plan, gradient_tile_bf16, blocks, 1, bytes);
    } else {
      SALKERNELS_ADD(plan, gradient_tile_fp16, blocks, 1, bytes);
    }
    return plan;
  }
  list_tiling(p, shared_limit);
  const int64_t warps = p.units() * p.group_nodes() * p.tiling.team;
  const int64_t wide = p.dtype == kFloat64 ? 8 : 4;
  const int64_t counted = p.tiling.lists_in_memory ? 0 : p.window_pixels();
  const int64_t bytes = terms_shared_bytes(counted, p.tiling.team, wide);
  if (p.dtype == kFloat64) {
    SALKERNELS_ADD(plan, list_terms_f64, ceil_div(warps, kWarps), 1, bytes);
  } else {
    SALKERNELS_ADD(plan, list_terms_f32, ceil_div(warps, kWarps), 1, bytes);
  }
  add_gradient_rows(plan, p);
  return plan;
}

// Whether the backward lists terms, and so needs memory for them.
inline bool backward_lists(Problem p, int64_t shared_limit) {
  return !tile_tiling(p, shared_limit);
}

}  // namespace cuda
}  // namespace salkernels
