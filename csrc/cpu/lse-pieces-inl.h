// Backward of the log-sum-exp in windows that are not computed in tiles.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "match-inl.h"
#include "terms-inl.h"
#include "gradient-inl.h"
#include "streamed-inl.h"
#include "lse-inl.h"
#include "lse-weights-inl.h"
#include "lse-gradient-inl.h"
#endif

// A block of packed rows, with what the weights need to know of them.
template <class T>
struct PieceRows {
  T *unit, *norms, *poison;
  QueryRows<T> query;
  uint8_t* valid;  // null: all take part

  static PieceRows allocate(Arena& arena, const Problem& problem) {
    return {arena.take<T>(kBlock * packed_stride<T>(problem.channels)), arena.take<T>(kBlock),
            arena.take<T>(kBlock), QueryRows<T>::allocate(arena, kBlock + kLanes<T>),
            problem.has_valid ? arena.take<uint8_t>(kBlock) : nullptr};
  }
  template <class In>
  void read(const LseProblem& problem, const Node& node, const Window& window, int64_t first,
            int64_t count, const int64_t* consecutive) const {
    pack_pixels<T, In>(problem, node, window, first, count, unit, consecutive, norms, poison);
    clear_poisoned<T>(unit, count, packed_stride<T>(problem.channels), poison);
    query.clear(0, kBlock + kLanes<T>);
    query.read(problem, node, window, first, count);
    if (valid == nullptr) return;
    for_pixel_runs(window, first, count, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
      std::memcpy(valid + at, node.valid + row * problem.grid.width + column, size_t(run));
    });
  }
};

// Adds to V of some rows what one block of a partner's rows gives it.
template <class T>
static void add_block(SimBlock<T>& sims, const LseProblem& problem, const PieceRows<T>& own,
                      int64_t rows, const PieceRows<T>& others, int64_t count, bool is_query,
                      bool is_key, T* sum) {
  const int64_t stride = packed_stride<T>(problem.channels);
  const int64_t width = packed_width<T>(problem.channels);
  const int group = row_group(kBlock);
  const T inverse = T(1 / problem.temperature);
  sims.columns = 0;
  sims.forward_stride = kForwardStride;
  sims.reverse_stride = kReverseStride;
  sims.add_key(others.unit, count, stride, 0);
  sims.fill_up(group);
  sims.compute(group, own.unit, rows, stride, width, is_key);
  leave_out<T>(others.valid, count, sims.forward, kForwardStride, rows);
  if (is_query) {
    to_weights<T>(sims.forward, count, kForwardStride, rows, inverse, own.query);
  } else {
    fill_lanes<T>(sims.forward, count, kForwardStride, rows, T(0));
  }
  if (is_key) {
    leave_out<T>(own.valid, rows, sims.reverse, kReverseStride, count);
    to_weights<T>(sims.reverse, rows, kReverseStride, count, inverse, others.query);
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t p = 0; p < rows; ++p) {
        sims.forward[l * kForwardStride + p] += sims.reverse[p * kReverseStride + l];
      }
    }
  }
  const Partner one{};
  const WeightedSum<T> block{sims.forward, kForwardStride, &one, &one + 1, others.unit,
                             count,        stride};
  for_columns<T>(width, [&](auto columns, int64_t c) {
    block.template columns<decltype(columns)::value, true>(rows, c, sum);
  });
}

template <class T, class In>
static int64_t lse_gradient_piece(const LseProblem& problem, const LsePiece* piece, char* memory) {
  const int64_t stride = packed_stride<T>(problem.channels);
  Arena arena{memory};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* const sum = arena.take<T>(kBlock * stride);
  const auto own = PieceRows<T>::allocate(arena, problem);
  const auto others = PieceRows<T>::allocate(arena, problem);
  SimBlock<T> sims = SimBlock<T>::allocate(arena);
  if (memory == nullptr) return arena.used;

  const Component& component = problem.plan.components[piece->component];
  const Node* nodes = &problem.plan.nodes[component.first_node];
  const Node& node = nodes[piece->node];
  const Window window = problem.grid.window(piece->strip, piece->window);
  const int64_t rows = piece->num_rows;
  fill_consecutive(consecutive, problem.grid.width, stride);
  std::memset(sum, 0, size_t(kBlock * stride) * sizeof(T));
  own.template read<In>(problem, node, window, piece->first_row, rows, consecutive);
  const auto add_partner = [&](int32_t partner, bool is_query, bool is_key) {
    for (int64_t l = 0; l < window.pixels(); l += kBlock) {
      const int64_t count = least(kBlock, window.pixels() - l);
      others.template read<In>(problem, nodes[partner], window, l, count, consecutive);
      add_block<T>(sims, problem, own, rows, others, count, is_query, is_key, sum);
    }
  };
  const Edge* edges = problem.plan.edges.data() + component.first_edge;
  for (int64_t e = 0; e < component.num_edges; ++e) {
    const auto [first, second, forward, reverse] = edges[e];
    if (first == piece->node) {
      add_partner(second, forward >= 0, (first == second ? forward : reverse) >= 0);
    } else if (second == piece->node) {
      add_partner(first, reverse >= 0, forward >= 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    through_norm<T>(sum + r * stride, own.unit + r * stride, packed_width<T>(problem.channels),
                    inverse_for_gradient<T>(own.norms[r], T(problem.eps)),
                    own.valid != nullptr && own.valid[r] == 0, sum + r * stride, false);
  }
  for_pixel_runs(window, piece->first_row, rows,
                 [&](int64_t row, int64_t column, int64_t run, int64_t at) {
                   unpack_patch<T, In>(node, {row, column, 1, run, 0, problem.channels},
                                       sum + at * stride, {0, consecutive}, problem.write_around);
                 });
  if (problem.write_around) stream_end();
  return arena.used;
}
