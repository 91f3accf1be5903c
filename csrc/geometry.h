// How windows tile a map: shared by every C++ backend, on the host and on a device.
//
//      columns ->
//      +----+----+----+--+
//      | 0  | 1  | 2  | 3|   strip 0: `across` windows, of which the last may be narrower
//      +----+----+----+--+
//      | 0  | 1  | 2  | 3|   strip 1
//      +----+----+----+--+
//      | 0  | 1  | 2  | 3|   the last strip may be lower
//      +----+----+----+--+
//
// Only windows at the right and lower edge differ in extent: within a strip, all but the last have
// the same.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SALKERNELS_HOST_DEVICE __host__ __device__
#else
#define SALKERNELS_HOST_DEVICE
#endif

namespace salkernels {

// One window: where it starts, and its extent, smaller than nominal at the edge of the map.
struct Window {
  int64_t row, column;
  int64_t rows, columns;

  SALKERNELS_HOST_DEVICE int64_t pixels() const { return rows * columns; }
};

struct Grid {
  int64_t height, width;
  int64_t window_rows, window_columns;  // nominal

  SALKERNELS_HOST_DEVICE int64_t pixels() const { return height * width; }
  // Extents of a map fit 32 bits, which divide several times faster than 64.
  SALKERNELS_HOST_DEVICE int64_t strips() const {
    return uint32_t(height + window_rows - 1) / uint32_t(window_rows);
  }
  SALKERNELS_HOST_DEVICE int64_t across() const {
    return uint32_t(width + window_columns - 1) / uint32_t(window_columns);
  }
  // Windows of a strip that have the nominal width; a narrower one may follow them.
  SALKERNELS_HOST_DEVICE int64_t whole_across() const {
    return uint32_t(width) / uint32_t(window_columns);
  }

  SALKERNELS_HOST_DEVICE Window window(int64_t strip, int64_t index) const {
    const int64_t row = strip * window_rows, column = index * window_columns;
    const int64_t rows = height - row < window_rows ? height - row : window_rows;
    const int64_t columns = width - column < window_columns ? width - column : window_columns;
    return {row, column, rows, columns};
  }

  // `argmax` counts in nominal columns, so that it can be read without knowing the edge:
  //
  //      nominal 2 x 3      at the edge, 2 x 2
  //      0 1 2              pixels 0 1      offsets 0 1
  //      3 4 5                     2 3              3 4
  SALKERNELS_HOST_DEVICE int64_t nominal_offset(int64_t pixel, int64_t columns) const {
    return columns == window_columns ? pixel
                                     : pixel / columns * window_columns + pixel % columns;
  }
  SALKERNELS_HOST_DEVICE int64_t pixel_of_offset(int64_t offset, int64_t columns) const {
    return columns == window_columns ? offset
                                     : offset / window_columns * columns + offset % window_columns;
  }
};

}  // namespace salkernels
