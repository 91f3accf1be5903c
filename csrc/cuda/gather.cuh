// See gradient_rows.cuh: the backward of windows that do not fit shared memory, and of float64.
#pragma once

#include "gradient_rows.cuh"

namespace salkernels {
namespace cuda {

// A row by number, where those of a window stand together: window by window, sample by sample.
struct OrderedRow {
  Unit unit;
  int node, pixel;

  __device__ static OrderedRow of(const Problem& p, int64_t index) {
    const int64_t nodes = p.group_nodes(), group_rows = p.grid.pixels() * nodes;
    const int64_t group = index / group_rows;
    int64_t left = index % group_rows;
    const int64_t strip_rows = p.grid.window_rows * p.grid.width * nodes;
    const int64_t strip = left / strip_rows;
    left %= strip_rows;
    const int64_t height = p.grid.height - strip * p.grid.window_rows;
    const int64_t rows = height < p.grid.window_rows ? height : p.grid.window_rows;
    const int64_t window_rows = p.grid.window_columns * rows * nodes;
    const int64_t window = left / window_rows;
    left %= window_rows;
    const Unit unit = unit_of(p, group * p.windows() + strip * p.grid.across() + window);
    return {unit, int(left / unit.pixels()), int(left % unit.pixels())};
  }
};

// Four channels of a row beside each other, times a weight, to sums: as one load where rows are
// vectors, so that all four exist.
template <class T, bool kVector>
struct Four {
  using F = typename Wide<T>::type;

  __device__ static void add(F (&sums)[4], F weight, const T* from, int64_t stride, int count) {
    if constexpr (kVector && sizeof(T) == 4) {
      const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[j] = fmaf(weight, bits_to_float(piece.words[j]), sums[j]);
      }
    } else if constexpr (kVector && sizeof(T) == 2) {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      float x[4];
      widen_pair(words.x, T{}, x[0], x[1]);
      widen_pair(words.y, T{}, x[2], x[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = fmaf(weight, x[j], sums[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < count) sums[j] += weight * F(widen(from[j * stride]));
      }
    }
  }
};

// Where the channels of a row are, and how far apart.
template <class T>
struct PartnerRow {
  const T* start;
  int64_t stride;

  __device__ static PartnerRow of(const Problem& p, const Unit& unit, int node, int pixel) {
    const int queries = int(p.maps[0].samples), which = node >= queries;
    const Maps& maps = p.maps[which];
    return {static_cast<const T*>(maps.data) +
                map_offset(maps.strides, unit, node - which * queries, pixel),
            maps.strides[2]};
  }
};

constexpr int kFours = 3;  // of a lane: 384 channels of a row at a time

// V of a row, 384 channels from `first` on: of each term each lane adds its fours.
template <class T, bool kVector>
__device__ inline void sum_terms(const Problem& p, const Unit& unit,
                                 const RowTerms<typename Wide<T>::type>& terms,
                                 const PartnerRow<T>& own, const int64_t (&channels)[kFours],
                                 typename Wide<T>::type (&sums)[kFours][4]) {
  using F = typename Wide<T>::type;
  const int lane = threadIdx.x % 32, pixels = int(p.window_pixels());
  for (const Term<F>* from = terms.at; from < terms.end; from += 32) {
    // Each lane finds where the row of one term is.
    const int count = terms.end - from < 32 ? int(terms.end - from) : 32;
    PartnerRow<T> row = own;
    F weight = 0;
    if (lane < count) {
      const Term<F> term = from[lane];
      // A partner that is lost has no unit vector; what it does to the loss is in x̂·V. Its weight
      // is zero, and this row, which is lost itself or finite, is taken in its place.
      weight = term.weight;
      if (weight != 0) row = PartnerRow<T>::of(p, unit, term.row / pixels, term.row % pixels);
    }
    const uint64_t address = reinterpret_cast<uint64_t>(row.start);
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
      const F of = __shfl_sync(kAllLanes, weight, i);
      const T* const there = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, i));
      const int64_t stride = kVector ? 1 : __shfl_sync(kAllLanes, row.stride, i);
#pragma unroll
      for (int k = 0; k < kFours; ++k) {
        Four<T, kVector>::add(sums[k], of, there + channels[k] * stride, stride,
                              int(p.channels - channels[k]));
      }
    }
  }
}

// Writes a lane's fours of the gradient of a row.
template <class T>
__device__ inline void store_fours(const Problem& p, const Maps& maps, T* grad, int64_t first,
                                   typename Wide<T>::type factor,
                                   const typename Wide<T>::type (&sums)[kFours][4]) {
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int64_t c = first + (i * 32 + threadIdx.x % 32) * 4;
    union {
      T values[4];
      uint2 words;
    } dx;
#pragma unroll
    for (int j = 0; j < 4; ++j) narrow(sums[i][j] * factor, dx.values[j]);
    if (sizeof(T) == 2 && maps.grad_vector && c < p.channels) {
      *reinterpret_cast<uint2*>(grad + c) = dx.words;
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c + j < p.channels) grad[(c + j) * maps.grad_strides[2]] = dx.values[j];
    }
  }
}

template <class T, bool kVector>
__device__ inline void gather_row(const Problem& p) {
  using F = typename Wide<T>::type;
  if (warp_index() >= p.nodes() * p.grid.pixels()) return;
  const OrderedRow row = OrderedRow::of(p, warp_index());
  const Unit& unit = row.unit;
  const NodeWindow at = NodeWindow::of(p, unit, row.node);
  const auto terms = RowTerms<F>::of(p, at.first_term(p), at.first_row(p), row.pixel);
  const F norm = static_cast<const F*>(p.norm)[norm_index(p, unit.group, row.node,
                                                          plane_index(p, unit, row.pixel))];
  const auto rest = Projection<F>::of(norm, terms.along, F(p.eps), terms.at != terms.end);
  const int queries = int(p.maps[0].samples), which = row.node >= queries;
  const Maps& maps = p.maps[which];
  const auto own = PartnerRow<T>::of(p, unit, row.node, row.pixel);
  T* const grad = static_cast<T*>(maps.grad) +
                  map_offset(maps.grad_strides, unit, row.node - which * queries, row.pixel);
  for (int64_t first = 0; first < p.channels; first += 32 * 4 * kFours) {
    F sums[kFours][4] = {};
    int64_t channels[kFours];
    for (int i = 0; i < kFours; ++i) {
      channels[i] = first + (i * 32 + threadIdx.x % 32) * 4;
      // A lane without channels adds what it never writes.
      if (kVector && channels[i] >= p.channels) channels[i] = 0;
    }
    sum_terms<T, kVector>(p, unit, terms, own, channels, sums);
    // A row that is lost is NaN whatever x is.
    if (is_finite(norm) && norm > 0 && rest.inverse != 0) {
      for (int i = 0; i < kFours; ++i) {
        Four<T, kVector>::add(sums[i], -rest.self, own.start + channels[i] * own.stride,
                              own.stride, int(p.channels - channels[i]));
      }
    }
    const F factor = terms.at != terms.end && !is_finite(norm) ? F(NAN) : rest.inverse;
    store_fours<T>(p, maps, grad, first, factor, sums);
  }
}

template <class T>
__device__ void gather(const Problem& p) {
  if (sizeof(T) < 8 && p.maps[0].vector && p.maps[1].vector) {
    gather_row<T, sizeof(T) < 8>(p);
  } else {
    gather_row<T, false>(p);
  }
}

}  // namespace cuda
}  // namespace salkernels
