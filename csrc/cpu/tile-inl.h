// Scratch memory, the extent of a tile, and its features as packed rows.
//
//      a strip of the map (window rows x W)          a tile, packed:
//      +----+----+----+----+----+--+                   window 0: [sample 0: p p p p | sample 1 | ...
//      | w0 | w1 | w2 | w3 | w4 |  |        ->         window 1: [sample 0: p p p p | sample 1 | ...
//      +----+----+----+----+----+--+                     ...     one row of C channels for each p
//       a tile: a run of windows  narrow last one
//
// Everything that a pair needs is in one window of the pack, whatever the number of pairs; and what
// is read of the map at once is as wide as the run.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#endif

// Bump allocation in the caller's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
};

// What a tile needs to know of its component and extent.
struct TileShape {
  const Component* component;
  const Node* nodes;
  Window window;  // the first one
  int64_t pixels, rows, stride, width, num_windows;
  int64_t window_stride;  // an odd number of lines, as `stride` is

  template <class T>
  static TileShape of(const Problem& problem, const Tile& tile) {
    TileShape shape;
    shape.component = &problem.plan.components[tile.component];
    shape.nodes = &problem.plan.nodes[shape.component->first_node];
    shape.window = problem.grid.window(tile.strip, tile.first_window);
    shape.pixels = shape.window.pixels();
    shape.rows = shape.component->num_nodes * shape.pixels;
    shape.stride = packed_stride<T>(problem.channels);
    shape.width = packed_width<T>(problem.channels);
    shape.num_windows = tile.num_windows;
    shape.window_stride = (shape.rows | 1) * shape.stride;
    return shape;
  }

  // One of its windows alone.
  TileShape at(int64_t t) const {
    TileShape shape = *this;
    shape.window = window_at(t);
    shape.num_windows = 1;
    return shape;
  }
  Window window_at(int64_t t) const {
    Window w = window;
    w.column += t * window.columns;
    return w;
  }
  Patch patch(int64_t channels) const {
    return {window.row, window.column, window.rows, num_windows * window.columns, 0, channels};
  }
  // Packed rows are ordered by window, node, pixel.
  PackedPlace place(int64_t* column_offset) const {
    for (int64_t i = 0; i < num_windows * window.columns; ++i) {
      column_offset[i] = i / window.columns * window_stride + i % window.columns * stride;
    }
    return {window.columns * stride, column_offset};
  }
};

// Packs one window of a channels-last sample as unit vectors, with their norms if wanted.
template <class T, class In>
static void pack_unit_window(const Problem& problem, const Node& node, const Window& window,
                             int64_t stride, T* pack, T* norms, T* poison) {
  const MapStrides& strides = node.strides;
  const In* map = static_cast<const In*>(node.map);
  for (int64_t row = window.row; row < window.row + window.rows; ++row) {
    for (int64_t column = window.column; column < window.column + window.columns; ++column) {
      const bool absent =
          node.valid != nullptr && node.valid[row * problem.grid.width + column] == 0;
      // A pixel that takes no part is not read: it may be NaN.
      const In* from = map + row * strides.row + column * strides.column;
      const auto scale =
          pack_unit_pixel<T, In>(from, absent ? 0 : problem.channels, pack, T(problem.eps));
      if (absent) std::memset(pack, 0, size_t(stride) * sizeof(T));
      pack += stride;
      if (norms == nullptr) continue;
      *norms++ = scale.norm;
      *poison++ = scale.poison;
    }
  }
}

// Packs a tile as unit vectors; in NCHW a sample is scaled while it is still in the cache.
template <class T, class In>
static void pack_tile(const Problem& problem, const TileShape& shape, T* pack,
                      int64_t* column_offset, T* norms, T* poison) {
  const PackedPlace place = shape.place(column_offset);
  const Patch patch = shape.patch(problem.channels);
  const bool channels_last = shape.component->channels_last;
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    const int64_t first = s * shape.pixels;
    const Node& node = shape.nodes[s];
    T* const sample = pack + first * shape.stride;
    if (!channels_last) pack_patch<T, In>(node, patch, problem.grid.width, sample, place);
    for (int64_t t = 0; t < shape.num_windows; ++t) {
      const int64_t row = t * shape.rows + first;
      T* const window_norms = norms == nullptr ? nullptr : norms + row;
      T* const window_poison = norms == nullptr ? nullptr : poison + row;
      T* const rows = sample + t * shape.window_stride;
      if (channels_last) {
        pack_unit_window<T, In>(problem, node, shape.window_at(t), shape.stride, rows, window_norms,
                                window_poison);
      } else {
        normalise<T>(rows, shape.pixels, shape.stride, shape.width, T(problem.eps), window_norms,
                     window_poison);
      }
    }
  }
}
