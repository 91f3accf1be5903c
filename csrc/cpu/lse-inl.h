// The log-sum-exp over the windows of negatives, forward: products as for the matches, and for each
// query pixel a running maximum with the sum of exponentials relative to it.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "match-inl.h"
#include "terms-inl.h"
#include "streamed-inl.h"
#endif

static_assert(kLseTilePixels <= kBlock, "a window of a tile is one block of products");
static_assert(kLsePieceRows <= kBlock, "so are the rows of a piece");

// Σ e^{s/τ} of some rows as `top` = max s and `sum` = Σ e^{(s − top)/τ}: no temperature overflows it,
// or lets all terms underflow.
template <class T>
struct LseState {
  T *top, *sum;

  static LseState allocate(Arena& arena, int64_t rows) {
    return {arena.take<T>(rows), arena.take<T>(rows)};
  }
  void clear(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      top[i] = kNothing<T>;
      sum[i] = 0;
    }
  }
  LseState from(int64_t row) const { return {top + row, sum + row}; }
  void copy(int64_t row, const LseState& other, int64_t other_row, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      top[row + i] = other.top[other_row + i];
      sum[row + i] = other.sum[other_row + i];
    }
  }
  T value(int64_t row, T temperature) const {
    const T log = sizeof(T) == 4 ? T(__builtin_logf(float(sum[row]))) : T(__builtin_log(sum[row]));
    return top[row] / temperature + log;  // −∞ of no terms
  }
};

// What exponents are relative to: the maximum, or any number where there is no term.
template <class T>
static inline Vec<T> shift_of(const Vec<T>& top) {
  return top == kNothing<T> ? Vec<T>{} : top;
}

// Adds the products of each lane, down the rows, to the sum of that lane. A NaN is not seen by the
// maximum, and makes the sum NaN for good.
template <class T>
static void add_exponentials(const T* sims, int64_t rows, int64_t stride, int64_t lanes,
                             T inverse_temperature, const LseState<T>& state) {
  for (int64_t n = 0; n < lanes; n += kLanes<T>) {
    const Vec<T> before = load<T>(state.top + n);
    Vec<T> top = before;
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<T> next = load<T>(sims + i * stride + n);
      top = next > top ? next : top;
    }
    const Vec<T> shift = shift_of<T>(top);
    Vec<T> sum =
        load<T>(state.sum + n) * exponential<T>((before - shift) * inverse_temperature);
    for (int64_t i = 0; i < rows; ++i) {
      sum += exponential<T>((load<T>(sims + i * stride + n) - shift) * inverse_temperature);
    }
    store<T>(state.top + n, top);
    store<T>(state.sum + n, sum);
  }
}

// Adds up lanes that belong to one row, `pitch` apart, into the first `count` of them.
template <class T>
static void fold_lanes(const LseState<T>& state, int64_t slots, int64_t pitch, int64_t count,
                       T inverse_temperature, T* shift) {
  for (int64_t p = 0; p < count; ++p) {
    T top = state.top[p];
    for (int64_t j = 1; j < slots; ++j) {
      const T next = state.top[j * pitch + p];
      top = next > top ? next : top;
    }
    for (int64_t j = 0; j < slots; ++j) shift[j * pitch + p] = top;
  }
  for (int64_t n = 0; n < slots * pitch; n += kLanes<T>) {
    const Vec<T> difference = load<T>(state.top + n) - shift_of<T>(load<T>(shift + n));
    store<T>(state.sum + n, load<T>(state.sum + n) *
                                exponential<T>(difference * inverse_temperature));
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t j = 1; j < slots; ++j) state.sum[p] += state.sum[j * pitch + p];
    state.top[p] = shift[p];
  }
}

template <class T>
static inline void fill_lanes(T* sims, int64_t rows, int64_t stride, int64_t lanes, T value) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < lanes; ++n) sims[i * stride + n] = value;
  }
}

// Edges [first, last) of one first sample, as many as a block of products has room for.
struct EdgeBatch {
  const Edge *begin, *end;
  bool forward, reverse;  // whether any of them is a pair in that direction

  static EdgeBatch next(const Edge* begin, const Edge* end, int64_t room) {
    EdgeBatch batch{begin, begin, false, false};
    while (batch.end != end && batch.end->first == begin->first && batch.end - begin < room) {
      batch.forward |= batch.end->forward >= 0;
      batch.reverse |= batch.end->reverse >= 0;
      ++batch.end;
    }
    return batch;
  }
};

// The scratch memory of a tile's forward.
template <class T>
struct LseScratch {
  int64_t* column_offset;
  T* pack;
  SimBlock<T> sims;
  LseState<T> rows;            // of a whole packed window
  LseState<T> forward, reverse;  // of the lanes of a block
  T* shift;
  WindowValid valid;

  static LseScratch allocate(Arena& arena, const Problem& problem) {
    const int64_t lanes = kForwardStride + kLanes<T>;
    LseScratch s;
    s.column_offset = arena.take<int64_t>(problem.grid.width);
    s.pack = arena.take<T>(problem.work.max_tile_rows * packed_stride<T>(problem.channels));
    s.sims = SimBlock<T>::allocate(arena);
    s.rows = LseState<T>::allocate(arena, problem.work.max_window_rows);
    s.forward = LseState<T>::allocate(arena, lanes);
    s.reverse = LseState<T>::allocate(arena, lanes);
    s.shift = arena.take<T>(lanes);
    s.valid = WindowValid::allocate(arena, problem, problem.work.max_window_rows);
    return s;
  }
};

// The products of a batch, laid out as `match_window` has them; rows of `forward` are key pixels,
// and its lanes `pitch` query pixels for each edge.
template <class T>
static void batch_products(SimBlock<T>& sims, const TileShape& shape, const EdgeBatch& batch,
                           const T* pack, int64_t pitch, int group) {
  const int64_t pixels = shape.pixels, sample = pixels * shape.stride;
  const int64_t edges = batch.end - batch.begin;
  sims.columns = 0;
  sims.forward_stride = round_up(edges * pitch, kLanes<T>);
  sims.reverse_stride = round_up(round_up(edges * pixels, block_columns(group)), kLanes<T>);
  for (int64_t j = 0; j < edges; ++j) {
    sims.add_key(pack + batch.begin[j].second * sample, pixels, shape.stride, j * pitch);
  }
  sims.fill_up(group);
  sims.compute(group, pack + batch.begin->first * sample, pixels, shape.stride, shape.width,
               batch.reverse);
}

// Products that are terms of no sum become −∞: with key pixels that take no part, of edges that are
// no pair in a direction, and in the rest of the last register, whose lanes are of an edge to come.
template <class T>
static void take_out_absent(SimBlock<T>& sims, const EdgeBatch& batch, const WindowValid& valid,
                            int64_t pixels, int64_t pitch) {
  const int64_t count = batch.end - batch.begin, used = count * pitch;
  for (int64_t j = 0; j < count; ++j) {
    const Edge& edge = batch.begin[j];
    T* const forward = sims.forward + j * pitch;
    leave_out<T>(valid.of(edge.second), pixels, forward, sims.forward_stride, pitch);
    if (edge.forward < 0) {
      fill_lanes<T>(forward, pixels, sims.forward_stride, pitch, kNothing<T>);
    }
    if (batch.reverse && edge.reverse < 0) {
      fill_lanes<T>(sims.reverse + j * pixels, pixels, sims.reverse_stride, pixels, kNothing<T>);
    }
  }
  fill_lanes<T>(sims.forward + used, pixels, sims.forward_stride, sims.forward_stride - used,
                kNothing<T>);
  if (batch.reverse) {
    leave_out<T>(valid.of(batch.begin->first), pixels, sims.reverse, sims.reverse_stride,
                 count * pixels);
  }
}

// The sums of all rows of one packed window. The lanes of the first sample's pixels, one for each
// edge, go on from batch to batch and are added up at last; those of a second sample's are taken
// from its rows, and put back.
template <class T>
static void lse_window(const LseProblem& problem, const TileShape& shape, const T* pack,
                       LseScratch<T>& scratch) {
  const Component& component = *shape.component;
  const Edge* edge = &problem.plan.edges[component.first_edge];
  const Edge* const end = edge + component.num_edges;
  const int64_t pixels = shape.pixels;
  const int group = row_group(pixels);
  const int64_t pitch = round_up(pixels, group), room = kBlock / pixels;
  const T inverse = T(1 / problem.temperature);
  SimBlock<T>& sims = scratch.sims;
  const LseState<T>&rows = scratch.rows, &lanes = scratch.forward, &others = scratch.reverse;
  rows.clear(shape.rows);
  while (edge != end) {
    const int32_t first = edge->first;
    lanes.clear(room * pitch + kLanes<T>);
    lanes.copy(0, rows, first * pixels, pixels);
    while (edge != end && edge->first == first) {
      const EdgeBatch batch = EdgeBatch::next(edge, end, room);
      const int64_t count = batch.end - batch.begin;
      batch_products<T>(sims, shape, batch, pack, pitch, group);
      take_out_absent<T>(sims, batch, scratch.valid, pixels, pitch);
      for (int64_t j = 0; j < count; ++j) {
        others.copy(j * pixels, rows, batch.begin[j].second * pixels, pixels);
      }
      if (batch.forward) {
        add_exponentials<T>(sims.forward, pixels, sims.forward_stride, count * pitch, inverse,
                            lanes);
      }
      if (batch.reverse) {
        add_exponentials<T>(sims.reverse, pixels, sims.reverse_stride, count * pixels, inverse,
                            others);
        for (int64_t j = 0; j < count; ++j) {
          rows.copy(batch.begin[j].second * pixels, others, j * pixels, pixels);
        }
      }
      edge = batch.end;
    }
    fold_lanes<T>(lanes, room, pitch, pixels, inverse, scratch.shift);
    rows.copy(first * pixels, lanes, 0, pixels);
  }
}

// Writes pixels [first, first + count) of a window of one query, from rows of sums.
template <class T>
static void put_lse(const LseProblem& problem, const Node& node, const Window& window,
                    int64_t first, int64_t count, const LseState<T>& state) {
  if (node.query < 0) return;
  T* const lse = static_cast<T*>(problem.lse) + node.query * problem.grid.pixels();
  const T temperature = T(problem.temperature);
  for_pixel_runs(window, first, count, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
    for (int64_t i = 0; i < run; ++i) {
      const int64_t place = row * problem.grid.width + column + i;
      const bool absent = node.valid != nullptr && node.valid[place] == 0;
      lse[place] = absent ? kNothing<T> : state.value(at + i, temperature);
    }
  });
}

template <class T, class In>
static int64_t lse_tile(const LseProblem& problem, const Tile* tile, char* memory) {
  Arena arena{memory};
  LseScratch<T> scratch = LseScratch<T>::allocate(arena, problem);
  if (memory == nullptr) return arena.used;

  const TileShape shape = TileShape::of<T>(problem, *tile);
  pack_tile<T, In>(problem, shape, scratch.pack, scratch.column_offset, nullptr, nullptr);
  const int64_t products =
      shape.num_windows * shape.component->num_edges * shape.pixels * shape.pixels;
  scratch.sims.ahead = Ahead::of_next<T, In>(problem, tile, products / 12);
  for (int64_t t = 0; t < shape.num_windows; ++t) {
    const Window window = shape.window_at(t);
    for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
      scratch.valid.read(problem, shape.nodes[s], window, s);
    }
    lse_window<T>(problem, shape, scratch.pack + t * shape.window_stride, scratch);
    for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
      put_lse<T>(problem, shape.nodes[s], window, 0, shape.pixels,
                 scratch.rows.from(s * shape.pixels));
    }
  }
  return arena.used;
}

// Query rows of one sample against all its negatives, 64 key rows at a time.
template <class T, class In>
static int64_t lse_piece(const LseProblem& problem, const LsePiece* piece, char* memory) {
  const int64_t stride = packed_stride<T>(problem.channels);
  const int64_t width = packed_width<T>(problem.channels);
  Arena arena{memory};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* keys = arena.take<T>(kBlock * stride);
  T* queries = arena.take<T>(kBlock * stride);
  SimBlock<T> sims = SimBlock<T>::allocate(arena);
  const LseState<T> state = LseState<T>::allocate(arena, kForwardStride);
  WindowValid valid = WindowValid::allocate(arena, problem, problem.work.max_window_pixels);
  if (memory == nullptr) return arena.used;

  const Component& component = problem.plan.components[piece->component];
  const Node* nodes = &problem.plan.nodes[component.first_node];
  const Window window = problem.grid.window(piece->strip, piece->window);
  const int group = row_group(kBlock);
  fill_consecutive(consecutive, problem.grid.width, stride);
  state.clear(kForwardStride);
  pack_pixels<T, In>(problem, nodes[piece->node], window, piece->first_row, piece->num_rows,
                     queries, consecutive, nullptr, nullptr);
  sims.forward_stride = kForwardStride;
  const auto add_key = [&](int32_t key) {
    valid.read(problem, nodes[key], window, 0);
    for (int64_t l = 0; l < window.pixels(); l += kBlock) {
      const int64_t count = least(kBlock, window.pixels() - l);
      pack_pixels<T, In>(problem, nodes[key], window, l, count, keys, consecutive, nullptr,
                         nullptr);
      sims.columns = 0;
      sims.add_key(keys, count, stride, 0);
      sims.fill_up(group);
      sims.compute(group, queries, piece->num_rows, stride, width, false);
      const uint8_t* flags = valid.of(0) == nullptr ? nullptr : valid.of(0) + l;
      leave_out<T>(flags, count, sims.forward, kForwardStride, piece->num_rows);
      add_exponentials<T>(sims.forward, count, kForwardStride, piece->num_rows,
                          T(1 / problem.temperature), state);
    }
  };
  const Edge* edges = &problem.plan.edges[component.first_edge];
  for (int64_t e = 0; e < component.num_edges; ++e) {
    if (edges[e].first == piece->node && edges[e].forward >= 0) add_key(edges[e].second);
    if (edges[e].second == piece->node && edges[e].reverse >= 0) add_key(edges[e].first);
  }
  put_lse<T>(problem, nodes[piece->node], window, piece->first_row, piece->num_rows, state);
  return arena.used;
}
