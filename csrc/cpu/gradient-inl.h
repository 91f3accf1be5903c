// Backward: V of each row is a short list of partner rows and weights, gathered and summed in
// registers, so that each gradient is written once and no two threads share one.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "terms-inl.h"
#endif

// dx = (V − (x̂·V) x̂) / ‖x‖ of `Registers` registers of one row; a single one may be the last, of
// which only `count` channels exist.
template <class T, class Out, int Registers, bool Around>
static inline void gradient_row(const Term<T>* terms, const Term<T>* end, const T* unit,
                                const T* self, T along, T inv_norm, Out* out, int64_t count) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[Registers] = {};
  for (; terms != end; ++terms) {
    const T* partner = unit + terms->offset;
    const Vec<T> weight = splat<T>(terms->weight);
    for (int k = 0; k < Registers; ++k) sum[k] += weight * load<T>(partner + k * W);
  }
  SALKERNELS_UNROLL
  for (int k = 0; k < Registers; ++k) {
    const Vec<T> gradient = (sum[k] - along * load<T>(self + k * W)) * inv_norm;
    if constexpr (Around) {
      stream(out + k * W, gradient);
    } else if (Registers == 1 && count < W) {
      store_part<T, Out>(out, gradient, count);
    } else {
      Convert<T, Out>::store_vec(out + k * W, gradient);
    }
  }
}

// The gradients of a packed window, to wherever its rows are to go. A few channels of all rows at a
// time, as many as have a register each and leave all rows in the first-level cache:
//
//               channels ->
//      row 0    [ 1st block | 2nd block | ...      the terms of a row add the same block of its
//      row 1    [           |           |          partners' rows, each from the first level
//      ...
template <class T, class Out>
struct GradientRows {
  static constexpr int kMost = SALKERNELS_VECTOR_BYTES == 64 ? 8 : 12, kFew = 4;
  static constexpr int64_t kFirstLevel = 28 << 10;

  Out** out;  // (rows)
  int64_t rows, stride, channels;
  bool around;  // whether to write around the caches; every row is whole lines then

  template <int Registers, bool Around>
  void columns(const TermLists<T>& lists, const T* unit, const T* inv_norm, int64_t c,
               Ahead& ahead) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Term<T>*terms = lists.terms + lists.begin[r], *end = lists.terms + lists.begin[r + 1];
      gradient_row<T, Out, Registers, Around>(terms, end, unit + c, unit + r * stride + c,
                                              lists.along[r], inv_norm[r], out[r] + c,
                                              channels - c);
      ahead.step();
    }
  }
  template <int Registers>
  int64_t blocks(const TermLists<T>& lists, const T* unit, const T* inv_norm, int64_t c,
                 Ahead& ahead) const {
    constexpr int64_t step = Registers * kLanes<T>;
    for (; c + step <= channels; c += step) {
      if constexpr (std::is_same_v<T, Out> && Registers > 1) {
        if (around) {
          columns<Registers, true>(lists, unit, inv_norm, c, ahead);
          continue;
        }
      }
      columns<Registers, false>(lists, unit, inv_norm, c, ahead);
    }
    return c;
  }

  // Whether kMost registers of each row fit the first-level cache together: a row is read once for
  // its own gradient, and once for each term whose partner it is.
  static bool fits_many(int64_t rows) {
    return rows * kMost * SALKERNELS_VECTOR_BYTES <= kFirstLevel;
  }
  // How often `ahead` is asked to step, about.
  static int64_t steps(int64_t rows, int64_t width) {
    return rows * most(1, width / kLanes<T> / (fits_many(rows) ? kMost : kFew));
  }
  void all(const TermLists<T>& lists, const T* unit, const T* inv_norm, Ahead& ahead) const {
    int64_t c = 0;
    if (fits_many(rows)) c = blocks<kMost>(lists, unit, inv_norm, c, ahead);
    c = blocks<kFew>(lists, unit, inv_norm, c, ahead);
    for (; c < channels; c += kLanes<T>) columns<1, false>(lists, unit, inv_norm, c, ahead);
  }
};

// Rows of the map itself, in the order of packed rows.
template <class Out>
static void rows_of_map(const TileShape& shape, const Window& window, Out** out) {
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    const MapStrides& strides = shape.nodes[s].grad_strides;
    Out* map = static_cast<Out*>(shape.nodes[s].grad);
    for (int64_t row = window.row; row < window.row + window.rows; ++row) {
      for (int64_t column = window.column; column < window.column + window.columns; ++column) {
        *out++ = map + row * strides.row + column * strides.column;
      }
    }
  }
}

// NaN reaches the gradient of a row in a pair, by way of x̂·V. A row in none has no gradient and is
// no partner: its unit vector and 1 / ‖x‖ become 0, so that nothing multiplies a NaN.
template <class T>
static void apply_poison(TermLists<T>& lists, const TileShape& shape, const T* poison, T* unit,
                         T* inv_norm) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (lists.begin[r + 1] > lists.begin[r]) {
      lists.along[r] += poison[r];
    } else if (poison[r] != 0) {
      T* row = unit + r * shape.stride;
      for (int64_t c = 0; c < shape.stride; ++c) row[c] = 0;
      inv_norm[r] = 0;
    }
  }
}

// Whether the rows of all gradients are whole cache lines, so that they can be written around them.
template <class In>
static bool whole_lines(const TileShape& shape, int64_t channels) {
  const auto uneven = [](int64_t elements) { return elements * int64_t(sizeof(In)) % kLineBytes; };
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    const MapStrides& strides = shape.nodes[s].grad_strides;
    if (reinterpret_cast<uintptr_t>(shape.nodes[s].grad) % kLineBytes != 0) return false;
    if (uneven(strides.row) || uneven(strides.column) || uneven(channels)) return false;
  }
  return true;
}

// The scratch memory of `gradient_tile`.
template <class T>
struct GradientScratch {
  int64_t* column_offset;
  T *pack, *inv_norm, *poison;
  void** out;
  MatchTable<T> matches;
  TermLists<T> lists;

  static GradientScratch allocate(Arena& arena, const Problem& problem) {
    const Work& work = problem.work;
    GradientScratch s;
    s.column_offset = arena.take<int64_t>(problem.grid.width);
    // One window more than the tile: see `gradient_windows`.
    s.pack = arena.take<T>((work.max_tile_rows + work.max_window_rows) *
                           packed_stride<T>(problem.channels));
    s.inv_norm = arena.take<T>(work.max_tile_rows);
    s.poison = arena.take<T>(work.max_tile_rows);
    s.out = arena.take<void*>(work.max_window_rows);
    s.matches = MatchTable<T>::allocate(arena, work);
    s.lists = TermLists<T>::allocate(arena, work.max_window_rows, work.max_window_matches);
    return s;
  }
};

// Packs some windows of a tile, the first of which is number `first`, and writes their gradients.
//
// Channels-last, they go straight to the map. Else a window's take the place of the window before
// it, which nothing needs any more, and then all go to the map together:
//
//      pack:   [ free | window 0 | window 1 | window 2 ]
//                  <---- gradients of 0
//                         <------ gradients of 1
template <class T, class In>
static void gradient_windows(const Problem& problem, const TileShape& shape, int64_t first,
                             GradientScratch<T>& scratch, Ahead ahead) {
  const int64_t rows = shape.num_windows * shape.rows;
  T* unit = scratch.pack + shape.window_stride;
  pack_tile<T, In>(problem, shape, unit, scratch.column_offset, scratch.inv_norm, scratch.poison);
  for (int64_t r = 0; r < rows; ++r) {
    scratch.inv_norm[r] = inverse_for_gradient<T>(scratch.inv_norm[r], T(problem.eps));
  }
  const bool direct = shape.component->grads_channels_last;
  const bool around = problem.write_around && direct && whole_lines<In>(shape, problem.channels);
  TermLists<T>& lists = scratch.lists;
  for (int64_t t = 0; t < shape.num_windows; ++t) {
    T *from = unit + t * shape.window_stride, *inv = scratch.inv_norm + t * shape.rows;
    lists.build(problem, shape, scratch.matches.window(first + t));
    apply_poison<T>(lists, shape, scratch.poison + t * shape.rows, from, inv);
    if (direct) {
      In** to = reinterpret_cast<In**>(scratch.out);
      rows_of_map<In>(shape, shape.window_at(t), to);
      const GradientRows<T, In> gradients{to, shape.rows, shape.stride, problem.channels, around};
      gradients.all(lists, from, inv, ahead);
    } else {
      T** to = reinterpret_cast<T**>(scratch.out);
      for (int64_t r = 0; r < shape.rows; ++r) {
        to[r] = scratch.pack + t * shape.window_stride + r * shape.stride;
      }
      const GradientRows<T, T> gradients{to, shape.rows, shape.stride, shape.width, false};
      gradients.all(lists, from, inv, ahead);
    }
  }
  if (direct) return;
  const PackedPlace place = shape.place(scratch.column_offset);
  const Patch patch = shape.patch(problem.channels);
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    const T* packed = scratch.pack + s * shape.pixels * shape.stride;
    unpack_patch<T, In>(shape.nodes[s], patch, packed, place, problem.write_around);
  }
}

template <class T, class In>
static int64_t gradient_tile(const Problem& problem, const Tile* tile, char* memory) {
  Arena arena{memory};
  GradientScratch<T> scratch = GradientScratch<T>::allocate(arena, problem);
  if (memory == nullptr) return arena.used;
  const TileShape shape = TileShape::of<T>(problem, *tile);
  scratch.matches.read(problem, shape);
  const int64_t steps = GradientRows<T, In>::steps(shape.rows, shape.width);
  if (shape.component->by_window()) {
    for (int64_t t = 0; t < shape.num_windows; ++t) {
      const Ahead ahead = t + 1 < shape.num_windows
                              ? Ahead::of<In>(problem, shape.at(t + 1), steps)
                              : Ahead::of_next<T, In>(problem, tile, steps);
      gradient_windows<T, In>(problem, shape.at(t), t, scratch, ahead);
    }
  } else {
    gradient_windows<T, In>(problem, shape, 0, scratch, Ahead{});
  }
  if (problem.write_around) stream_end();
  return arena.used;
}
