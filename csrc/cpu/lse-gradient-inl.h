// Backward of the log-sum-exp: V of each row as a product of weights with packed rows, in blocks of
// registers, and from it the gradient. Each is written once, and no two threads share one.

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
#endif

// V of some rows: Σ weight · row over `count` rows of each of some partners.
template <class T>
struct WeightedSum {
  const T* weights;  // [row of a partner][row of V], `pitch` apart
  int64_t pitch;
  const Partner *begin, *end;
  const T* unit;  // the partners' packed rows
  int64_t count, stride;

  // `Rows` rows of V, `Columns` registers of each.
  //
  //                 x0   x1   x2
  //      w0 ->     +--+ +--+ +--+          12 sums, 3 registers of a partner's row, and 1 for
  //      w1        |  | |  | |  |          each weight in turn: 7 loads for 12 products
  //      w2        +--+ +--+ +--+
  //      w3
  template <int Rows, int Columns, bool Add>
  void block(int64_t p, int64_t c, T* out) const {
    constexpr int W = kLanes<T>;
    Vec<T> sum[Rows][Columns] = {};
    if constexpr (Add) {
      for (int i = 0; i < Rows; ++i) {
        for (int k = 0; k < Columns; ++k) sum[i][k] = load<T>(out + (p + i) * stride + c + k * W);
      }
    }
    const T* weight = weights + p;
    for (const Partner* partner = begin; partner != end; ++partner) {
      const T* row = unit + partner->node * count * stride + c;
      for (int64_t l = 0; l < count; ++l) {
        Vec<T> x[Columns];
        for (int k = 0; k < Columns; ++k) x[k] = load<T>(row + k * W);
        SALKERNELS_UNROLL
        for (int i = 0; i < Rows; ++i) {
          const Vec<T> w = splat<T>(weight[i]);
          for (int k = 0; k < Columns; ++k) sum[i][k] += w * x[k];
        }
        row += stride;
        weight += pitch;
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int k = 0; k < Columns; ++k) store<T>(out + (p + i) * stride + c + k * W, sum[i][k]);
    }
  }

  // All rows of V in some columns, in even groups of at most four.
  template <int Columns, bool Add>
  void columns(int64_t rows, int64_t c, T* out) const {
    for (int64_t p = 0; p < rows;) {
      const int64_t groups = (rows - p + kMostRows - 1) / kMostRows;
      const int64_t some = (rows - p + groups - 1) / groups;
      switch (some) {
        case 1: block<1, Columns, Add>(p, c, out); break;
        case 2: block<2, Columns, Add>(p, c, out); break;
        case 3: block<3, Columns, Add>(p, c, out); break;
        default: block<4, Columns, Add>(p, c, out);
      }
      p += some;
    }
  }
};

// V of one row after the other of partners would fetch a long list of them anew for every four
// rows: it is added up from as many partners at a time as stay in the first-level cache.
constexpr int64_t kSumRows = 128;

template <class T, int Columns>
static inline void sum_partners(WeightedSum<T> sum, int64_t rows, int64_t c, T* out) {
  const Partner* const end = sum.end;
  const int64_t some = most(1, kSumRows / sum.count);
  sum.end = sum.begin + least(some, end - sum.begin);
  sum.template columns<Columns, false>(rows, c, out);
  while (sum.end != end) {
    sum.weights += (sum.end - sum.begin) * sum.count * sum.pitch;
    sum.begin = sum.end;
    sum.end += least(some, end - sum.begin);
    sum.template columns<Columns, true>(rows, c, out);
  }
}

// Calls use(columns, first channel) for all registers of a row, three at a time.
template <class T, class Use>
static inline void for_columns(int64_t width, const Use& use) {
  int64_t c = 0;
  for (; c + 3 * kLanes<T> <= width; c += 3 * kLanes<T>) use(std::integral_constant<int, 3>{}, c);
  for (; c < width; c += kLanes<T>) use(std::integral_constant<int, 1>{}, c);
}

// dx = (V − (x̂·V) x̂) / ‖x‖ of one row. A row that nothing touches has V = 0 and no gradient, even if
// its features are NaN; `unit` is 0 for such a row, and `inv_norm` NaN. `around`: around the caches.
template <class T, class Out>
static void through_norm(const T* sum, const T* unit, int64_t channels, T inv_norm, bool absent,
                         Out* out, bool around) {
  constexpr int W = kLanes<T>;
  const int64_t width = round_up(channels, W);
  Vec<T> along = {};
  for (int64_t c = 0; c < width; c += W) along += load<T>(sum + c) * load<T>(unit + c);
  if (inv_norm != inv_norm) {
    bool touched = false;
    for (int64_t c = 0; c < width; ++c) touched |= sum[c] != 0;
    absent |= !touched;
  }
  const Vec<T> part = splat<T>(total<T>(along)), inverse = splat<T>(inv_norm);
  for (int64_t c = 0; c < channels; c += W) {
    const Vec<T> through = (load<T>(sum + c) - part * load<T>(unit + c)) * inverse;
    const Vec<T> gradient = absent ? Vec<T>{} : through;
    if (around) {
      stream(out + c, gradient);
    } else if (c + W <= channels) {
      Convert<T, Out>::store_vec(out + c, gradient);
    } else {
      store_part<T, Out>(out + c, gradient, channels - c);
    }
  }
}

// What is not a number becomes 0: it counts in the log-sum-exp alone, or 0 · NaN would spread it.
template <class T>
static void clear_poisoned(T* rows, int64_t count, int64_t stride, const T* poison) {
  for (int64_t r = 0; r < count; ++r) {
    if (poison[r] != 0) std::memset(rows + r * stride, 0, size_t(stride) * sizeof(T));
  }
}

// The scratch memory of a tile's backward.
template <class T>
struct LseGradientScratch {
  int64_t* column_offset;
  T *pack, *norms, *poison;
  void** out;
  Partners partners;
  QueryRows<T> rows;
  WeightPanel<T> panel;

  static LseGradientScratch allocate(Arena& arena, const LseProblem& problem) {
    const Work& work = problem.work;
    LseGradientScratch s;
    s.column_offset = arena.take<int64_t>(problem.grid.width);
    // One window more than the tile: see `gradient_windows`.
    s.pack = arena.take<T>((work.max_tile_rows + work.max_window_rows) *
                           packed_stride<T>(problem.channels));
    s.norms = arena.take<T>(work.max_tile_rows);
    s.poison = arena.take<T>(work.max_tile_rows);
    s.out = arena.take<void*>(work.max_window_rows);
    s.partners = Partners::allocate(arena, problem);
    s.rows = QueryRows<T>::allocate(arena, work.max_window_rows);
    s.panel = WeightPanel<T>::allocate(arena, problem);
    return s;
  }
};

// V of all rows of one packed window.
template <class T>
static void lse_sums(const LseProblem& problem, const TileShape& shape, const Window& window,
                     const T* unit, T* out, LseGradientScratch<T>& scratch) {
  const int32_t nodes = shape.component->num_nodes;
  const int64_t pixels = shape.pixels;
  const Partners& partners = scratch.partners;
  WeightPanel<T>& panel = scratch.panel;
  for (int32_t s = 0; s < nodes; ++s) {
    scratch.rows.from(s * pixels).read(problem, shape.nodes[s], window, 0, pixels);
    panel.valid.read(problem, shape.nodes[s], window, s);
  }
  for (int32_t first = 0; first < nodes; first = panel.end) {
    panel.begin_at(first, partners, nodes, pixels);
    panel.compute(shape, unit, partners, scratch.rows, T(1 / problem.temperature));
    // A few channels of all rows at a time, which stay in the first-level cache.
    for_columns<T>(shape.width, [&](auto columns, int64_t c) {
      for (int32_t s = panel.first; s < panel.end; ++s) {
        const WeightedSum<T> sum{panel.of(partners, s, pixels), pixels,
                                 partners.list + partners.begin[s],
                                 partners.list + partners.begin[s + 1], unit, pixels,
                                 shape.stride};
        sum_partners<T, decltype(columns)::value>(sum, pixels, c, out + s * pixels * shape.stride);
      }
    });
  }
}

// From V of one packed window to gradients, wherever its rows are to go.
template <class T, class Out>
static void lse_gradients(const LseProblem& problem, const TileShape& shape, const T* sums,
                          const T* unit, const T* norms, const WindowValid& valid,
                          int64_t channels, Out** out, bool around) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    through_norm<T>(sums + r * shape.stride, unit + r * shape.stride, channels,
                    inverse_for_gradient<T>(norms[r], T(problem.eps)),
                    valid.flags != nullptr && valid.flags[r] == 0, out[r], around);
  }
}

// Packed gradients of a tile to its maps.
template <class T, class In>
static void unpack_tile(const Problem& problem, const TileShape& shape, const T* packed,
                        int64_t* column_offset) {
  const PackedPlace place = shape.place(column_offset);
  const Patch patch = shape.patch(problem.channels);
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    unpack_patch<T, In>(shape.nodes[s], patch, packed + s * shape.pixels * shape.stride, place,
                        problem.write_around);
  }
}

template <class T, class In>
static int64_t lse_gradient_tile(const LseProblem& problem, const Tile* tile, char* memory) {
  Arena arena{memory};
  auto scratch = LseGradientScratch<T>::allocate(arena, problem);
  if (memory == nullptr) return arena.used;
  const TileShape shape = TileShape::of<T>(problem, *tile);
  T* const unit = scratch.pack + shape.window_stride;
  pack_tile<T, In>(problem, shape, unit, scratch.column_offset, scratch.norms, scratch.poison);
  scratch.partners.build(problem, *shape.component);
  const int64_t products =
      shape.num_windows * shape.component->num_edges * shape.pixels * shape.pixels;
  scratch.panel.sims.ahead = Ahead::of_next<T, In>(problem, tile, products / 12);
  const bool direct = shape.component->grads_channels_last;
  const bool around = problem.write_around && direct && std::is_same_v<T, In> &&
                      whole_lines<In>(shape, problem.channels);
  for (int64_t t = 0; t < shape.num_windows; ++t) {
    T* const rows = unit + t * shape.window_stride;
    // In the place of the window before, which nothing needs any more.
    T* const sums = rows - shape.window_stride;
    const T* const norms = scratch.norms + t * shape.rows;
    clear_poisoned<T>(rows, shape.rows, shape.stride, scratch.poison + t * shape.rows);
    const Window window = shape.window_at(t);
    lse_sums<T>(problem, shape, window, rows, sums, scratch);
    if (direct) {
      In** to = reinterpret_cast<In**>(scratch.out);
      rows_of_map<In>(shape, window, to);
      lse_gradients<T>(problem, shape, sums, rows, norms, scratch.panel.valid, problem.channels,
                       to, around);
    } else {
      T** to = reinterpret_cast<T**>(scratch.out);
      for (int64_t r = 0; r < shape.rows; ++r) to[r] = sums + r * shape.stride;
      lse_gradients<T>(problem, shape, sums, rows, norms, scratch.panel.valid, shape.width, to,
                       false);
    }
  }
  if (!direct) unpack_tile<T, In>(problem, shape, scratch.pack, scratch.column_offset);
  if (problem.write_around) stream_end();
  return arena.used;
}
