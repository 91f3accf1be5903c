// The kernels of the backward and the plan that launches them.
#pragma once

#include "plan.h"

namespace salkernels {
namespace cuda {

SALKERNELS_BACKWARD_KERNELS(SALKERNELS_DEFINE_KERNEL)

// Whether the backward gathers, and so needs norms and chosen_*.
inline bool backward_gathers(Problem p, int64_t shared_limit) {
  return !backward_tiling(p, shared_limit);
}

inline Plan plan_backward(Problem& p, int64_t shared_limit) {
  Plan plan;
  if (p.pairs != nullptr) SALKERNELS_ADD(plan, number_pairs_backward, 1, 1, 0);
  if (backward_tiling(p, shared_limit)) {
    const Tiling& t = p.tiling;
    const int64_t samples = p.maps[0].samples + (p.set_form ? 0 : p.maps[1].samples);
    const int64_t bytes = gradient_shared_bytes(t.units * samples * t.pixels, t.stages);
    const int64_t blocks = ceil_div(p.units(), t.units);
    if (p.dtype == kFloat32 && p.allow_tf32) {
      SALKERNELS_ADD(plan, gradient_tile_tf32, blocks, 1, bytes);
      return plan;
    }
    switch (p.dtype) {
      case kBFloat16: SALKERNELS_ADD(plan, gradient_tile_bf16, blocks, 1, bytes); break;
      case kFloat16: SALKERNELS_ADD(plan, gradient_tile_fp16, blocks, 1, bytes); break;
      default: SALKERNELS_ADD(plan, gradient_tile_fp32, blocks, 1, bytes);
    }
    return plan;
  }
  const int64_t sides = p.set_form ? 1 : 2;
  const int64_t rows =
      p.groups * most(p.maps[0].samples, p.maps[1].samples) * p.grid.pixels();
  SALKERNELS_ADD_BY_DTYPE(plan, norms, p.dtype, ceil_div(rows, kWarps), sides, 0);
  SALKERNELS_ADD(plan, invert, ceil_div(p.num_pairs * p.windows(), kWarps), 1, 0);
  SALKERNELS_ADD_BY_DTYPE(plan, gather, p.dtype, ceil_div(rows, kWarps), sides, 0);
  return plan;
}

}  // namespace cuda
}  // namespace salkernels
