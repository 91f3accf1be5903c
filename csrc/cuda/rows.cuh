// Tiles: up to 128 rows of feature vectors, each one pixel of one sample in one window, and how
// chunks of their channels are staged in shared memory.
#pragma once

#include "device.cuh"

namespace salkernels {
namespace cuda {

// One window of one group.
struct Unit {
  int64_t group;  // -1: there is none
  int32_t row, column, rows, columns;

  __device__ int pixels() const { return rows * columns; }
};

// Units are numbered by 32 bits: the plan sees to it.
__device__ inline Unit unit_of(const Problem& p, int64_t index) {
  if (index >= p.units()) return {-1, 0, 0, 0, 0};
  const uint32_t across = uint32_t(p.grid.across()), windows = uint32_t(p.windows());
  const uint32_t group = uint32_t(index) / windows, within = uint32_t(index) - group * windows;
  const uint32_t strip = within / across;
  const Window window = p.grid.window(strip, within - strip * across);
  return {group, int32_t(window.row), int32_t(window.column), int32_t(window.rows),
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

// Whether a pixel takes part, as a query or as a key.
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

// Of every row: ‖x‖; NaN where that is no finite number; Inf of a row that nobody has to load. As
// the Triton kernels have it, so that the backward of either can follow the forward of the other.
__device__ inline int64_t norm_index(const Problem& p, int64_t group, int64_t node,
                                     int64_t plane) {
  return plane * p.nodes() + group * p.group_nodes() + node;
}

// The outputs lie pixel by pixel with the pairs innermost: those of one pixel are neighbours, and
// lanes that take pairs beside each other fill whole sectors.
__device__ inline int64_t match_index(const Problem& p, int64_t slot, int64_t plane) {
  return plane * p.num_pairs + slot;
}

// A query pixel without a match is as similar as can be: no penalty of 1 - max_sim counts it.
template <class F>
__device__ inline void store_match(const Problem& p, int64_t at, F value, int nominal) {
  static_cast<F*>(p.max_sim)[at] = nominal >= 0 ? value : F(1);
  store_argmax(p, at, nominal >= 0 ? nominal : no_match(p));
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

// A piece of a row that is kPlace times 32 after the first of this thread.
template <class T, int Pitch, int kPlace>
__device__ inline void load_rows(const unsigned char* const* start, SharedWords at,
                                 int64_t offset, bool inside, bool exists) {
  constexpr int kRow = kPlace * kThreads / 8;
  if (!exists) return;
  const unsigned char* from = start[kRow];
  copy_async_16<kRow * Pitch>(at, from + offset, inside && from != nullptr);
}

// Stages 128 bytes of channels of each row, from channel `first` on; zeros where there are none.
// Where rows are vectors, thread t takes piece t % 8 of rows t / 8, t / 8 + 32, ...
template <class T, int Pitch>
__device__ void load_chunk(const RowTable& table, int rows, bool vector, bool along_channels,
                           int first, int channels, uint32_t* to) {
  constexpr int kValues = 16 / int(sizeof(T));
  if (vector) {
    const int piece = threadIdx.x % 8, channel = first + piece * kValues, row = threadIdx.x / 8;
    const SharedWords at = shared_words(to + row * Pitch + piece * 4);
    const bool inside = channel < channels;
    const int64_t offset = channel * int64_t(sizeof(T));
    load_rows<T, Pitch, 0>(table.start + row, at, offset, inside, row < rows);
    load_rows<T, Pitch, 1>(table.start + row, at, offset, inside, row + kThreads / 8 < rows);
    load_rows<T, Pitch, 2>(table.start + row, at, offset, inside, row + kThreads / 4 < rows);
    load_rows<T, Pitch, 3>(table.start + row, at, offset, inside, row + kThreads / 8 * 3 < rows);
    return;
  }
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const PiecePlace at = piece_place(i, rows, along_channels);
    const int channel = first + at.piece * kValues;
    const T* from = reinterpret_cast<const T*>(table.start[at.row]);
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
    *reinterpret_cast<Piece*>(to + at.row * Pitch + at.piece * 4) = staged.piece;
  }
}

// The reverse: writes staged channels of each row that has a place in device memory.
template <class T, int Pitch>
__device__ void store_chunk(const RowTable& table, int rows, bool vector, bool along_channels,
                            int first, int channels, const uint32_t* staged) {
  constexpr int kValues = 16 / int(sizeof(T));
  if (vector) {
    const int piece = threadIdx.x % 8, channel = first + piece * kValues;
    const uint32_t* at = staged + threadIdx.x / 8 * Pitch + piece * 4;
#pragma unroll 4
    for (int row = threadIdx.x / 8; row < rows; row += kThreads / 8) {
      T* to = reinterpret_cast<T*>(const_cast<unsigned char*>(table.start[row]));
      if (to != nullptr && channel < channels) {
        *reinterpret_cast<Piece*>(to + channel) = *reinterpret_cast<const Piece*>(at);
      }
      at += kThreads / 8 * Pitch;
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const PiecePlace at = piece_place(i, rows, along_channels);
    const int channel = first + at.piece * kValues;
    T* to = reinterpret_cast<T*>(const_cast<unsigned char*>(table.start[at.row]));
    if (to == nullptr) continue;
    const T* values = reinterpret_cast<const T*>(staged + at.row * Pitch + at.piece * 4);
    const int64_t stride = table.stride_of(at.row);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (channel + j < channels) to[(channel + j) * stride] = values[j];
    }
  }
}

// Adds the squares of the features in one 16-byte piece.
template <class T>
__device__ inline void add_squares(float& sum, const Piece& piece) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 4) {
      const float x = bits_to_float(piece.words[j]);
      sum = fmaf(x, x, sum);
    } else {
      float low, high;
      widen_pair(piece.words[j], T{}, low, high);
      sum = fmaf(low, low, sum);
      sum = fmaf(high, high, sum);
    }
  }
}

}  // namespace cuda
}  // namespace salkernels
