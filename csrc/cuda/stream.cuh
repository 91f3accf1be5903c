// Forward where one window of one sample is larger than a tile, and float64.
//
// norms         ‖x‖ of every row, one warp for each
// stream        a block owns some query pixels of one pair in one window; all key pixels pass by, a
//               tile at a time, with a running maximum in registers. Where there are pairs enough
//               for all multiprocessors it owns all query pixels, and serves the other direction of
//               the pair too: the key pixels have a running maximum in shared memory
// match_plain   the forward of float64, one warp per query pixel of a pair
#pragma once

#include "pairs.cuh"
#include "tile_best.cuh"

namespace salkernels {
namespace cuda {

template <class F>
__device__ inline F sum_of_warp(F x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline int64_t warp_index() {
  return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
}

// The window that holds a pixel of the map, and which pixel of it that is.
struct MapPixel {
  Unit unit;
  int pixel;

  __device__ static MapPixel of(const Problem& p, int64_t group, int64_t plane) {
    const int64_t row = plane / p.grid.width, column = plane % p.grid.width;
    const int64_t window =
        row / p.grid.window_rows * p.grid.across() + column / p.grid.window_columns;
    const Unit unit = unit_of(p, group * p.windows() + window);
    return {unit, int(row - unit.row) * unit.columns + int(column - unit.column)};
  }
};

// Lanes share a row where channels are contiguous, or take a pixel each.
template <class T>
__device__ void norms(const Problem& p) {
  using F = typename Wide<T>::type;
  const int side = blockIdx.y;
  const Maps& maps = p.maps[side];
  const int64_t planes = p.grid.pixels(), stride = maps.strides[2];
  const int lane = threadIdx.x % 32;
  const bool along_channels = stride == 1;
  const int64_t index =
      along_channels ? warp_index() : int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.groups * maps.samples * planes) return;
  const int64_t plane = index % planes, sample = index / planes % maps.samples;
  const int64_t group = index / planes / maps.samples;
  const int64_t row = plane / p.grid.width, column = plane % p.grid.width;
  const T* start = static_cast<const T*>(maps.data) + group * maps.strides[0] +
                   sample * maps.strides[1] + row * maps.strides[3] + column * maps.strides[4];
  const bool valid = maps.valid == nullptr ||
                     maps.valid[group * maps.valid_stride + sample * planes + plane] != 0;
  F squares = 0;
  const bool by_pieces = valid && maps.vector && sizeof(T) < 8;
  if constexpr (sizeof(T) < 8) {
    constexpr int kValues = 16 / int(sizeof(T));
    for (int c = lane * kValues; by_pieces && c < p.channels; c += 32 * kValues) {
      add_squares<T>(squares, *reinterpret_cast<const Piece*>(start + c));
    }
  }
  if (valid && !by_pieces) {
    const int step = along_channels ? 32 : 1;
    for (int64_t c = along_channels ? lane : 0; c < p.channels; c += step) {
      const F x = widen(start[c * stride]);
      squares += x * x;
    }
  }
  if (along_channels) squares = sum_of_warp(squares);
  if (along_channels && lane != 0) return;
  const int64_t node = sample + (side == 1 ? p.maps[0].samples : 0);
  static_cast<F*>(p.norm)[norm_index(p, group, node, plane)] =
      valid ? row_norm(squares) : F(INFINITY);
}

// The pair that a block or a warp is given by its number in the list; query < 0: room left over.
struct ListedPair {
  int64_t group, query, key;

  __device__ static ListedPair of(const Problem& p, int64_t slot) {
    const int64_t place = pair_place(p, slot), keys = p.maps[1].samples;
    if (place >= p.table()) return {-1, -1, -1};
    return {place / keys / p.maps[0].samples, place / keys % p.maps[0].samples, place % keys};
  }
};

// How many parts a row of a tile falls into, or a column: the warps that share it.
constexpr int kRowParts = kTile / kWarpColumns, kColumnParts = kTile / kWarpRows;

// The pairs that a block works on. Of both directions the query is the sample that comes first,
// also where the other direction alone is asked for: the same bits whatever else is listed.
struct StreamPairs {
  ListedPair pair;
  int64_t slot, reverse;  // of this direction, and of the other; -1: not asked for
  bool other_block;       // which has this pair as the reverse of its own

  __device__ static StreamPairs of(const Problem& p, int64_t slot) {
    StreamPairs all{ListedPair::of(p, slot), slot, -1, false};
    const int64_t group = all.pair.group, query = all.pair.query, key = all.pair.key;
    if (query < 0 || !p.tiling.both || query == key) return all;
    const int64_t samples = p.maps[0].samples;
    const int64_t place = (group * samples + key) * samples + query;
    const int64_t at = pairs_before(p, place);
    const bool listed = at < p.num_pairs && pair_place(p, at) == place;
    if (query > key) return {{group, key, query}, -1, slot, listed};
    if (listed) all.reverse = at;
    return all;
  }
};

struct alignas(16) StreamShared {
  const unsigned char* start[2 * kTile];  // rows of queries and keys
  Scale scale[2 * kTile];
  Best<float> part[kRowParts][kTile];  // of rows or columns, what each warp has found
  StreamPairs pairs;  // here, since registers are short
  Unit unit;
  int32_t staged[2];                   // rows of each side in a stage
  alignas(16) uint32_t buffer[4];      // stages, of dynamic size; then the best of all keys, if both
};

__host__ __device__ constexpr int64_t stream_shared_bytes(int64_t stages, bool lower) {
  return int64_t(sizeof(StreamShared)) + 8 * (stages + (lower ? 1 : 0)) * kTileWords;
}
// And for the best of all keys of a window, where a block serves both directions of a pair.
__host__ __device__ constexpr int64_t stream_keys_bytes(int64_t chunks, int64_t pixels) {
  return chunks * pixels * int64_t(sizeof(Best<float>));
}

// Fills the row of this thread: a pixel of the query's or of the key's window. Whether it is lost:
// a NaN, which comparisons must be told of.
template <class T>
__device__ inline bool fill_stream_row(const Problem& p, StreamShared& shared, int which,
                                       const Unit& unit, int64_t sample, int pixel, bool inside) {
  const Maps& maps = p.maps[which];
  const unsigned char* row = nullptr;
  Scale scale = Scale::absent();
  if (inside && pixel < unit.pixels() && is_valid(p, maps, unit, sample, pixel)) {
    row = static_cast<const unsigned char*>(maps.data) +
          map_offset(maps.strides, unit, sample, pixel) * int(sizeof(T));
    const int64_t node = sample + (which == 1 && !p.set_form ? p.maps[0].samples : 0);
    scale = Scale::of(
        unit_scale(static_cast<const float*>(
                       p.norm)[norm_index(p, unit.group, node, plane_index(p, unit, pixel))],
                   float(p.eps)));
  }
  shared.start[threadIdx.x] = row;
  shared.scale[threadIdx.x] = scale;
  return scale.factor != scale.factor;
}

__device__ inline void store_found(const Problem& p, const Unit& unit, int64_t slot, int pixel,
                                   const Best<float>& best) {
  store_match(p, match_index(p, slot, plane_index(p, unit, pixel)), best.value,
              best.place < 0 ? -1 : nominal_offset(p, unit, best.place));
}

// The best of all columns, from the lanes and warps that share a row.
__device__ inline void store_rows(const Problem& p, StreamShared& shared, const Unit& unit,
                                  int64_t slot, int first_pixel, int rows,
                                  Best<float> (&best)[kLaneRows]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best[i].value, step);
      best[i].merge(other, __shfl_xor_sync(kAllLanes, best[i].place, step));
    }
    if (lane % 4 == 0) {
      const int row = WarpPart::row() + lane / 4 + i * 8;
      shared.part[WarpPart::column() / kWarpColumns][row] = best[i];
    }
  }
  __syncthreads();
  const int row = threadIdx.x, pixel = first_pixel + row;
  if (row < rows && pixel < unit.pixels()) {
    Best<float> all = shared.part[0][row];
    for (int i = 1; i < kRowParts; ++i) {
      all.merge(shared.part[i][row].value, shared.part[i][row].place);
    }
    store_found(p, unit, slot, pixel, all);
  }
  __syncthreads();
}

// One tile: pixels of the query from first_row on, of the key from first_column on. What the keys
// found goes to shared.part.
template <class Mode>
__device__ __forceinline__ void stream_tile(const Problem& p, StreamShared& shared, bool lost,
                                            bool both, int first_row, int first_column,
                                            Best<float> (&best)[kLaneRows]) {
  Sums<kBlocks> sums = {};
  float unused[kRowsOfThread];
  multiply_tile<Mode, false, true>(p, {shared.start, shared.staged, false}, nullptr, false,
                                   shared.buffer, sums, unused);
  const auto take = [&](auto found) {
    const Best<float> own = found.take();
    if (!both) return;
    shared.part[WarpPart::row() / kWarpRows][found.own_column()] = {own.value,
                                                                    first_row + own.place};
  };
  if (lost) {
    if (both) {
      take(TileBest<true, true>(sums, shared.scale, first_column, best));
    } else {
      take(TileBest<true, false>(sums, shared.scale, first_column, best));
    }
  } else if (both) {
    take(TileBest<false, true>(sums, shared.scale, first_column, best));
  } else {
    take(TileBest<false, false>(sums, shared.scale, first_column, best));
  }
}

// Adds what the keys of a tile found to what they had. Rows come in ascending order.
__device__ inline void merge_keys(const StreamShared& shared, Best<float>* keys, int columns) {
  const int column = threadIdx.x;
  if (column >= columns) return;
  Best<float> all = keys[column];
  for (int i = 0; i < kColumnParts; ++i) {
    take_greater<true>(all, shared.part[i][column].value, shared.part[i][column].place);
  }
  keys[column] = all;
}

template <class Mode>
__device__ void stream(const Problem& p) {
  SALKERNELS_SHARED(memory);
  StreamShared& shared = *reinterpret_cast<StreamShared*>(memory);
  using T = typename Mode::T;
  const Tiling& t = p.tiling;
  // Window by window: what the blocks beside each other read is the same. A block has some pixels
  // of the query, or, for both directions, all.
  const int64_t blocks = t.both ? 1 : t.chunks, rest = blockIdx.x / blocks;
  const StreamPairs all = StreamPairs::of(p, rest % p.num_pairs);
  if (all.pair.query < 0 || all.other_block) return;
  if (threadIdx.x == 0) {
    shared.pairs = all;
    shared.unit = unit_of(p, all.pair.group * p.windows() + rest / p.num_pairs);
  }
  // Rows beyond the window too, as zeros: all blocks are multiplied.
  if (threadIdx.x < 2) shared.staged[threadIdx.x] = kTile;
  __syncthreads();
  const Unit& unit = shared.unit;
  const int pixels = int(t.pixels), count = unit.pixels();
  const int begin = t.both ? 0 : int(blockIdx.x % blocks) * pixels;
  const int end = t.both ? count : (begin + pixels < count ? begin + pixels : count);
  const bool both = shared.pairs.reverse >= 0;
  const int64_t staged = t.stages + (Mode::kProducts == 3 ? 1 : 0);
  auto* const keys = reinterpret_cast<Best<float>*>(shared.buffer + staged * 2 * kTileWords);
  for (int i = threadIdx.x; both && i < count; i += kThreads) keys[i] = Best<float>();

  const int which = threadIdx.x / kTile, r = threadIdx.x % kTile;
  for (int row = begin; row < end; row += pixels) {
    bool lost_query = false;
    if (which == 0) {
      lost_query = fill_stream_row<T>(p, shared, 0, unit, shared.pairs.pair.query, row + r, r < pixels);
    }
    const bool asked = __syncthreads_or(which == 0 && shared.start[r] != nullptr);
    Best<float> best[kLaneRows];
    for (int column = 0; asked && column < count; column += pixels) {
      bool lost = lost_query;
      if (which == 1) {
        lost = fill_stream_row<T>(p, shared, 1, unit, shared.pairs.pair.key, column + r, r < pixels);
      }
      lost = __syncthreads_or(lost);
      stream_tile<Mode>(p, shared, lost, both, row, column, best);
      __syncthreads();
      const int columns = count - column < pixels ? count - column : pixels;
      if (both) merge_keys(shared, keys + column, columns);
    }
    if (both) __syncthreads();
    if (shared.pairs.slot >= 0) {
      store_rows(p, shared, unit, shared.pairs.slot, row, pixels, best);
    }
  }
  for (int i = threadIdx.x; both && i < count; i += kThreads) {
    store_found(p, unit, shared.pairs.reverse, i, keys[i]);
  }
}

// One warp per (pair, query pixel); lanes take key pixels.
template <class T>
__device__ void match_plain(const Problem& p) {
  using F = typename Wide<T>::type;
  const int64_t plane = p.grid.pixels(), slot = warp_index() / plane, at = warp_index() % plane;
  if (slot >= p.num_pairs) return;
  const ListedPair pair = ListedPair::of(p, slot);
  if (pair.query < 0) return;
  const MapPixel own = MapPixel::of(p, pair.group, at);
  const Unit& unit = own.unit;
  const Maps &from = p.maps[0], &to = p.maps[1];
  const int64_t first_key = p.set_form ? 0 : p.maps[0].samples;
  const F* const norm = static_cast<const F*>(p.norm);
  const T* x =
      static_cast<const T*>(from.data) + map_offset(from.strides, unit, pair.query, own.pixel);
  const F scale = unit_scale(norm[norm_index(p, pair.group, pair.query, at)], F(p.eps));
  const bool valid = is_valid(p, from, unit, pair.query, own.pixel);
  const int lane = threadIdx.x % 32, count = valid ? unit.pixels() : 0;
  Best<F> best;
  for (int l = lane; l < count; l += 32) {
    if (!is_valid(p, to, unit, pair.key, l)) continue;
    const T* y = static_cast<const T*>(to.data) + map_offset(to.strides, unit, pair.key, l);
    F dot = 0;
    for (int64_t c = 0; c < p.channels; ++c) {
      dot += F(widen(x[c * from.strides[2]])) * F(widen(y[c * to.strides[2]]));
    }
    const int64_t place =
        norm_index(p, pair.group, first_key + pair.key, plane_index(p, unit, l));
    best.take(dot * scale * unit_scale(norm[place], F(p.eps)), l);
  }
  for (int step = 16; step > 0; step /= 2) {
    const F other = __shfl_xor_sync(kAllLanes, best.value, step);
    const int place = __shfl_xor_sync(kAllLanes, int(best.place), step);
    best.merge(other, place);
  }
  if (lane != 0) return;
  store_match(p, match_index(p, slot, at), best.value,
              best.place < 0 ? -1 : nominal_offset(p, unit, best.place));
}

}  // namespace cuda
}  // namespace salkernels
