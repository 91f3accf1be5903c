// The best of each row and of each column of a tile of products, where they stand in registers as
// WarpPart deals them out.
//
//   a lane has   rows     16 r + 8 u + lane / 4            r < 4, u < 2
//                columns  16 c + 8 j + 2 (lane % 4) + k    c, j, k < 2
//   of the part of its warp
//
// Rows go on from tile to tile in registers. A column is found in its lane over 8 rows, then among
// the 8 lanes that share it: these hand each other half of their columns at each of three steps, so
// that each ends with one of its own.
#pragma once

#include "products.cuh"

namespace salkernels {
namespace cuda {

// cosine = (product * row factor + row offset) * column factor + column offset. A row that takes no
// part has the factor 0 and the offset -INFINITY, and a product of 0: what comes out is no number
// or -INFINITY, and never greater than the best.
struct alignas(8) Scale {
  float factor, offset;

  __device__ static Scale absent() { return {0, -INFINITY}; }
  __device__ static Scale of(float factor) { return {factor, 0}; }
};

// `lost`: some factor is a NaN, so that the comparison must be told of those.
template <bool lost>
__device__ inline float cosine(float product, const Scale& row, const Scale& column) {
  if constexpr (lost) {
    if (row.offset < 0 || column.offset < 0) return -INFINITY;
  }
  return fmaf(fmaf(product, row.factor, row.offset), column.factor, column.offset);
}

template <bool lost>
__device__ inline bool exceeds(float value, float best) {
  return value > best || (lost && value != value && best == best);
}
template <bool lost>
__device__ inline void take_greater(Best<float>& best, float value, int place) {
  const bool greater = exceeds<lost>(value, best.value);
  best.value = greater ? value : best.value;  // selected, not jumped to
  best.place = greater ? place : best.place;
}
// Of two that stand anywhere; the first of equals.
template <bool lost>
__device__ inline Best<float> better(const Best<float>& a, const Best<float>& b) {
  const bool equal = lost ? !exceeds<lost>(a.value, b.value) : a.value == b.value;
  const bool second = exceeds<lost>(b.value, a.value) || (equal && b.place < a.place);
  return {second ? b.value : a.value, second ? b.place : a.place};
}

// Each of two lanes keeps one of two columns and hands the other on.
template <bool lost>
__device__ inline Best<float> exchange(const Best<float>& first, const Best<float>& second,
                                       int bit) {
  const bool keeps_second = (threadIdx.x & bit) != 0;
  const Best<float> own = {keeps_second ? second.value : first.value,
                           keeps_second ? second.place : first.place};
  const float value = keeps_second ? first.value : second.value;
  const int place = keeps_second ? first.place : second.place;
  return better<lost>(own, {__shfl_xor_sync(0xffffffffu, value, bit),
                            __shfl_xor_sync(0xffffffffu, place, bit)});
}

constexpr int kLaneRows = 2 * (kWarpRows / 16), kLaneColumns = 4 * (kWarpColumns / 16);

template <bool lost, bool both>
struct TileBest {
  const Sums<kBlocks>& sums;
  const Scale* columns;           // of the tile
  int first;                      // where its first column stands in the window
  Best<float> (&best)[kLaneRows]; // so far, of the rows of this lane
  Scale rows[kLaneRows];

  __device__ static int lane_row() { return WarpPart::row() + int(threadIdx.x) % 32 / 4; }
  __device__ static int lane_column() {
    return WarpPart::column() + int(threadIdx.x) % 4 * 2;
  }
  // Of the column that a lane ends with.
  __device__ static int own_column() {
    const int rank = int(threadIdx.x) % 32 / 4;
    return lane_column() + rank / 2 * 8 + rank % 2;
  }

  __device__ TileBest(const Sums<kBlocks>& products, const Scale* scales, int first_column,
                      Best<float> (&rows_best)[kLaneRows])
      : sums(products), columns(scales + kTile), first(first_column), best(rows_best) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) rows[i] = scales[lane_row() + i * 8];
  }

  // Column i of this lane, over its rows; and what it is to the rows.
  template <int i>
  __device__ Best<float> take_column() {
    constexpr int kOffset = i / 2 * 8 + i % 2;
    const Scale column = columns[lane_column() + kOffset];
    const int place = first + lane_column() + kOffset;
    Best<float> found;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float product = sums.at[r / 2 * 2 + i / 4][i / 2 % 2][r % 2 * 2 + i % 2];
      const float value = cosine<lost>(product, rows[r], column);
      take_greater<lost>(best[r], value, place);
      if constexpr (both) take_greater<lost>(found, value, r * 8);
    }
    return found;
  }
  // Of two columns, four, and all eight, the one that this lane keeps.
  template <int i>
  __device__ Best<float> take_two() {
    const Best<float> a = take_column<i>(), b = take_column<i + 1>();
    if constexpr (!both) return a;
    return exchange<lost>(with_lane(a), with_lane(b), 4);
  }
  template <int i>
  __device__ Best<float> take_four() {
    const Best<float> a = take_two<i>(), b = take_two<i + 2>();
    if constexpr (!both) return a;
    return exchange<lost>(a, b, 8);
  }
  __device__ Best<float> take() {
    const Best<float> a = take_four<0>(), b = take_four<4>();
    if constexpr (!both) return a;
    return exchange<lost>(a, b, 16);
  }
  __device__ static Best<float> with_lane(const Best<float>& found) {
    return {found.value, found.place + lane_row()};
  }
};

}  // namespace cuda
}  // namespace salkernels
