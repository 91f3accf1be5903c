// Backward of any window, and float64: each gradient row gathers the rows it was matched with.
//
// norms        ‖x‖ of every row
// invert       for each pair and window, the query pixels that chose each key pixel
// gather       one warp per row of the gradient: V as a sum over its matches, and over those that
//              chose it, in the order of samples and pixels
// match_plain  the forward of float64, one warp per query pixel of a pair
#pragma once

#include "pairs.cuh"

namespace salkernels {
namespace cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class F>
__device__ inline F sum_of_warp(F x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline int64_t warp_index() {
  return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
}

// One row of one side of the maps, as a warp finds it by number.
struct MapRow {
  int64_t index;  // in (G, S, H·W)
  int64_t sample;
  Unit unit;
  int pixel;

  __device__ static MapRow of(const Problem& p, const Maps& maps, int64_t index) {
    const int64_t plane = p.grid.pixels(), at = index % plane, samples = maps.samples;
    const int64_t row = at / p.grid.width, column = at % p.grid.width;
    const int64_t window = row / p.grid.window_rows * p.grid.across() +
                           column / p.grid.window_columns;
    const Unit unit = unit_of(p, index / plane / samples * p.windows() + window);
    const int pixel = int(row - unit.row) * unit.columns + int(column - unit.column);
    return {index, index / plane % samples, unit, pixel};
  }
};

template <class T>
__device__ void norms(const Problem& p) {
  using F = typename Wide<T>::type;
  const Maps& maps = p.maps[blockIdx.y];
  const int64_t rows = p.groups * maps.samples * p.grid.pixels(), stride = maps.strides[2];
  const int lane = threadIdx.x % 32;
  const bool along_channels = stride == 1;  // lanes share a row, or take a pixel each
  const int64_t index =
      along_channels ? warp_index() : int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows) return;
  const MapRow row = MapRow::of(p, maps, index);
  const T* start = static_cast<const T*>(maps.data) +
                   map_offset(maps.strides, row.unit, row.sample, row.pixel);
  const bool valid = is_valid(p, maps, row.unit, row.sample, row.pixel);  // else nobody asks
  F squares = 0;
  for (int64_t c = along_channels ? lane : 0; valid && c < p.channels;
       c += along_channels ? 32 : 1) {
    const F x = widen(start[c * stride]);
    squares += x * x;
  }
  if (along_channels) squares = sum_of_warp(squares);
  if (along_channels && lane != 0) return;
  static_cast<F*>(maps.norms)[index] = row_norm(squares);
}

// Pixels of a window are numbered window after window here, so that its lists are contiguous.
__device__ inline int64_t lists_of(const Problem& p, const Unit& unit, int64_t slot) {
  return slot * p.grid.pixels() + unit.row * p.grid.width + int64_t(unit.column) * unit.rows;
}

// A counting sort of the query pixels of one pair and window by the key pixel that each chose, if
// any. chosen_end[l] is where the list of key pixel l ends in chosen_by, and that of l + 1 begins.
// One warp takes 32 pixels at a time, in order, so that each list is in ascending order.
__device__ inline void invert(const Problem& p) {
  const int64_t slot = warp_index() / p.windows();
  if (slot >= p.num_pairs || !is_pair(p, slot)) return;
  const Unit unit = unit_of(p, warp_index() % p.windows());
  const int lane = threadIdx.x % 32, count = unit.pixels();
  int32_t* const end = p.chosen_end + lists_of(p, unit, slot);
  int32_t* const by = p.chosen_by + lists_of(p, unit, slot);
  for (int l = lane; l < count; l += 32) end[l] = 0;
  __syncwarp();
  // How many chose each; lanes with the same choice let the first of them count.
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0; first < count; first += 32) {
      const int pixel = first + lane;
      const int choice =
          pixel < count
              ? load_match(p, unit, slot * p.grid.pixels() + plane_index(p, unit, pixel))
              : -1;
      const uint32_t same = __match_any_sync(kAllLanes, choice);
      const uint32_t earlier = same & ((1u << lane) - 1);
      const int taken = choice < 0 ? 0 : end[choice];
      __syncwarp();
      if (choice >= 0 && pass == 1) by[taken + __popc(earlier)] = pixel;
      if (choice >= 0 && earlier == 0) end[choice] = taken + __popc(same);
      __syncwarp();
    }
    if (pass == 1) break;
    int before = 0;  // counts become the begins of the lists, which the second pass moves to ends
    for (int first = 0; first < count; first += 32) {
      const int own = first + lane < count ? end[first + lane] : 0;
      int sum = own;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (first + lane < count) end[first + lane] = before + sum - own;
      before += __shfl_sync(kAllLanes, sum, 31);
    }
    __syncwarp();
  }
}

// A match as the backward sees it. Where max_sim is NaN, so are the gradients of both rows: x̂·V,
// which is made of the maxima, takes it there.
template <class F>
struct Term {
  F max_sim, gradient;

  __device__ static Term load(const Problem& p, int64_t at) {
    return {static_cast<const F*>(p.max_sim)[at], static_cast<const F*>(p.grad_sim)[at]};
  }
};

// The sum over one row's matches, for kChannels channels of each lane.
template <class T>
struct Gather {
  using F = typename Wide<T>::type;
  static constexpr int kChannels = 4;

  const Problem& p;
  const int64_t first_channel;
  const int lane = threadIdx.x % 32;
  F sums[kChannels] = {};
  F along = 0;
  bool touched = false;

  __device__ Gather(const Problem& problem, int64_t first)
      : p(problem), first_channel(first) {}

  __device__ void add(const Term<F>& term, const Maps& maps, const Unit& unit, int64_t sample,
                      int pixel) {
    const int64_t row = (unit.group * maps.samples + sample) * p.grid.pixels() +
                        plane_index(p, unit, pixel);
    const F norm = static_cast<const F*>(maps.norms)[row];
    const F scale = is_finite(norm) ? unit_scale(norm, F(p.eps)) : F(0);
    const T* x = static_cast<const T*>(maps.data) + map_offset(maps.strides, unit, sample, pixel);
    const F weight = term.gradient * scale;
    along += term.gradient * term.max_sim;
    touched = true;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int64_t c = first_channel + j * 32 + lane;
      if (c >= p.channels) break;
      const F value = widen(x[c * maps.strides[2]]);
      // A partner that is lost has no unit vector; what it does to the loss is in the weight.
      sums[j] += weight * (scale == 0 ? F(0) : value);
    }
  }

  // The row as a query: its match in each key sample.
  __device__ void as_query(const MapRow& row) {
    for (int64_t first = 0; first < p.maps[1].samples; first += 32) {
      const int64_t key = first + lane;
      const int64_t slot =
          key < p.maps[1].samples ? pair_slot(p, row.unit.group, row.sample, key) : -1;
      Term<F> term = {0, 0};
      int match = -1;
      if (slot >= 0) {
        const int64_t at = slot * p.grid.pixels() + plane_index(p, row.unit, row.pixel);
        match = load_match(p, row.unit, at);
        term = Term<F>::load(p, at);
      }
      for (uint32_t left = __ballot_sync(kAllLanes, match >= 0); left != 0; left &= left - 1) {
        const int from = __ffs(int(left)) - 1;
        const F max_sim = __shfl_sync(kAllLanes, term.max_sim, from);
        const F gradient = __shfl_sync(kAllLanes, term.gradient, from);
        const int l = __shfl_sync(kAllLanes, match, from);
        add({max_sim, gradient}, p.maps[1], row.unit, first + from, l);
      }
    }
  }

  // The row as a key: the query pixels that chose it.
  __device__ void as_key(const MapRow& row) {
    for (int64_t first = 0; first < p.maps[0].samples; first += 32) {
      const int64_t query = first + lane;
      const int64_t slot =
          query < p.maps[0].samples ? pair_slot(p, row.unit.group, query, row.sample) : -1;
      int begin = 0, end = 0;
      if (slot >= 0) {
        const int32_t* ends = p.chosen_end + lists_of(p, row.unit, slot);
        begin = row.pixel == 0 ? 0 : ends[row.pixel - 1];
        end = ends[row.pixel];
      }
      for (uint32_t left = __ballot_sync(kAllLanes, end > begin); left != 0; left &= left - 1) {
        const int from = __ffs(int(left)) - 1;
        const int64_t pair = __shfl_sync(kAllLanes, int(slot), from);
        const int last = __shfl_sync(kAllLanes, end, from);
        const int32_t* by = p.chosen_by + lists_of(p, row.unit, pair);
        for (int i = __shfl_sync(kAllLanes, begin, from); i < last; ++i) {
          const int pixel = by[i];
          const int64_t at = pair * p.grid.pixels() + plane_index(p, row.unit, pixel);
          add(Term<F>::load(p, at), p.maps[0], row.unit, first + from, pixel);
        }
      }
    }
  }
};

template <class T>
__device__ void gather(const Problem& p) {
  using F = typename Wide<T>::type;
  const int side = blockIdx.y;
  const Maps& maps = p.maps[side];
  if (warp_index() >= p.groups * maps.samples * p.grid.pixels()) return;
  const MapRow row = MapRow::of(p, maps, warp_index());
  const bool valid = is_valid(p, maps, row.unit, row.sample, row.pixel);
  const F norm = static_cast<const F*>(maps.norms)[row.index];
  const F scale = unit_scale(norm, F(p.eps)), inverse = gradient_scale(norm, F(p.eps));
  const T* x = static_cast<const T*>(maps.data) +
               map_offset(maps.strides, row.unit, row.sample, row.pixel);
  T* grad = static_cast<T*>(maps.grad) +
            map_offset(maps.grad_strides, row.unit, row.sample, row.pixel);
  constexpr int kChannels = Gather<T>::kChannels;
  for (int64_t first = 0; first < p.channels; first += 32 * kChannels) {
    Gather<T> total(p, first);
    if (valid && side == 0) total.as_query(row);
    if (valid && (side == 1 || p.set_form)) total.as_key(row);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int64_t c = first + j * 32 + total.lane;
      if (c >= p.channels) break;
      F dx = 0;  // without a match there is none, be x an Inf or a NaN
      if (total.touched) {
        const F value = scale == 0 ? F(0) : F(widen(x[c * maps.strides[2]]));
        dx = (total.sums[j] - total.along * (value * scale)) * inverse;
      }
      narrow(dx, grad[c * maps.grad_strides[2]]);
    }
  }
}

// One warp per (pair, query pixel); lanes take key pixels.
template <class T>
__device__ void match_plain(const Problem& p) {
  using F = typename Wide<T>::type;
  const int64_t plane = p.grid.pixels(), flat = warp_index() / plane;
  if (flat >= p.table()) return;
  const int64_t keys = p.maps[1].samples, queries = p.maps[0].samples;
  const int64_t group = flat / keys / queries, query = flat / keys % queries, key = flat % keys;
  const int64_t slot = pair_slot(p, group, query, key);
  if (slot < 0) return;
  const int64_t index = (group * queries + query) * plane + warp_index() % plane;
  const MapRow row = MapRow::of(p, p.maps[0], index);
  const Unit unit = row.unit;
  const Maps &from = p.maps[0], &to = p.maps[1];
  const T* x = static_cast<const T*>(from.data) + map_offset(from.strides, unit, query, row.pixel);
  const F scale = unit_scale(static_cast<const F*>(from.norms)[index], F(p.eps));
  const bool valid = is_valid(p, from, unit, query, row.pixel);
  const int lane = threadIdx.x % 32, count = valid ? unit.pixels() : 0;
  Best<F> best;
  for (int l = lane; l < count; l += 32) {
    if (!is_valid(p, to, unit, key, l)) continue;
    const T* y = static_cast<const T*>(to.data) + map_offset(to.strides, unit, key, l);
    F dot = 0;
    for (int64_t c = 0; c < p.channels; ++c) {
      dot += F(widen(x[c * from.strides[2]])) * F(widen(y[c * to.strides[2]]));
    }
    const F key_scale = unit_scale(
        static_cast<const F*>(to.norms)[(group * keys + key) * plane + plane_index(p, unit, l)],
        F(p.eps));
    best.take(dot * scale * key_scale, l);
  }
  for (int step = 16; step > 0; step /= 2) {
    const F other = __shfl_xor_sync(kAllLanes, best.value, step);
    const int place = __shfl_xor_sync(kAllLanes, int(best.place), step);
    best.merge(other, place);
  }
  if (lane == 0) store_match(p, slot, unit, row.pixel, best);
}

}  // namespace cuda
}  // namespace salkernels
