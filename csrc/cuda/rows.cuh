// Tiles: up to 128 rows of feature vectors, each one pixel of one sample in one window, and how
// chunks of their channels are staged in shared memory.
#pragma once

#include "device.cuh"

namespace salkernels {
namespace cuda {

// One window of one group. Extents of a map fit 32 bits, which divide faster than 64.
struct Unit {
  int64_t group;  // -1: there is none
  int32_t row, column, rows, columns;

  __device__ int pixels() const { return rows * columns; }
};

__device__ inline Unit unit_of(const Problem& p, int64_t index) {
  if (index >= p.units()) return {-1, 0, 0, 0, 0};
  const int64_t within = index % p.windows(), across = p.grid.across();
  const Window window = p.grid.window(within / across, within % across);
  return {index / p.windows(), int32_t(window.row), int32_t(window.column), int32_t(window.rows),
          int32_t(window.columns)};
}

// Which rows a tile holds on one side: row r is pixel first_pixel + r % pixels of member
// r / pixels, and a member is sample first_sample + member % samples of unit member / samples.
struct Side {
  int64_t first_sample, end_sample;
  int64_t first_pixel;
  int units, samples, pixels;

  __device__ int members() const { return units * samples; }
  __device__ int rows() const { return members() * pixels; }
  // Tensor cores take rows by 32: that many are staged, those in excess as zeros.
  __device__ int staged() const { return (rows() + 31) / 32 * 32; }
  __device__ int unit(int member) const { return member / samples; }
  __device__ int64_t sample(int member) const { return first_sample + member % samples; }
  __device__ bool exists(const Unit* all, int member) const {
    return member < members() && all[unit(member)].group >= 0 && sample(member) < end_sample;
  }
};

// Number of a pair; negative where there is none.
__device__ inline int64_t pair_slot(const Problem& p, int64_t group, int64_t query, int64_t key) {
  const int64_t flat = (group * p.maps[0].samples + query) * p.maps[1].samples + key;
  return p.slots == nullptr ? flat : p.slots[flat];
}

// Where a pixel of a window stands in the map.
__device__ inline int64_t plane_index(const Problem& p, const Unit& unit, int pixel) {
  return (unit.row + pixel / unit.columns) * p.grid.width + unit.column + pixel % unit.columns;
}

// Offset of the first channel of a pixel, in elements.
__device__ inline int64_t map_offset(const int64_t* strides, const Unit& unit, int64_t sample,
                                     int pixel) {
  return unit.group * strides[0] + sample * strides[1] +
         (unit.row + pixel / unit.columns) * strides[3] +
         (unit.column + pixel % unit.columns) * strides[4];
}

// Whether a pixel takes part, be it as a query or as a key.
__device__ inline bool is_valid(const Problem& p, const Maps& maps, const Unit& unit,
                                int64_t sample, int pixel) {
  return maps.valid == nullptr ||
         maps.valid[unit.group * maps.valid_stride + sample * p.grid.pixels() +
                    plane_index(p, unit, pixel)] != 0;
}

// The argmax of a query pixel that takes no part: -1, or the byte of that.
__device__ inline int no_match(const Problem& p) { return p.wide_index ? -1 : 255; }

__device__ inline void store_argmax(const Problem& p, int64_t at, int offset) {
  if (p.wide_index) {
    static_cast<int32_t*>(p.argmax)[at] = offset;
  } else {
    static_cast<uint8_t*>(p.argmax)[at] = uint8_t(offset);
  }
}

// `argmax` counts in columns of the nominal window, so that it reads the same at the edge.
__device__ inline int nominal_offset(const Problem& p, const Unit& unit, int pixel) {
  const int columns = int(p.grid.window_columns);
  return columns == unit.columns ? pixel : pixel / unit.columns * columns + pixel % unit.columns;
}

// A query pixel without a match is as similar as can be: no penalty of 1 - max_sim counts it.
template <class F>
__device__ inline void store_match(const Problem& p, int64_t slot, const Unit& unit, int pixel,
                                   const Best<F>& best) {
  const int64_t at = slot * p.grid.pixels() + plane_index(p, unit, pixel);
  const bool found = best.place >= 0;
  static_cast<F*>(p.max_sim)[at] = found ? best.value : F(1);
  store_argmax(p, at, found ? nominal_offset(p, unit, best.place) : no_match(p));
}

// The match of a query pixel that stands at `at`, as a pixel of the window; -1 if it has none.
// Clamped, since nothing else keeps a foreign argmax from pointing out of the window.
__device__ inline int load_match(const Problem& p, const Unit& unit, int64_t at) {
  const int offset = p.wide_index ? static_cast<const int32_t*>(p.argmax)[at]
                                  : int(static_cast<const uint8_t*>(p.argmax)[at]);
  if (offset == no_match(p)) return -1;
  const int columns = int(p.grid.window_columns);
  const int pixel = columns == unit.columns
                        ? offset
                        : offset / columns * unit.columns + offset % columns;
  const int last = unit.pixels() - 1;
  return pixel < 0 ? 0 : pixel > last ? last : pixel;
}

// The rows of a tile in device memory: where their channels start, null where there is nothing to
// be read; and how far apart their channels are, for all (stride) or, if given, row by row.
struct RowTable {
  const unsigned char* const* start;
  int64_t stride;  // in elements
  const int64_t* strides;

  __device__ int64_t stride_of(int row) const { return strides == nullptr ? stride : strides[row]; }
};

// How lanes share the work of copying 16-byte pieces: over the channels of a row, where these are
// contiguous, else over rows, which are pixels beside each other.
struct PiecePlace {
  int row, piece;
};
__device__ inline PiecePlace piece_place(int i, int rows, bool along_channels) {
  if (along_channels) return {i / 8, i % 8};
  return {i % rows, i / rows};
}

// Stages 128 bytes of channels of each row, from channel `first` on; zeros where there are none.
template <class T, int Pitch>
__device__ void load_chunk(const RowTable& table, int rows, bool vector, bool along_channels,
                           int64_t first, int64_t channels, uint32_t* to) {
  constexpr int kValues = 16 / int(sizeof(T));
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const PiecePlace at = piece_place(i, rows, vector || along_channels);
    const int64_t channel = first + at.piece * kValues;
    const T* from = reinterpret_cast<const T*>(table.start[at.row]);
    uint32_t* piece = to + at.row * Pitch + at.piece * 4;
    if (vector && from != nullptr && channel < channels) {
      copy_async_16(piece, from + channel);
      continue;
    }
    union {
      Piece piece;
      T values[kValues];
    } staged = {};
    if (from != nullptr) {
      const int64_t stride = table.stride_of(at.row);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (channel + j < channels) staged.values[j] = from[(channel + j) * stride];
      }
    }
    *reinterpret_cast<Piece*>(piece) = staged.piece;
  }
}

// The reverse: writes staged channels of each row that has a place in device memory.
template <class T, int Pitch>
__device__ void store_chunk(const RowTable& table, int rows, bool vector, bool along_channels,
                            int64_t first, int64_t channels, const uint32_t* staged) {
  constexpr int kValues = 16 / int(sizeof(T));
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const PiecePlace at = piece_place(i, rows, vector || along_channels);
    const int64_t channel = first + at.piece * kValues;
    T* to = reinterpret_cast<T*>(const_cast<unsigned char*>(table.start[at.row]));
    if (to == nullptr || channel >= channels) continue;
    const uint32_t* piece = staged + at.row * Pitch + at.piece * 4;
    if (vector) {
      *reinterpret_cast<Piece*>(to + channel) = *reinterpret_cast<const Piece*>(piece);
      continue;
    }
    const T* values = reinterpret_cast<const T*>(piece);
    const int64_t stride = table.stride_of(at.row);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (channel + j < channels) to[(channel + j) * stride] = values[j];
    }
  }
}

// The sum of squares of staged channels: of every `step`-th 16 bytes of a row.
template <class T>
__device__ inline float sum_of_squares(const uint32_t* row, int words, int step) {
  float sums[4] = {};
#pragma unroll 2
  for (int w = 0; w < words; w += 4 * step) {
    const Piece piece = *reinterpret_cast<const Piece*>(row + w);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(T) == 4) {
        const float x = bits_to_float(piece.words[j]);
        sums[j] = fmaf(x, x, sums[j]);
      } else {
        T low, high;
        low.bits = uint16_t(piece.words[j]);
        high.bits = uint16_t(piece.words[j] >> 16);
        sums[j] = fmaf(widen(low), widen(low), sums[j]);
        sums[j] = fmaf(widen(high), widen(high), sums[j]);
      }
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One bit for each two members of a tile: whether `a` as a query and `b` as a key are a pair.
struct PairBits {
  uint32_t words[kTile][kTile / 32];

  __device__ bool get(int a, int b) const { return words[a][b / 32] >> (b % 32) & 1; }
  __device__ bool any_of_row(int a) const {
    return (words[a][0] | words[a][1] | words[a][2] | words[a][3]) != 0;
  }
  __device__ bool any_of_column(int b, int members) const {
    uint32_t bits = 0;
    for (int a = 0; a < members; ++a) bits |= words[a][b / 32] >> (b % 32);
    return bits & 1;
  }
  // Whether a member with a row in [row, row + rows) meets one with a column in
  // [column, column + columns). Where both sides are the same members, `either` direction counts.
  __device__ bool any_of_block(int row, int rows, int row_pixels, int row_members, int column,
                               int columns, int column_pixels, int column_members,
                               bool either) const {
    const int last_a = (row + rows - 1) / row_pixels;
    const int last_b = (column + columns - 1) / column_pixels;
    for (int a = row / row_pixels; a <= last_a && a < row_members; ++a) {
      for (int b = column / column_pixels; b <= last_b && b < column_members; ++b) {
        if (get(a, b) || (either && get(b, a))) return true;
      }
    }
    return false;
  }
  // Fills the table by the whole block: related(a, b) of members below either count.
  template <class Related>
  __device__ void fill(int members_a, int members_b, const Related& related) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < members_a * (kTile / 32); i += kWarps) {
      const int a = i / (kTile / 32), word = i % (kTile / 32), b = word * 32 + lane;
      const uint32_t mask = __ballot_sync(0xffffffffu, b < members_b && related(a, b));
      if (lane == 0) words[a][word] = mask;
    }
  }
};

}  // namespace cuda
}  // namespace salkernels
