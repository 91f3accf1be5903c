// Which kernels run for a problem, on how many blocks, with how much shared memory. Nothing here
// looks at the pairs: they may be on the device, and the plan must not wait for it.
#pragma once

#include <cstdint>

#include "gather.cuh"
#include "gradient_tile.cuh"

namespace salkernels {
namespace cuda {

// What the kernels are called, in profilers and in the tests; X(name, minimal blocks, body).
#define SALKERNELS_FORWARD_KERNELS(X)                        \
  X(number_pairs, 1, number_pairs(p))                        \
  X(norms_f64_forward, 1, norms<double>(p))                  \
  X(match_fp32, 2, match<Fp32>(p))                           \
  X(match_tf32, 2, match<Tf32>(p))                           \
  X(match_bf16, 2, match<Bf16>(p))                           \
  X(match_fp16, 2, match<Fp16>(p))                           \
  X(match_fp64, 1, match_plain<double>(p))                   \
  X(reduce_losses_f32, 1, reduce_losses<float>(p))           \
  X(reduce_losses_f64, 1, reduce_losses<double>(p))

#define SALKERNELS_BACKWARD_KERNELS(X)                       \
  X(number_pairs_backward, 1, number_pairs(p))               \
  X(gradient_tile_fp32, 1, gradient_tile<Fp32>(p))           \
  X(gradient_tile_tf32, 1, gradient_tile<Tf32>(p))           \
  X(gradient_tile_bf16, 1, gradient_tile<Bf16>(p))           \
  X(gradient_tile_fp16, 1, gradient_tile<Fp16>(p))           \
  X(norms_fp32, 1, norms<float>(p))                          \
  X(norms_fp64, 1, norms<double>(p))                         \
  X(norms_bf16, 1, norms<BFloat16>(p))                       \
  X(norms_fp16, 1, norms<Half>(p))                           \
  X(invert, 1, invert(p))                                    \
  X(gather_fp32, 1, gather<float>(p))                        \
  X(gather_fp64, 1, gather<double>(p))                       \
  X(gather_bf16, 1, gather<BFloat16>(p))                     \
  X(gather_fp16, 1, gather<Half>(p))

using Kernel = void (*)(const Problem);

#define SALKERNELS_DEFINE_KERNEL(NAME, BLOCKS, BODY)                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)                                \
      salkernels_##NAME(const __grid_constant__ Problem p) {                                    \
    BODY;                                                                                       \
  }

struct Launch {
  const char* name;
  Kernel kernel;
  int64_t blocks, rows;  // of the grid
  int64_t shared_bytes;
};

// At most four kernels; `error` names what is too large for a grid.
struct Plan {
  Launch launches[4];
  int count = 0;
  const char* error = nullptr;

  void add(const char* name, Kernel kernel, int64_t blocks, int64_t rows, int64_t shared_bytes) {
    if (blocks > INT32_MAX) error = "the problem needs more blocks than a grid can have";
    if (blocks > 0) launches[count++] = {name, kernel, blocks, rows, shared_bytes};
  }
};
#define SALKERNELS_ADD(PLAN, NAME, BLOCKS, ROWS, SHARED) \
  (PLAN).add("salkernels_" #NAME, salkernels_##NAME, BLOCKS, ROWS, SHARED)
#define SALKERNELS_ADD_BY_DTYPE(PLAN, NAME, DTYPE, BLOCKS, ROWS, SHARED)          \
  switch (DTYPE) {                                                                \
    case kFloat64: SALKERNELS_ADD(PLAN, NAME##_fp64, BLOCKS, ROWS, SHARED); break; \
    case kBFloat16: SALKERNELS_ADD(PLAN, NAME##_bf16, BLOCKS, ROWS, SHARED); break; \
    case kFloat16: SALKERNELS_ADD(PLAN, NAME##_fp16, BLOCKS, ROWS, SHARED); break; \
    default: SALKERNELS_ADD(PLAN, NAME##_fp32, BLOCKS, ROWS, SHARED);             \
  }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kWarpScratch = kWarps * 8;  // a double of each warp

// Tiles of the forward: all samples of one window or of several, or some of one, or some pixels.
inline Tiling forward_tiling(const Problem& p) {
  Tiling t{};
  const int64_t pixels = p.window_pixels();
  t.units = t.samples[0] = t.samples[1] = t.tiles[0] = t.tiles[1] = t.chunks = 1;
  if (pixels > kTile) {
    t.streamed = 1;
    // Chunks of even size, by eights: the tensor core's columns.
    t.pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, kTile)), 8) * 8;
    t.chunks = ceil_div(pixels, t.pixels);
    t.stages = 2;
    return t;
  }
  t.pixels = pixels;
  for (int side = 0; side < 2; ++side) {
    const int64_t samples = p.maps[side].samples;
    t.tiles[side] = ceil_div(samples, kTile / pixels);
    t.samples[side] = ceil_div(samples, t.tiles[side]);
  }
  if (t.tiles[0] == 1 && t.tiles[1] == 1) {
    const int64_t rows = most(t.samples[0], t.samples[1]) * pixels;
    t.units = least(least(kTile / rows, int64_t(kUnits)), p.units());
  }
  // Either number takes about the memory that the similarities take afterwards in the same place,
  // and leaves room for a second block in the 164 KB of a multiprocessor.
  t.stages = p.set_form && t.tiles[0] == 1 ? 4 : 2;
  return t;
}

// Whether all samples of a window fit one tile of the backward; sets the tiling if so.
inline bool backward_tiling(Problem& p, int64_t shared_limit) {
  const int64_t nodes = p.maps[0].samples + (p.set_form ? 0 : p.maps[1].samples);
  const int64_t rows = nodes * p.window_pixels();
  if (p.dtype == kFloat64 || rows > kTile) return false;
  Tiling t{};
  t.units = least(least(kTile / rows, int64_t(kUnits)), p.units());
  t.pixels = p.window_pixels();
  const int64_t bytes = p.channels * (p.dtype == kFloat32 ? 4 : 2);
  t.stages = ceil_div(bytes, kChunkWords * 4);
  const int64_t all = t.units * rows;
  while (t.stages > 1 && gradient_shared_bytes(all, t.stages) > shared_limit) --t.stages;
  p.tiling = t;
  return gradient_shared_bytes(all, t.stages) <= shared_limit;
}

}  // namespace cuda
}  // namespace salkernels
