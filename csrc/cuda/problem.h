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
  int64_t both;           // a block serves both directions of a pair, if streamed
  int64_t stages;         // channel chunks that shared memory holds
  int64_t slice_words;    // of a row that a block of gradient_rows holds: 64, 32 or 16
  int64_t team;           // warps that list the terms of one sample in one window: 1, or all
  int64_t lists_in_memory;  // what they count is too much for shared memory
};

// A row that another was matched with, in the gradient of that other: see terms.cuh. Lists of these
// stand in device memory, one for each row of the maps.
template <class F>
struct Term {
  int32_t row;  // number in the unit: node * (pixels of the window) + pixel
  F weight;     // to be multiplied by the row's features as they are
};

struct Problem {
  Maps maps[2];                 // query and key; the same twice in the set form
  const int64_t* pairs;    // (P,) places in (G, N, M), ascending, then -1: room; null: every pair
  const void* grad_sim;    // (H·W, P) gradient of max_sim
  void* argmax;            // (H·W, P) uint8 or int32
  void* max_sim;           // (H·W, P)
  void* loss;              // (P,)
  void* mean;              // () of the losses; null: nobody asks for it
  // Backward of that: its gradient, and 1 / (P H·W). Used where there is no grad_sim.
  const void* grad_mean;   // ()
  double mean_share;
  void* norm;              // (H·W, nodes) of every row: see rows.cuh
  // Backward: the pairs by query and by key, and terms. See terms.cuh.
  int32_t* query_begin;    // (G·N + 1,)
  int32_t* key_begin;      // (G·M + 1,)
  int32_t* by_key;         // (P,)
  int32_t* by_key_query;   // (P,)
  int32_t* term_end;       // (nodes, H·W)
  void* along;             // (nodes, H·W)
  void* terms;             // (2 P H·W,)
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
  // A node is a sample: queries first, then keys that are not the queries.
  SALKERNELS_HOST_DEVICE int64_t group_nodes() const {
    return maps[0].samples + (set_form ? 0 : maps[1].samples);
  }
  SALKERNELS_HOST_DEVICE int64_t nodes() const { return groups * group_nodes(); }
};

enum : int {
  kTile = 128,      // rows of one side of a tile
  kThreads = 256,
  kWarps = kThreads / 32,
  kUnits = 32,       // most windows of a tile
  kChunkWords = 32,  // 128 bytes of channels: what is staged of a row at a time
  kLossPairs = 8,    // of a block of reduce_losses: 32 bytes of each pixel
};

}  // namespace cuda
}  // namespace salkernels
