// What the CUDA kernels are asked to do, in plain pointers: no torch type appears below this line.
// One Problem is the only argument of every kernel, so that a launch is data and can be recorded.
//
// Letters: G groups, N query and M key samples, C channels, L pixels of a window.
#pragma once

#include <cstdint>

#include "../geometry.h"

namespace salkernels {
namespace cuda {

enum DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Feature maps of all samples of one side, and where their gradients go (backward only).
struct Maps {
  const void* data;  // (G, S, C, H, W)
  void* grad;        // (G, S, C, H, W)
  void* norms;       // (G, S, H·W): backward of large windows, and float64
  const uint8_t* valid;  // (G, S, H·W) bool, from the first sample of this side on; null: all
  int64_t strides[5], grad_strides[5];  // in elements
  int64_t samples;
  int64_t valid_stride;  // of a group, in bytes: the sides share one tensor
  int64_t vector, grad_vector;  // channels contiguous, rows of 16-byte pieces at aligned addresses
};

// How rows of the maps are dealt to blocks: see plan.h.
struct Tiling {
  int64_t streamed;       // one window has more rows than a tile
  int64_t units;          // (group, window) of a block
  int64_t samples[2];     // of a side in a tile, per unit
  int64_t tiles[2];       // of a side
  int64_t pixels;         // of a window (of a chunk of it, if streamed) in a tile
  int64_t chunks;         // of a window, if streamed
  int64_t stages;         // channel chunks that shared memory holds
};

struct Problem {
  Maps maps[2];                 // query and key; the same twice in the set form
  const int64_t* pairs;         // (P,) places in (G, N, M), -1: room left over; null: every pair
  int32_t* slots;               // (G, N, M): number of each pair, -1 where there is none
  const void* grad_sim;         // (P, H·W) gradient of max_sim
  void* argmax;                 // (P, H·W) uint8 or int32
  void* max_sim;                // (P, H·W)
  void* loss;                   // (P,)
  int32_t *chosen_end, *chosen_by;  // (P, H·W): see gather.cuh
  int64_t set_form, wide_index;
  int64_t groups, channels, num_pairs;
  int64_t dtype, allow_tf32;
  double eps;
  Grid grid;
  Tiling tiling;

  SALKERNELS_HOST_DEVICE int64_t windows() const { return grid.strips() * grid.across(); }
  SALKERNELS_HOST_DEVICE int64_t units() const { return groups * windows(); }
  SALKERNELS_HOST_DEVICE int64_t window_pixels() const {
    return grid.window_rows * grid.window_columns;
  }
  SALKERNELS_HOST_DEVICE int64_t table() const {
    return groups * maps[0].samples * maps[1].samples;
  }
};

enum : int {
  kTile = 128,      // rows of one side of a tile
  kThreads = 256,
  kWarps = kThreads / 32,
  kUnits = 32,       // most windows of a tile
  kChunkWords = 32,  // 128 bytes of channels: what is staged of a row at a time
};

}  // namespace cuda
}  // namespace salkernels
