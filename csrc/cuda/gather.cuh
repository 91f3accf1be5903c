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

// Four channels of a row beside each other, as one load where that is aligned.
template <class T>
struct Four {
  T values[4];

  __device__ static Four load(const T* from, int64_t stride, bool vector, int count) {
    Four x = {};
    if (vector) {
      if (count <= 0) return x;
      if constexpr (sizeof(T) == 2) {
        union {
          uint2 words;
          Four four;
        } loaded = {*reinterpret_cast<const uint2*>(from)};
        return loaded.four;
      } else if constexpr (sizeof(T) == 4) {
        union {
          Piece piece;
          Four four;
        } loaded = {*reinterpret_cast<const Piece*>(from)};
        return loaded.four;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) x.values[j] = from[j * stride];
    }
    return x;
  }
};

constexpr int kFours = 3;  // of a lane: 384 channels of a row at a time

template <class T>
__device__ void gather(const Problem& p) {
  using F = typename Wide<T>::type;
  const int lane = threadIdx.x % 32, queries = int(p.maps[0].samples);
  if (warp_index() >= p.nodes() * p.grid.pixels()) return;
  const OrderedRow own = OrderedRow::of(p, warp_index());
  const Unit& unit = own.unit;
  const NodeWindow at = NodeWindow::of(p, unit, own.node);
  const auto terms = RowTerms<F>::of(p, at.first_term(p), at.first_row(p), own.pixel);
  const int pixels = int(p.window_pixels());
  const auto row_of = [&](int node, int pixel, const Maps*& maps) {
    const int which = node >= queries;
    maps = &p.maps[which];
    return static_cast<const T*>(maps->data) +
           map_offset(maps->strides, unit, node - which * queries, pixel);
  };
  const F norm = static_cast<const F*>(p.norm)[norm_index(p, unit.group, own.node,
                                                          plane_index(p, unit, own.pixel))];
  const auto rest = Projection<F>::of(norm, terms.along, F(p.eps), terms.at != terms.end);
  const Maps* maps;
  const T* const x = row_of(own.node, own.pixel, maps);
  const int64_t sample = own.node - (own.node >= queries ? queries : 0);
  T* const grad = static_cast<T*>(maps->grad) +
                  map_offset(maps->grad_strides, unit, sample, own.pixel);
  const bool vector = p.maps[0].vector && p.maps[1].vector;
  for (int64_t first = 0; first < p.channels; first += 32 * 4 * kFours) {
    F sums[kFours][4] = {};
    const auto add = [&](F weight, const T* row, int64_t stride) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const int64_t c = first + (i * 32 + lane) * 4;
        const auto four = Four<T>::load(row + c * stride, stride, vector, int(p.channels - c));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += weight * F(widen(four.values[j]));
      }
    };
    for (const Term<F>* from = terms.at; from < terms.end; from += 32) {
      // Each lane finds where the row of one term is.
      const int count = terms.end - from < 32 ? int(terms.end - from) : 32;
      const T* row = x;
      int64_t stride = 1;
      F weight = 0;
      if (lane < count) {
        const Term<F> term = from[lane];
        const Maps* partner;
        row = row_of(term.row / pixels, term.row % pixels, partner);
        stride = partner->strides[2];
        weight = term.weight;
      }
      const uint64_t address = reinterpret_cast<uint64_t>(row);
      for (int i = 0; i < count; ++i) {
        const F of = __shfl_sync(kAllLanes, weight, i);
        const uint64_t there = __shfl_sync(kAllLanes, address, i);
        const int64_t apart = vector ? 1 : __shfl_sync(kAllLanes, stride, i);
        // A partner that is lost has no unit vector; what it does to the loss is in x̂·V.
        if (of != 0) add(of, reinterpret_cast<const T*>(there), apart);
      }
    }
    // A row that is lost is NaN whatever x is.
    if (is_finite(norm) && norm > 0 && rest.inverse != 0) add(-rest.self, x, maps->strides[2]);
    const F factor = terms.at != terms.end && !is_finite(norm) ? F(NAN) : rest.inverse;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int64_t c = first + (i * 32 + lane) * 4;
      union {
        T values[4];
        uint2 words;
      } dx;
#pragma unroll
      for (int j = 0; j < 4; ++j) narrow(sums[i][j] * factor, dx.values[j]);
      if (sizeof(T) == 2 && maps->grad_vector && c < p.channels) {
        *reinterpret_cast<uint2*>(grad + c) = dx.words;
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (c + j < p.channels) grad[(c + j) * maps->grad_strides[2]] = dx.values[j];
      }
    }
  }
}

}  // namespace cuda
}  // namespace salkernels
