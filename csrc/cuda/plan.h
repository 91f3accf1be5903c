// Which kernels run for a problem, on how many blocks, with how much shared memory. Nothing here
// looks at the pairs: they may be on the device, and the plan must not wait for it.
#pragma once

#include <cstdint>

#include "gather.cuh"
#include "gradient_tile.cuh"
#include "match.cuh"

namespace salkernels {
namespace cuda {

// What the kernels are called, in profilers and in the tests; X(name, minimal blocks, body).
#define SALKERNELS_FORWARD_KERNELS(X)                        \
  X(match_fp32, 1, (match<Fp32, kFewBlocks>(p)))             \
  X(match_tf32, 2, (match<Tf32, kFewBlocks>(p)))             \
  X(match_bf16, 2, (match<Bf16, kFewBlocks>(p)))             \
  X(match_fp16, 2, (match<Fp16, kFewBlocks>(p)))             \
  X(match_tiles_fp32, 1, (match<Fp32, kBlocks>(p)))          \
  X(match_tiles_tf32, 1, (match<Tf32, kBlocks>(p)))          \
  X(match_tiles_bf16, 1, (match<Bf16, kBlocks>(p)))          \
  X(match_tiles_fp16, 1, (match<Fp16, kBlocks>(p)))          \
  X(match_fp64, 1, match_plain<double>(p))                   \
  X(norms_fp32, 1, norms<float>(p))                          \
  X(norms_fp64, 1, norms<double>(p))                         \
  X(norms_bf16, 1, norms<BFloat16>(p))                       \
  X(norms_fp16, 1, norms<Half>(p))                           \
  X(stream_fp32, 1, stream<Fp32>(p))                         \
  X(stream_tf32, 1, stream<Tf32>(p))                         \
  X(stream_bf16, 1, stream<Bf16>(p))                         \
  X(stream_fp16, 1, stream<Fp16>(p))                         \
  X(reduce_losses_f32, 1, reduce_losses<float>(p))           \
  X(reduce_losses_f64, 1, reduce_losses<double>(p))          \
  X(mean_loss_f32, 1, mean_loss<float>(p))                   \
  X(mean_loss_f64, 1, mean_loss<double>(p))

#define SALKERNELS_BACKWARD_KERNELS(X)                       \
  X(sort_pairs, 1, sort_pairs(p))                            \
  X(gradient_tile_bf16, 2, gradient_tile<BFloat16>(p))       \
  X(gradient_tile_fp16, 2, gradient_tile<Half>(p))           \
  X(list_terms_f32, 1, list_terms<float>(p))                 \
  X(list_terms_f64, 1, list_terms<double>(p))                \
  X(gradient_rows_fp32, 2, (gradient_rows<float, 1>(p)))     \
  X(gradient_rows_wide, 2, (gradient_rows<float, 2>(p)))     \
  X(gradient_rows_bf16, 2, (gradient_rows<BFloat16, 1>(p)))  \
  X(gradient_rows_fp16, 2, (gradient_rows<Half, 1>(p)))      \
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

  // Units are numbered by 32 bits: see rows.cuh.
  void require_numbers(const Problem& p) {
    if (p.units() > INT32_MAX) error = "the problem has more windows than 32 bits can number";
  }
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

// Bytes of shared memory with which two blocks fit a multiprocessor, which has little more of it
// than one block may ask for, and keeps 1 KB of each.
inline int64_t half_of(int64_t shared_limit) { return (shared_limit + 1024) / 2 - 1024; }

// Pairs x windows from which on a block serves both directions of a pair. These blocks are few and
// long: half as many keep every multiprocessor of an H100 busy for four rounds.
constexpr int64_t kManyPairs = 8 * 128;

// Tiles of the forward: all samples of one window or of several, or some of one, or some pixels.
inline Tiling forward_tiling(const Problem& p, int64_t shared_limit) {
  Tiling t{};
  const int64_t pixels = p.window_pixels();
  const bool lower = p.dtype == kFloat32 && !p.allow_tf32;
  t.units = t.samples[0] = t.samples[1] = t.tiles[0] = t.tiles[1] = t.chunks = 1;
  if (pixels > kTile) {
    t.streamed = 1;
    // Chunks of even size, by eights: the tensor core's columns.
    t.pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, kTile)), 8) * 8;
    t.chunks = ceil_div(pixels, t.pixels);
    t.stages = stream_shared_bytes(2, lower) <= shared_limit ? 2 : 1;
    const int64_t bytes = stream_shared_bytes(t.stages, lower);
    t.both = p.set_form && p.windows() * p.num_pairs >= kManyPairs &&
             bytes + stream_keys_bytes(t.chunks, t.pixels) <= shared_limit;
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
  // As many as take about the memory that the similarities take afterwards in the same place, and
  // leave room for a second block in the 164 KB of a multiprocessor.
  if (p.set_form && t.tiles[0] == 1) {
    t.stages = lower ? 2 : 3;
  } else {
    t.stages = match_shared_bytes(2, false, lower) <= shared_limit ? 2 : 1;
  }
  return t;
}

// Whether all samples of a window fit one tile of the backward; sets the tiling if so.
inline bool tile_tiling(Problem& p, int64_t shared_limit) {
  const int64_t rows = p.group_nodes() * p.window_pixels();
  if ((p.dtype != kBFloat16 && p.dtype != kFloat16) || rows > kTile) return false;
  Tiling t{};
  t.units = least(least(kTile / rows, int64_t(kUnits)), p.units());
  t.stages = 3;  // in the place of W
  p.tiling = t;
  return gradient_shared_bytes(t.units * rows, t.stages) <= shared_limit;
}

inline int64_t rows_shared_bytes(const Problem& p, int64_t words) {
  const int64_t nodes = p.group_nodes(), pixels = p.window_pixels();
  const bool straight = p.maps[0].grad_vector && p.maps[1].grad_vector;
  return rows_table_bytes(nodes, pixels) + nodes * pixels * words * (straight ? 4 : 8);
}

// How lists of terms are made and used: a slice of the rows of a window in shared memory, the
// widest that leaves room for a second block, or the widest of all; none (0), and partners are
// gathered from memory. A slice takes four lanes at least: with fewer, what is read of the lists
// outweighs what is saved of the features (an H100, 11 x 11 windows, bf16: 0.59 ms with two).
inline void list_tiling(Problem& p, int64_t shared_limit) {
  Tiling t{};
  const int64_t pixels = p.window_pixels(), wide = p.dtype == kFloat64 ? 8 : 4;
  t.team = pixels > kTile ? kWarps : 1;
  t.lists_in_memory = terms_shared_bytes(pixels, t.team, wide) > shared_limit;
  if (t.lists_in_memory) t.team = 1;
  const int64_t row_words = p.channels * (p.dtype == kFloat32 ? 4 : 2) / 4;
  const int64_t widest = p.dtype == kFloat32 && row_words > kChunkWords ? 64 : 32;
  for (int64_t words = widest; words >= 16 && p.dtype != kFloat64; words /= 2) {
    const int64_t bytes = rows_shared_bytes(p, words);
    if (t.slice_words == 0 && bytes <= shared_limit) t.slice_words = words;
    if (bytes <= half_of(shared_limit)) {
      t.slice_words = words;
      break;
    }
  }
  p.tiling = t;
}

}  // namespace cuda
}  // namespace salkernels
