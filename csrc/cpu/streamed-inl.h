// Windows too large to be packed for all samples at once: forward and backward in pieces that
// plan.cpp cuts.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "match-inl.h"
#include "terms-inl.h"
#endif

// Packs pixels [first, first + count) of one window of one sample as unit vectors.
template <class T, class In>
static void pack_pixels(const Problem& problem, const Node& node, const Window& window,
                        int64_t first, int64_t count, T* out, const int64_t* consecutive,
                        T* norms, T* poison) {
  const int64_t stride = packed_stride<T>(problem.channels);
  for_pixel_runs(window, first, count, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
    pack_patch<T, In>(node, {row, column, 1, run, 0, problem.channels}, problem.grid.width,
                      out + at * stride, {0, consecutive});
  });
  normalise<T>(out, count, stride, packed_width<T>(problem.channels), T(problem.eps), norms,
               poison);
}

static inline void fill_consecutive(int64_t* offsets, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) offsets[i] = i * stride;
}

// Keys are streamed in blocks of this many rows: 512 KB, half of a usual second-level cache.
template <class T>
static inline int64_t streamed_keys(const Problem& problem) {
  const int64_t row = packed_stride<T>(problem.channels) * int64_t(sizeof(T));
  return most(kBlock, (512 << 10) / row / kBlock * kBlock);
}

// A window too large to be packed for all samples: key blocks are streamed with running maxima.
//
//                 keys of one sample, a block of 512 KB at a time ->
//      queries   [ block | block | block ]      each query keeps its best so far, and each key too
//        64      [   x   |       |       ]      where the pair counts in both directions: that is
//        rows    [   x   |       |       ]      why no more than one block is packed at a time
//        at a    [   x   |       |       ]
//        time
template <class T, class In>
static int64_t match_streamed(const Problem& problem, const StreamedMatch* match, char* scratch) {
  const int64_t stride = packed_stride<T>(problem.channels);
  const int64_t most_keys = least(streamed_keys<T>(problem), problem.work.max_window_pixels);
  Arena arena{scratch};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* keys = arena.take<T>(most_keys * stride);
  T* queries = arena.take<T>(kBlock * stride);
  SimBlock<T> sims = SimBlock<T>::allocate(arena);
  MatchState<T> state = MatchState<T>::allocate(arena, problem.work.max_window_pixels);
  WindowValid valid = WindowValid::allocate(arena, problem, 2 * problem.work.max_window_pixels);
  if (scratch == nullptr) return arena.used;

  const Component& component = problem.plan.components[match->component];
  const Node* nodes = &problem.plan.nodes[component.first_node];
  const Edge& edge = problem.plan.edges[component.first_edge + match->edge];
  const Window window = problem.grid.window(match->strip, match->window);
  const int64_t end = match->first_row + match->num_rows;
  valid.read(problem, nodes[edge.first], window, 0);
  valid.read(problem, nodes[edge.second], window, 1);
  fill_consecutive(consecutive, problem.grid.width, stride);
  for (int64_t l = 0; l < window.pixels(); l += most_keys) {
    const int64_t num_keys = least(most_keys, window.pixels() - l);
    pack_pixels<T, In>(problem, nodes[edge.second], window, l, num_keys, keys, consecutive,
                       nullptr, nullptr);
    for (int64_t p = match->first_row; p < end; p += kBlock) {
      const int64_t num_queries = least(kBlock, end - p);
      pack_pixels<T, In>(problem, nodes[edge.first], window, p, num_queries, queries, consecutive,
                         nullptr, nullptr);
      match_blocks<T>(sims, state, queries, p, num_queries, keys, l, num_keys, stride,
                      packed_width<T>(problem.channels), edge.reverse >= 0, valid.of(0),
                      valid.of(1));
    }
  }
  put<T>(problem, edge.forward, window, match->first_row, match->num_rows,
         state.best_forward + match->first_row, state.where_forward + match->first_row,
         valid.of(0));
  put<T>(problem, edge.reverse, window, 0, window.pixels(), state.best_reverse,
         state.where_reverse, valid.of(1));
  return arena.used;
}

// ---- Backward ------------------------------------------------------------------------------------

// Pixels are numbered window after window here, so that a window's norms are contiguous.
static inline int64_t window_start(const Grid& grid, const Window& window) {
  return window.row * grid.width + window.column * window.rows;
}

template <class T, class In>
static int64_t norms_streamed(const Problem& problem, const StreamedNorms* item, char* scratch) {
  const int64_t stride = packed_stride<T>(problem.channels);
  Arena arena{scratch};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* rows = arena.take<T>(kBlock * stride);
  if (scratch == nullptr) return arena.used;
  const Window window = problem.grid.window(item->strip, item->window);
  const int64_t start = item->node * problem.grid.pixels() + window_start(problem.grid, window);
  fill_consecutive(consecutive, problem.grid.width, stride);
  for (int64_t p = item->first_row; p < item->first_row + item->num_rows; p += kBlock) {
    const int64_t count = least(kBlock, item->first_row + item->num_rows - p);
    pack_pixels<T, In>(problem, problem.plan.nodes[item->node], window, p, count, rows,
                       consecutive, static_cast<T*>(problem.norms) + start + p,
                       static_cast<T*>(problem.poison) + start + p);
  }
  return arena.used;
}

// Some channels of one sample's gradient in a large window. Given the norms, no sum runs over
// channels, so they can be taken a few at a time, such that a whole window of them fits the cache:
//
//                        channels of this piece
//      pixels   unit     [ rows of one partner after the other ]   0.5 MB
//               V        [ sums of this sample's pixels        ]   0.5 MB
//
//      for each partner: load its rows into `unit`; for each match, V[p] += ∂L/∂m · unit[l]
//      at last: load this sample's own rows; dx = (V - (x̂·V) x̂) / ‖x‖
//
// Term lists, as tiles have them, would be as large as the matches of a window; here a match is
// used as soon as it is read.
template <class T>
struct StreamedSums {
  T *sums, *unit;    // (pixels, stride): V, and the rows of one partner
  T* along;          // (pixels): x̂·V
  uint8_t* touched;  // (pixels): by some pair
  int64_t pixels, stride, width;

  static StreamedSums allocate(Arena& arena, const Work& work) {
    StreamedSums s;
    s.stride = packed_stride<T>(work.max_streamed_channels);
    s.sums = arena.take<T>(work.max_window_pixels * s.stride);
    s.unit = arena.take<T>(work.max_window_pixels * s.stride);
    s.along = arena.take<T>(work.max_window_pixels);
    s.touched = arena.take<uint8_t>(work.max_window_pixels);
    return s;
  }

  void clear(int64_t window_pixels, int64_t channels) {
    pixels = window_pixels;
    width = packed_width<T>(channels);
    for (int64_t i = 0; i < pixels * stride; ++i) sums[i] = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      along[p] = 0;
      touched[p] = 0;
    }
  }

  // Makes the packed rows in `unit` unit vectors, given the norms of all their channels.
  void scale_unit(const T* norms, T eps) {
    for (int64_t p = 0; p < pixels; ++p) {
      scale_to_unit<T>(unit + p * stride, width, UnitScale<T>::of_norm(norms[p], eps));
    }
  }

  // Adds ∂L/∂m times the partner's row to the sum of a pixel of this sample.
  void add(int64_t own, int64_t partner, T max_sim, T gradient) const {
    along[own] += gradient * max_sim;
    touched[own] = 1;
    const Vec<T> weight = splat<T>(gradient);
    T* to = sums + own * stride;
    const T *from = unit + partner * stride, *end = from + width;
    for (; from != end; from += kLanes<T>, to += kLanes<T>) {
      store<T>(to, load<T>(to) + weight * load<T>(from));
    }
  }

  // V becomes the gradient; `unit` holds the sample's own rows.
  void finish(const T* norms, const T* poison, T eps) const {
    for (int64_t p = 0; p < pixels; ++p) {
      if (!touched[p]) continue;  // V is 0, and so is the gradient, even if its features are NaN
      const T inv_norm = inverse_for_gradient<T>(norms[p], eps), part = along[p] + poison[p];
      T* to = sums + p * stride;
      const T *self = unit + p * stride, *end = self + width;
      for (; self != end; self += kLanes<T>, to += kLanes<T>) {
        store<T>(to, (load<T>(to) - part * load<T>(self)) * inv_norm);
      }
    }
  }
};

template <class T, class In>
static int64_t gradient_streamed(const Problem& problem, const StreamedGradient* item,
                                 char* scratch) {
  Arena arena{scratch};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  auto sums = StreamedSums<T>::allocate(arena, problem.work);
  if (scratch == nullptr) return arena.used;

  const Component& component = problem.plan.components[item->component];
  const Node* nodes = &problem.plan.nodes[component.first_node];
  const Window window = problem.grid.window(item->strip, item->window);
  const T eps = T(problem.eps);
  fill_consecutive(consecutive, problem.grid.width, sums.stride);
  sums.clear(window.pixels(), item->num_channels);
  const auto table = [&](void* values, int64_t node) {
    return static_cast<T*>(values) + (component.first_node + node) * problem.grid.pixels() +
           window_start(problem.grid, window);
  };
  const auto patch = [&](int64_t row, int64_t column, int64_t run) {
    return Patch{row, column, 1, run, item->first_channel, item->num_channels};
  };
  const auto load_unit = [&](int64_t node) {
    for_pixel_runs(window, 0, sums.pixels,
                   [&](int64_t row, int64_t column, int64_t run, int64_t at) {
                     pack_patch<T, In>(nodes[node], patch(row, column, run), problem.grid.width,
                                       sums.unit + at * sums.stride, {0, consecutive});
                   });
    sums.scale_unit(table(problem.norms, node), eps);
  };
  const auto as_query = [&](int64_t p, int64_t l, T m, T gradient) { sums.add(p, l, m, gradient); };
  const auto as_key = [&](int64_t p, int64_t l, T m, T gradient) { sums.add(l, p, m, gradient); };
  const auto as_both = [&](int64_t p, int64_t l, T m, T gradient) {
    as_query(p, l, m, gradient);
    as_key(p, l, m, gradient);
  };

  const Edge* edges = &problem.plan.edges[component.first_edge];
  for (int64_t e = 0; e < component.num_edges; ++e) {
    const Edge& edge = edges[e];
    if (edge.first != item->node && edge.second != item->node) continue;
    const bool is_first = edge.first == item->node;
    load_unit(is_first ? edge.second : edge.first);
    if (edge.first == edge.second) {
      for_matches<T>(problem, edge.forward, window, as_both);
    } else if (is_first) {
      for_matches<T>(problem, edge.forward, window, as_query);
      for_matches<T>(problem, edge.reverse, window, as_key);
    } else {
      for_matches<T>(problem, edge.forward, window, as_key);
      for_matches<T>(problem, edge.reverse, window, as_query);
    }
  }

  load_unit(item->node);
  sums.finish(table(problem.norms, item->node), table(problem.poison, item->node), eps);
  for_pixel_runs(window, 0, sums.pixels,
                 [&](int64_t row, int64_t column, int64_t run, int64_t at) {
                   unpack_patch<T, In>(nodes[item->node], patch(row, column, run),
                                       sums.sums + at * sums.stride, {0, consecutive},
                                       problem.write_around);
                 });
  if (problem.write_around) stream_end();
  return arena.used;
}
