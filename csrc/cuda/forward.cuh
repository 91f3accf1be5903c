// The kernels of the forward and the plan that launches them.
#pragma once

#include "plan.h"

namespace salkernels {
namespace cuda {

SALKERNELS_FORWARD_KERNELS(SALKERNELS_DEFINE_KERNEL)

inline void add_match(Plan& plan, Problem& p) {
  if (p.dtype == kFloat64) {
    const int64_t plane = p.grid.pixels();
    const int64_t rows = p.groups * most(p.maps[0].samples, p.maps[1].samples) * plane;
    SALKERNELS_ADD(plan, norms_f64_forward, ceil_div(rows, kWarps), p.set_form ? 1 : 2, 0);
    SALKERNELS_ADD(plan, match_fp64, ceil_div(p.table() * plane, kWarps), 1, 0);
    return;
  }
  const Tiling t = p.tiling = forward_tiling(p);
  const int64_t tile_pairs =
      p.set_form ? t.tiles[0] * (t.tiles[0] + 1) / 2 : t.tiles[0] * t.tiles[1];
  const int64_t blocks = t.streamed ? p.units() * p.maps[0].samples * p.maps[1].samples * t.chunks
                                    : ceil_div(p.units(), t.units) * tile_pairs;
  const int64_t bytes = match_shared_bytes(t.stages, p.set_form && t.tiles[0] == 1 && !t.streamed);
  if (p.dtype == kFloat32 && p.allow_tf32) {
    SALKERNELS_ADD(plan, match_tf32, blocks, 1, bytes);
  } else {
    SALKERNELS_ADD_BY_DTYPE(plan, match, p.dtype, blocks, 1, bytes);
  }
}

inline Plan plan_forward(Problem& p) {
  Plan plan;
  if (p.pairs != nullptr) SALKERNELS_ADD(plan, number_pairs, 1, 1, 0);
  if (p.table() > 0) add_match(plan, p);  // without samples there may still be room left over
  if (p.dtype == kFloat64) {
    SALKERNELS_ADD(plan, reduce_losses_f64, p.num_pairs, 1, kWarpScratch);
  } else {
    SALKERNELS_ADD(plan, reduce_losses_f32, p.num_pairs, 1, kWarpScratch);
  }
  return plan;
}

}  // namespace cuda
}  // namespace salkernels
