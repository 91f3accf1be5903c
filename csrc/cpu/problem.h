// What the CPU kernels are asked to do, in plain pointers: no torch type appears below this line.
//
// Letters: G groups, N query and M key samples, C channels, L pixels of a window, R rows of a
// packed window (nodes x L).
#pragma once

#include <cstdint>
#include <vector>

#include "../geometry.h"

namespace salkernels {

enum class DType { f32, f64, bf16, f16 };

// Strides of one (C, H, W) map, in elements.
struct MapStrides {
  int64_t channel, row, column;
};

// One sample: its map, and where its gradient goes (backward only).
struct Node {
  const void* map;
  void* grad;
  const uint8_t* valid;  // (H, W), nonzero where a pixel takes part; null: everywhere
  int64_t query;         // its number among the (G, N) queries, -1 for a key that is none
  MapStrides strides, grad_strides;
};

// Two samples of a component and their numbers as pairs in both directions, -1 where there is none.
// In the set form sim is symmetric: one edge stands for (first, second) and (second, first).
//
//              key 0  1  2  3
//      query 0     e  e  e  e      an edge is at or above the diagonal; what is below it is the
//            1     .  e  e  e      `reverse` of the edge across, from the same products: half of
//            2     .  .  e  e      the arithmetic
//            3     .  .  .  e
struct Edge {
  int32_t first, second;  // nodes, counted from the start of the component
  int64_t forward, reverse;
};

// Samples connected by pairs: only they have to be in the cache together.
struct Component {
  int32_t first_node, num_nodes;
  int32_t first_edge, num_edges;
  // Whether a pixel's channels are contiguous in all its maps, or gradients: they may differ.
  bool channels_last, grads_channels_last;

  // Whether the backward takes windows one by one, from the map and back to it.
  bool by_window() const { return channels_last && grads_channels_last; }
};

// A run of windows of one strip, all of the same extent, for one component: one unit of work.
struct Tile {
  int32_t component;
  int32_t strip;
  int32_t first_window, num_windows;
};

struct Plan {
  std::vector<Node> nodes;
  std::vector<Edge> edges;  // of a component: by first, then second
  std::vector<Component> components;
  int64_t num_pairs = 0;  // those that exist, of the P that there is room for
};

// One pair of samples in one large window, whose rows do not fit into a tile together.
struct StreamedMatch {
  int32_t component, edge;
  int32_t strip, window;
  int64_t first_row, num_rows;  // query rows; all of them if the edge serves both directions
};

// Channels of the gradient of one sample in one large window.
struct StreamedGradient {
  int32_t component, node;
  int32_t strip, window;
  int64_t first_channel, num_channels;
};

// Rows of one large window of one sample, for their norms.
struct StreamedNorms {
  int32_t node;  // of the plan
  int32_t strip, window;
  int64_t first_row, num_rows;
};

// All units of work of a call, and the largest of each extent, which size the scratch memory.
struct Work {
  std::vector<Tile> tiles;
  std::vector<StreamedMatch> matches;
  std::vector<StreamedNorms> norms;
  std::vector<StreamedGradient> gradients;
  int64_t max_tile_rows = 0;         // packed rows of a tile, with the one that may part windows
  int64_t max_window_rows = 0;       // of these, of one window
  int64_t max_window_pixels = 0;     // L of any window
  int64_t max_window_matches = 0;    // directed pairs x L in one window of a tile
  int64_t max_tile_matches = 0;      // in all its windows
  int64_t max_streamed_channels = 0;
};

struct Problem {
  Grid grid;
  int64_t channels;
  double eps;
  DType dtype;
  bool wide_index;  // argmax is int32, else uint8
  bool has_valid;   // whether there are pixels that take no part
  bool write_around;  // gradients go around the caches, which they are too large for
  Plan plan;
  Work work;
  void* argmax;           // (P, H, W); all bits set where a query pixel has no match
  void* max_sim;          // (P, H, W); 1 there
  void* loss;             // (P), forward only
  const void* grad_sim;   // (P, H, W), backward only: of the loss with respect to max_sim
  // (nodes, H·W), window after window: backward of large windows only.
  void *norms, *poison;
};

struct LseProblem;  // see lse.h
struct LsePiece;

// The functions that exist once per instruction set. `scratch` is 64-byte aligned; with a null
// scratch a function only returns how many bytes of it it needs.
struct Kernels {
  const char* name;
  // Bytes from one packed row to the next.
  int64_t (*row_bytes)(DType, int64_t channels);
  int64_t (*match_tile)(const Problem&, const Tile*, char* scratch);
  int64_t (*gradient_tile)(const Problem&, const Tile*, char* scratch);
  int64_t (*match_streamed)(const Problem&, const StreamedMatch*, char* scratch);
  int64_t (*norms_streamed)(const Problem&, const StreamedNorms*, char* scratch);
  int64_t (*gradient_streamed)(const Problem&, const StreamedGradient*, char* scratch);
  void (*pair_loss)(const Problem&, int64_t pair);
  int64_t (*lse_tile)(const LseProblem&, const Tile*, char* scratch);
  int64_t (*lse_piece)(const LseProblem&, const LsePiece*, char* scratch);
  int64_t (*lse_gradient_tile)(const LseProblem&, const Tile*, char* scratch);
  int64_t (*lse_gradient_piece)(const LseProblem&, const LsePiece*, char* scratch);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define SALKERNELS_X86_LEVELS 1
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace salkernels
