// The kernels of the forward and the plan that launches them.
#pragma once

#include "plan.h"

namespace salkernels {
namespace cuda {

SALKERNELS_FORWARD_KERNELS(SALKERNELS_DEFINE_KERNEL)

inline void add_norms(Plan& plan, const Problem& p) {
  const int64_t rows =
      p.groups * most(p.maps[0].samples, p.maps[1].samples) * p.grid.pixels();
  SALKERNELS_ADD_BY_DTYPE(plan, norms, p.dtype, ceil_div(rows, kWarps), p.set_form ? 1 : 2, 0);
}

inline void add_tiles(Plan& plan, const Problem& p, bool tf32, int64_t blocks, int64_t bytes) {
  if (tf32) {
    SALKERNELS_ADD(plan, match_tf32, blocks, 1, bytes);
    return;
  }
  switch (p.dtype) {
    case kBFloat16: SALKERNELS_ADD(plan, match_bf16, blocks, 1, bytes); break;
    case kFloat16: SALKERNELS_ADD(plan, match_fp16, blocks, 1, bytes); break;
    default: SALKERNELS_ADD(plan, match_fp32, blocks, 1, bytes);
  }
}

inline void add_many_tiles(Plan& plan, const Problem& p, bool tf32, int64_t blocks,
                           int64_t bytes) {
  if (tf32) {
    SALKERNELS_ADD(plan, match_tiles_tf32, blocks, 1, bytes);
    return;
  }
  switch (p.dtype) {
    case kBFloat16: SALKERNELS_ADD(plan, match_tiles_bf16, blocks, 1, bytes); break;
    case kFloat16: SALKERNELS_ADD(plan, match_tiles_fp16, blocks, 1, bytes); break;
    default: SALKERNELS_ADD(plan, match_tiles_fp32, blocks, 1, bytes);
  }
}

inline void add_match(Plan& plan, Problem& p, int64_t shared_limit) {
  if (p.dtype == kFloat64) {
    add_norms(plan, p);
    SALKERNELS_ADD(plan, match_fp64, ceil_div(p.num_pairs * p.grid.pixels(), kWarps), 1, 0);
    return;
  }
  const Tiling t = p.tiling = forward_tiling(p, shared_limit);
  const bool tf32 = p.dtype == kFloat32 && p.allow_tf32, lower = p.dtype == kFloat32 && !tf32;
  if (t.streamed) {
    add_norms(plan, p);
    const int64_t blocks = p.windows() * p.num_pairs * (t.both ? 1 : t.chunks);
    const int64_t bytes = stream_shared_bytes(t.stages, lower) +
                          (t.both ? stream_keys_bytes(t.chunks, t.pixels) : 0);
    if (tf32) {
      SALKERNELS_ADD(plan, stream_tf32, blocks, 1, bytes);
      return;
    }
    switch (p.dtype) {
      case kBFloat16: SALKERNELS_ADD(plan, stream_bf16, blocks, 1, bytes); break;
      case kFloat16: SALKERNELS_ADD(plan, stream_fp16, blocks, 1, bytes); break;
      default: SALKERNELS_ADD(plan, stream_fp32, blocks, 1, bytes);
    }
    return;
  }
  const int64_t tile_pairs =
      p.set_form ? t.tiles[0] * (t.tiles[0] + 1) / 2 : t.tiles[0] * t.tiles[1];
  const int64_t blocks = ceil_div(p.units(), t.units) * tile_pairs;
  const int64_t bytes = match_shared_bytes(t.stages, p.set_form && t.tiles[0] == 1, lower);
  if (needs_few_blocks(t, p.set_form)) {
    add_tiles(plan, p, tf32, blocks, bytes);
  } else {
    add_many_tiles(plan, p, tf32, blocks, bytes);
  }
}

inline Plan plan_forward(Problem& p, int64_t shared_limit) {
  Plan plan;
  // Without samples there may still be room left over.
  if (p.table() > 0) add_match(plan, p, shared_limit);
  plan.require_numbers(p);
  const int64_t blocks = ceil_div(p.num_pairs, kLossPairs);
  if (p.dtype == kFloat64) {
    SALKERNELS_ADD(plan, reduce_losses_f64, blocks, 1, kThreads * 8 / 4);
  } else {
    SALKERNELS_ADD(plan, reduce_losses_f32, blocks, 1, kThreads * 8 / 4);
  }
  if (p.mean == nullptr) return plan;
  if (p.dtype == kFloat64) {
    SALKERNELS_ADD(plan, mean_loss_f64, 1, 1, kWarps * 8);
  } else {
    SALKERNELS_ADD(plan, mean_loss_f32, 1, 1, kWarps * 8);
  }
  return plan;
}

// Of a backward whose forward kept none.
inline Plan plan_norms(Problem& p) {
  Plan plan;
  add_norms(plan, p);
  return plan;
}

}  // namespace cuda
}  // namespace salkernels
