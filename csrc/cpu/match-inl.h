// Forward: Gram products of packed rows, row by row maxima and where they lie.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#endif

// Key rows (or query rows, in reverse) whose products are held at a time: 2 x 16 KB in fp32.
constexpr int64_t kBlock = 64;
constexpr int64_t kForwardStride = 2 * kBlock;      // query pixels are padded to whole row groups
constexpr int64_t kReverseStride = kBlock + 16;

// Query rows times key rows of a register block. What bounds it is the number of registers: one for
// each sum, one for each row of the shorter side, and one that the longer side passes through. Of
// 16 that leaves 12 sums; of 32 we take 16. At least 8 are needed to hide a product's latency.
//
//              k0   k1   k2             4 x 3 = 12 sums
//      q0 ->  +--+ +--+ +--+            3 key registers, held
//      q1     |  | |  | |  |            1 register for q0, q1, q2, q3 in turn
//      q2     +--+ +--+ +--+            7 loads for 12 products: two of each start in a cycle
//      q3
constexpr int kMostRows = 4;
constexpr int64_t kMostColumns = 6;
constexpr int block_columns(int rows) {
  return SALKERNELS_VECTOR_BYTES == 64 ? 4 : rows == 4 ? 3 : rows == 3 ? 4 : 6;
}

// How many query rows a register block takes for a window of so many.
static inline int row_group(int64_t rows) {
  int chosen = 1;
  int64_t cost = -1;
  for (int group = kMostRows; group >= 1; --group) {
    // Per key row, in twelfths of a product: products, or loads where there are more of them.
    const int64_t columns = block_columns(group), loads = group + columns;
    const int64_t price = (rows + group - 1) / group * most(group * columns, loads) * 12 / columns;
    if (cost < 0 || price < cost) {
      cost = price;
      chosen = group;
    }
  }
  return chosen;
}

// Sums of products of `Rows` query rows with `Columns` key rows, row-major; whole registers are
// written. Each sum runs over the channels in one register, whatever the shape of the block, and
// its lanes are added in one order: a product's bits do not depend on where it was formed.
template <class T, int Rows, int Columns>
static inline void dot_block(const T* const* query, const T* const* key, int64_t width, T* out) {
  constexpr int W = kLanes<T>, N = Rows * Columns;
  constexpr int kHeld = Rows < Columns ? Rows : Columns, kPassing = N / kHeld;
  const T* const* held = Rows < Columns ? query : key;
  const T* const* passing = Rows < Columns ? key : query;
  constexpr int kHeldStep = Rows < Columns ? Columns : 1;
  constexpr int kPassingStep = Rows < Columns ? 1 : Columns;
  Vec<T> sum[(N + W - 1) / W * W] = {};
  const T *h[kHeld], *p[kPassing];
  for (int i = 0; i < kHeld; ++i) h[i] = held[i];
  for (int j = 0; j < kPassing; ++j) p[j] = passing[j];
  for (int64_t c = 0; c < width; c += W) {
    Vec<T> a[kHeld];
    for (int i = 0; i < kHeld; ++i) a[i] = load<T>(h[i] + c);
    for (int j = 0; j < kPassing; ++j) {
      const Vec<T> b = load<T>(p[j] + c);
      for (int i = 0; i < kHeld; ++i) sum[i * kHeldStep + j * kPassingStep] += a[i] * b;
    }
  }
  for (int i = 0; i < N; i += W) store<T>(out + i, sum_lanes<T>(sum + i));
}

// The products of a block of query rows with a list of key rows, in two layouts: a maximum over the
// lanes of a register takes many shuffles, one down the rows of a table a comparison for each.
//
//      forward: queries along the lanes           reverse: keys along the lanes
//              q0 q1 q2 q3 | q0 q1 q2 q3                  k0 k1 k2 k3 | k0 k1 k2 k3
//          k0                                         q0
//          k1   key          key                      q1   key          key
//          k2   sample a     sample b                 q2   sample a     sample b
//          k3                                         q3
//          max  |  |  |  |   best key of each         max  |  |  |  |   best query of each
//               v  v  v  v   query                         v  v  v  v   key
//
// One product of two rows serves both, since sim is symmetric: (q, k) reads one, (k, q) the other.
template <class T>
struct SimBlock {
  T* forward;  // [key pixel][query pixel of each key sample]
  T* reverse;  // [query pixel][key row]
  int64_t forward_stride, reverse_stride;
  const T* key[kBlock + kMostColumns];
  int64_t forward_place[kBlock + kMostColumns];  // where a key row's products go in `forward`
  int64_t columns;
  Ahead ahead;

  // Lists the rows of `samples` key samples; `pitch` is the padded number of query pixels.
  void add_key(const T* rows, int64_t count, int64_t stride, int64_t first_lane) {
    for (int64_t l = 0; l < count; ++l) {
      key[columns] = rows + l * stride;
      forward_place[columns++] = l * forward_stride + first_lane;
    }
  }
  // Repeats the last row up to a whole register block: it is computed again and written again.
  void fill_up(int group) {
    for (int64_t n = columns; n % block_columns(group) != 0; ++n) {
      key[n] = key[columns - 1];
      forward_place[n] = forward_place[columns - 1];
    }
  }

  template <int Rows>
  void compute(const T* query, int64_t rows, int64_t stride, int64_t width, bool need_reverse) {
    constexpr int Columns = block_columns(Rows);
    alignas(SALKERNELS_VECTOR_BYTES) T out[Rows * Columns + kLanes<T>];
    for (int64_t p = 0; p < rows; p += Rows) {
      const T* q[Rows];
      for (int i = 0; i < Rows; ++i) q[i] = query + least(p + i, rows - 1) * stride;
      for (int64_t n = 0; n < columns; n += Columns) {
        dot_block<T, Rows, Columns>(q, key + n, width, out);
        ahead.step();
        for (int i = 0; i < Rows; ++i) {
          for (int j = 0; j < Columns; ++j) {
            forward[forward_place[n + j] + p + i] = out[i * Columns + j];
          }
        }
        if (!need_reverse) continue;
        for (int i = 0; i < Rows; ++i) {
          __builtin_memcpy(reverse + (p + i) * reverse_stride + n, out + i * Columns,
                           Columns * sizeof(T));
        }
      }
    }
  }

  void compute(int group, const T* query, int64_t rows, int64_t stride, int64_t width,
               bool need_reverse) {
    switch (group) {
      case 1: return compute<1>(query, rows, stride, width, need_reverse);
      case 2: return compute<2>(query, rows, stride, width, need_reverse);
      case 3: return compute<3>(query, rows, stride, width, need_reverse);
      default: return compute<4>(query, rows, stride, width, need_reverse);
    }
  }

  static SimBlock allocate(Arena& arena) {
    SimBlock block;
    block.forward = arena.take<T>(kBlock * kForwardStride);
    block.reverse = arena.take<T>((kBlock + kMostRows) * kReverseStride);
    return block;
  }
};

// Lane-wise maximum down the rows. The first of equals is kept, and the first NaN wins for good:
//
//      next <= top    top == top    taken
//      true           true          no       smaller, or equal and later
//      false          true          yes      larger, or the first NaN: it compares false
//      false          false         no       top is NaN already
template <class T>
static void running_max(const T* sims, int64_t rows, int64_t stride, int64_t lanes,
                        int64_t first_index, T* best, Index<T>* where) {
  constexpr int W = kLanes<T>;
  for (int64_t n = 0; n < lanes; n += W) {
    Vec<T> top;
    IndexVec<T> place;
    int64_t i = 0;
    if (first_index == 0) {
      top = load<T>(sims + n);
      place = IndexVec<T>{};
      i = 1;
    } else {
      top = load<T>(best + n);
      __builtin_memcpy(&place, where + n, sizeof place);
    }
    for (; i < rows; ++i) {
      const Vec<T> next = load<T>(sims + i * stride + n);
      const IndexVec<T> take = ~(next <= top) & (top == top);
      top = take ? next : top;
      place = take ? IndexVec<T>{} + Index<T>(first_index + i) : place;
    }
    store<T>(best + n, top);
    __builtin_memcpy(where + n, &place, sizeof place);
  }
}

// Which pixels of a window take part, in its row-major order, for some samples; null: all do.
struct WindowValid {
  uint8_t* flags = nullptr;  // (samples, pixels)
  int64_t pixels = 0;

  static WindowValid allocate(Arena& arena, const Problem& problem, int64_t rows) {
    WindowValid valid;
    if (problem.has_valid) valid.flags = arena.take<uint8_t>(rows);
    return valid;
  }
  void read(const Problem& problem, const Node& node, const Window& window, int64_t sample) {
    if (flags == nullptr) return;
    pixels = window.pixels();
    uint8_t* to = flags + sample * pixels;
    for (int64_t row = window.row; row < window.row + window.rows; ++row) {
      const uint8_t* from = node.valid + row * problem.grid.width + window.column;
      for (int64_t i = 0; i < window.columns; ++i) *to++ = from[i];
    }
  }
  const uint8_t* of(int64_t sample) const {
    return flags == nullptr ? nullptr : flags + sample * pixels;
  }
};

// What no key can lose against: products with a pixel that takes no part.
template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

// Takes rows of products out of the running that belong to keys which take no part.
template <class T>
static inline void leave_out(const uint8_t* valid, int64_t rows, T* sims, int64_t stride,
                             int64_t lanes) {
  for (int64_t i = 0; i < rows && valid != nullptr; ++i) {
    if (valid[i] != 0) continue;
    for (int64_t n = 0; n < lanes; ++n) sims[i * stride + n] = kNothing<T>;
  }
}

// Writes the maxima of pixels [first, first + count) of a window to the planes of one pair; `valid`
// is of the query's window.
template <class T, class I>
static void put_pixels(const Problem& problem, int64_t pair, const Window& window, int64_t first,
                       int64_t count, const T* best, const Index<T>* where,
                       const uint8_t* valid) {
  const Grid& grid = problem.grid;
  const int64_t corner = pair * grid.pixels() + window.row * grid.width + window.column;
  T* max_sim = static_cast<T*>(problem.max_sim) + corner;
  I* argmax = static_cast<I*>(problem.argmax) + corner;
  int64_t row = first / window.columns, column = first % window.columns;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = row * grid.width + column;
    const bool absent = valid != nullptr && (valid[first + i] == 0 || best[i] == kNothing<T>);
    max_sim[at] = absent ? T(1) : best[i];
    argmax[at] = absent ? I(-1) : I(grid.nominal_offset(where[i], window.columns));
    if (++column == window.columns) {
      column = 0;
      ++row;
    }
  }
}

template <class T>
static inline void put(const Problem& problem, int64_t pair, const Window& window, int64_t first,
                       int64_t count, const T* best, const Index<T>* where,
                       const uint8_t* valid) {
  if (pair < 0) return;
  if (problem.wide_index) {
    put_pixels<T, int32_t>(problem, pair, window, first, count, best, where, valid);
  } else {
    put_pixels<T, uint8_t>(problem, pair, window, first, count, best, where, valid);
  }
}

// Running maxima of a whole window, in both directions of an edge.
template <class T>
struct MatchState {
  T *best_forward, *best_reverse;
  Index<T> *where_forward, *where_reverse;

  static MatchState allocate(Arena& arena, int64_t pixels) {
    const int64_t lanes = pixels + kForwardStride;
    MatchState state;
    state.best_forward = arena.take<T>(lanes);
    state.best_reverse = arena.take<T>(lanes);
    state.where_forward = arena.take<Index<T>>(lanes);
    state.where_reverse = arena.take<Index<T>>(lanes);
    return state;
  }
};

// One block of query pixels against one range of key pixels of the same window, both packed.
// `first_query` and `first_key` are their numbers in the window, `valid` holds both samples.
template <class T>
static void match_blocks(SimBlock<T>& sims, MatchState<T>& state, const T* query,
                         int64_t first_query, int64_t num_queries, const T* keys,
                         int64_t first_key, int64_t num_keys, int64_t stride, int64_t width,
                         bool need_reverse, const uint8_t* query_valid,
                         const uint8_t* key_valid) {
  const auto from = [](const uint8_t* valid, int64_t pixel) {
    return valid == nullptr ? nullptr : valid + pixel;
  };
  sims.forward_stride = kForwardStride;
  sims.reverse_stride = kReverseStride;
  const int group = row_group(kBlock);
  for (int64_t p = 0; p < num_queries; p += kBlock) {
    const int64_t rows = least(kBlock, num_queries - p), pixel = first_query + p;
    for (int64_t l = 0; l < num_keys; l += kBlock) {
      const int64_t columns = least(kBlock, num_keys - l), key_pixel = first_key + l;
      sims.columns = 0;
      sims.add_key(keys + l * stride, columns, stride, 0);
      sims.fill_up(group);
      sims.compute(group, query + p * stride, rows, stride, width, need_reverse);
      leave_out<T>(from(key_valid, key_pixel), columns, sims.forward, kForwardStride, rows);
      running_max<T>(sims.forward, columns, kForwardStride, rows, key_pixel,
                     state.best_forward + pixel, state.where_forward + pixel);
      if (!need_reverse) continue;
      leave_out<T>(from(query_valid, pixel), rows, sims.reverse, kReverseStride, columns);
      running_max<T>(sims.reverse, rows, kReverseStride, columns, pixel,
                     state.best_reverse + key_pixel, state.where_reverse + key_pixel);
    }
  }
}

// All pairs of a component in one small window: each sample against its partners, several at once,
// as many as have kBlock rows together. A window of 2 x 2 pixels alone would not fill a register.
//
//                      partner 3     partner 5     partner 6
//      lanes of        p p p p .     p p p p .     p p p p .      query pixels, once per partner
//      `forward`       |------ pitch: pixels, rounded up to whole groups of query rows
//      its rows        l = 0, 1, ...: key pixels; the maximum runs down them in all lanes at once
template <class T>
static void match_window(const Problem& problem, const TileShape& shape, const Window& window,
                         const T* pack, SimBlock<T>& sims, MatchState<T>& state,
                         const WindowValid& valid) {
  const Component& component = *shape.component;
  const Edge* edges = &problem.plan.edges[component.first_edge];
  const int64_t pixels = shape.pixels, sample = pixels * shape.stride;
  const int group = row_group(pixels);
  const int64_t pitch = round_up(pixels, group), batch = kBlock / pixels;
  for (int64_t e = 0; e < component.num_edges;) {
    const int32_t first = edges[e].first;
    int64_t last = e;
    bool need_reverse = false;
    while (last < component.num_edges && edges[last].first == first && last - e < batch) {
      need_reverse |= edges[last++].reverse >= 0;
    }
    sims.columns = 0;
    sims.forward_stride = round_up((last - e) * pitch, kLanes<T>);
    sims.reverse_stride = round_up(round_up((last - e) * pixels, block_columns(group)), kLanes<T>);
    for (int64_t j = e; j < last; ++j) {
      sims.add_key(pack + edges[j].second * sample, pixels, shape.stride, (j - e) * pitch);
    }
    sims.fill_up(group);
    sims.compute(group, pack + first * sample, pixels, shape.stride, shape.width, need_reverse);
    for (int64_t j = e; j < last; ++j) {
      leave_out<T>(valid.of(edges[j].second), pixels, sims.forward + (j - e) * pitch,
                   sims.forward_stride, pitch);
    }
    running_max<T>(sims.forward, pixels, sims.forward_stride, (last - e) * pitch, 0,
                   state.best_forward, state.where_forward);
    if (need_reverse) {
      leave_out<T>(valid.of(first), pixels, sims.reverse, sims.reverse_stride,
                   (last - e) * pixels);
      running_max<T>(sims.reverse, pixels, sims.reverse_stride, (last - e) * pixels, 0,
                     state.best_reverse, state.where_reverse);
    }
    for (int64_t j = e; j < last; ++j) {
      const int64_t lane = (j - e) * pitch, column = (j - e) * pixels;
      put<T>(problem, edges[j].forward, window, 0, pixels, state.best_forward + lane,
             state.where_forward + lane, valid.of(first));
      put<T>(problem, edges[j].reverse, window, 0, pixels, state.best_reverse + column,
             state.where_reverse + column, valid.of(edges[j].second));
    }
    e = last;
  }
}

template <class T, class In>
static int64_t match_tile(const Problem& problem, const Tile* tile, char* scratch) {
  Arena arena{scratch};
  int64_t* column_offset = arena.take<int64_t>(problem.grid.width);
  T* pack = arena.take<T>(problem.work.max_tile_rows * packed_stride<T>(problem.channels));
  SimBlock<T> sims = SimBlock<T>::allocate(arena);
  MatchState<T> state = MatchState<T>::allocate(arena, most(kBlock, problem.work.max_window_pixels));
  WindowValid valid = WindowValid::allocate(arena, problem, problem.work.max_window_rows);
  if (scratch == nullptr) return arena.used;

  const TileShape shape = TileShape::of<T>(problem, *tile);
  pack_tile<T, In>(problem, shape, pack, column_offset, nullptr, nullptr);
  const int64_t products =
      shape.num_windows * shape.component->num_edges * shape.pixels * shape.pixels;
  sims.ahead = Ahead::of_next<T, In>(problem, tile, products / 12);
  const Edge* edges = &problem.plan.edges[shape.component->first_edge];
  for (int64_t t = 0; t < shape.num_windows; ++t) {
    const T* rows = pack + t * shape.window_stride;
    const Window window = shape.window_at(t);
    for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
      valid.read(problem, shape.nodes[s], window, s);
    }
    if (shape.pixels <= kBlock) {
      match_window<T>(problem, shape, window, rows, sims, state, valid);
      continue;
    }
    for (int64_t e = 0; e < shape.component->num_edges; ++e) {
      const Edge& edge = edges[e];
      const int64_t sample = shape.pixels * shape.stride;
      match_blocks<T>(sims, state, rows + edge.first * sample, 0, shape.pixels,
                      rows + edge.second * sample, 0, shape.pixels, shape.stride, shape.width,
                      edge.reverse >= 0, valid.of(edge.first), valid.of(edge.second));
      put<T>(problem, edge.forward, window, 0, shape.pixels, state.best_forward,
             state.where_forward, valid.of(edge.first));
      put<T>(problem, edge.reverse, window, 0, shape.pixels, state.best_reverse,
             state.where_reverse, valid.of(edge.second));
    }
  }
  return arena.used;
}

// loss = Σ |1 − max_sim| / (H·W); pixels that take no part have 1. A few thousand at a time are
// summed in the accumulation type, and those sums in fp64: one fp32 sum over a map of 4000 x 4000
// would be off by 1e-4.
template <class T>
static void pair_loss(const Problem& problem, int64_t pair) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kPart = 4096;
  const int64_t count = problem.grid.pixels();
  const T* max_sim = static_cast<const T*>(problem.max_sim) + pair * count;
  double all = 0;
  for (int64_t first = 0; first < count; first += kPart) {
    const int64_t end = least(first + kPart, count);
    Vec<T> sum[2] = {};
    int64_t i = first;
    for (; i + 2 * W <= end; i += 2 * W) {
      for (int k = 0; k < 2; ++k) {
        const Vec<T> distance = 1 - load<T>(max_sim + i + k * W);
        sum[k] += distance < 0 ? -distance : distance;
      }
    }
    T rest = total<T>(sum[0] + sum[1]);
    for (; i < end; ++i) {
      const T distance = 1 - max_sim[i];
      rest += distance < 0 ? -distance : distance;
    }
    all += double(rest);
  }
  static_cast<T*>(problem.loss)[pair] = T(all / double(count));
}
