// The log-sum-exp over the windows of negatives: what its kernels are asked to do.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace salkernels {

// The largest window of which several samples are multiplied at once. Larger ones fill whole blocks
// of products alone, and go in pieces.
constexpr int64_t kLseTilePixels = 64;

// Query rows of a piece, and key rows that are packed at a time.
constexpr int64_t kLsePieceRows = 64;

// Rows of one sample in one window that is not computed in tiles.
//
//                     keys of all its partners, 64 rows at a time ->
//      64 rows       [ block | block | block | block ]     complete within the piece: sums in the
//      of a sample                                         forward, gradients in the backward
struct LsePiece {
  int32_t component, node;
  int32_t strip, window;
  int64_t first_row, num_rows;
};

struct LseProblem : Problem {
  double temperature;
  void* lse;             // (G, N, H, W); in the backward it is read
  const void* grad_lse;  // (G, N, H, W), backward only

  std::vector<LsePiece> pieces;
  int64_t max_nodes = 0, max_edges = 0;  // of a component
  int64_t max_weights = 0;               // of the partners of one sample, in one window of a tile
};

// Cuts the work into units that do not depend on the number of threads: tiles and pieces.
void make_lse_work(LseProblem& problem, const Kernels& kernels, bool backward);

}  // namespace salkernels
