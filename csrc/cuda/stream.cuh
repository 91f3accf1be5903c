// Forward where one window of one sample is larger than a tile, and float64.
//
// norms         ‖x‖ of every row, one warp for each
// stream        a block owns some query pixels of one pair in one window; all key pixels pass by, a
//               tile at a time, with a running maximum in registers
// match_plain   the forward of float64, one warp per query pixel of a pair
#pragma once

#include "pairs.cuh"
#include "products.cuh"

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

struct alignas(16) StreamShared {
  const unsigned char* start[2 * kTile];  // rows of queries and keys
  float scale[2 * kTile];
  BlockList list;
  int32_t staged[2];               // rows of each side in a stage
  alignas(16) uint32_t buffer[4];  // stages, of dynamic size
};

__host__ __device__ constexpr int64_t stream_shared_bytes(int64_t stages, bool lower) {
  return int64_t(sizeof(StreamShared)) + 8 * (stages + (lower ? 1 : 0)) * kTileWords;
}

// Fills the row of this thread: a pixel of the query's or of the key's window. Whether it is lost:
// a NaN, which comparisons must be told of.
template <class T>
__device__ inline bool fill_stream_row(const Problem& p, StreamShared& shared, int which,
                                       const Unit& unit, int64_t sample, int pixel, bool inside) {
  const Maps& maps = p.maps[which];
  const unsigned char* row = nullptr;
  float scale = kAbsent;
  if (inside && pixel < unit.pixels() && is_valid(p, maps, unit, sample, pixel)) {
    row = static_cast<const unsigned char*>(maps.data) +
          map_offset(maps.strides, unit, sample, pixel) * int(sizeof(T));
    const int64_t node = sample + (which == 1 && !p.set_form ? p.maps[0].samples : 0);
    scale = unit_scale(static_cast<const float*>(
                           p.norm)[norm_index(p, unit.group, node, plane_index(p, unit, pixel))],
                       float(p.eps));
  }
  shared.start[threadIdx.x] = row;
  shared.scale[threadIdx.x] = scale;
  return scale != scale;
}

// All blocks: warp w has those of rows 16 w, in the order of columns.
//
//                columns by 16
//       rows     0 0 0 0 0 0 0 0
//       by 16    1 1 1 1 1 1 1 1
__device__ inline void need_all_blocks(BlockList& list) {
  if (threadIdx.x < kBlocks * kBlocks) {
    list.blocks[threadIdx.x % kBlocks * kWarps + threadIdx.x / kBlocks] = uint8_t(threadIdx.x);
  }
  if (threadIdx.x == 0) list.count = kBlocks * kBlocks;
}

// The best of this lane's columns for its two rows.
template <bool lost>
__device__ inline void take_columns(const Sums<kBlocks>& sums, const float* scale, int columns,
                                    int first, Best<float> (&best)[2]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const float row_scale[2] = {scale[row], scale[row + 8]};
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    if (i * 8 >= columns) break;
    const int column = i * 8 + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float column_scale = scale[kTile + column + k];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const float product = sums.at[i / 2][i % 2][2 * upper + k] * row_scale[upper];
        const float value = column_scale < 0 ? -INFINITY : product * column_scale;
        if constexpr (lost) {
          best[upper].take(value, first + column + k);
        } else if (value > best[upper].value) {
          best[upper] = {value, first + column + k};
        }
      }
    }
  }
}

// The best of all columns, from the four lanes of a row.
__device__ inline void store_stream(const Problem& p, const StreamShared& shared, const Unit& unit,
                                    int64_t slot, int first_pixel, int rows,
                                    Best<float> (&best)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int row = threadIdx.x / 32 * 16 + lane / 4 + upper * 8, pixel = first_pixel + row;
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best[upper].value, step);
      best[upper].merge(other, __shfl_xor_sync(kAllLanes, best[upper].place, step));
    }
    if (lane % 4 != 0 || row >= rows || pixel >= unit.pixels()) continue;
    // A query that takes no part has a scale below zero, and so has no match.
    const bool found = best[upper].place >= 0 && !(shared.scale[row] < 0);
    store_match(p, match_index(p, slot, plane_index(p, unit, pixel)), best[upper].value,
                found ? nominal_offset(p, unit, best[upper].place) : -1);
  }
}

template <class Mode>
__device__ void stream(const Problem& p) {
  SALKERNELS_SHARED(memory);
  StreamShared& shared = *reinterpret_cast<StreamShared*>(memory);
  using T = typename Mode::T;
  const Tiling& t = p.tiling;
  // Window by window: what the blocks beside each other read is the same.
  const int64_t chunk = blockIdx.x % t.chunks, rest = blockIdx.x / t.chunks;
  const int64_t slot = rest % p.num_pairs;
  const ListedPair pair = ListedPair::of(p, slot);
  if (pair.query < 0) return;
  const Unit unit = unit_of(p, pair.group * p.windows() + rest / p.num_pairs);
  const int pixels = int(t.pixels), first_pixel = int(chunk) * pixels, count = unit.pixels();
  if (first_pixel >= count) return;

  const int which = threadIdx.x / kTile, r = threadIdx.x % kTile;
  bool lost_query = false;
  need_all_blocks(shared.list);
  // Rows beyond the window too, as zeros: all blocks are multiplied.
  if (threadIdx.x < 2) shared.staged[threadIdx.x] = kTile;
  if (which == 0) {
    lost_query = fill_stream_row<T>(p, shared, 0, unit, pair.query, first_pixel + r, r < pixels);
  }
  const bool asked = __syncthreads_or(which == 0 && shared.start[r] != nullptr);
  Best<float> best[2];
  for (int from = 0; asked && from < count; from += pixels) {
    bool lost = lost_query;
    if (which == 1) {
      lost = fill_stream_row<T>(p, shared, 1, unit, pair.key, from + r, r < pixels);
    }
    lost = __syncthreads_or(lost);
    const int columns = count - from < pixels ? count - from : pixels;
    Sums<kBlocks> sums = {};
    float unused[kRowsOfThread];
    multiply_tile<Mode, false, true>(p, {shared.start, shared.staged, false}, shared.list, false,
                                     shared.buffer, sums, unused);
    if (lost) {
      take_columns<true>(sums, shared.scale, columns, from, best);
    } else {
      take_columns<false>(sums, shared.scale, columns, from, best);
    }
    __syncthreads();
  }
  store_stream(p, shared, unit, slot, first_pixel, pixels, best);
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
