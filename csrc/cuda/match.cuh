// Forward where the window of a sample fits a tile: products of a tile of query rows with one of
// key rows, and the best of each window.
//
// A tile holds all samples of one window or of several, or, where there are too many, some samples.
// In the set form a tile above the diagonal serves both directions of its pairs, and one on the
// diagonal is staged once. Matches are found pair by pair from the list, not by trying all:
//
//   thread t: pixel t % L of a window, pairs t / L, t / L + 256 / L, ... of a batch of the list
#pragma once

#include "pairs.cuh"
#include "products.cuh"

namespace salkernels {
namespace cuda {

// What a block works on.
struct Work {
  Side sides[2];
  int64_t first_unit;
  bool one_side;   // both sides are the same rows
  bool writes[2];  // the norms of the rows of a side: some other block may have the same rows
};

// A pair of the list, in a tile. `row` and `column` are samples of the tile's sides; the query is
// the row's, or, `across`, the column's.
struct TilePair {
  int32_t slot;
  uint32_t where;  // row, column and across, a byte each

  __device__ int row() const { return int(where & 0xff); }
  __device__ int column() const { return int(where >> 8 & 0xff); }
  __device__ bool across() const { return where >> 16 != 0; }
};
constexpr uint32_t kNowhere = ~0u;

constexpr int kBatch = 2 * kThreads;  // pairs

struct alignas(16) MatchShared {
  const unsigned char* start[2 * kTile];  // rows of queries and keys
  float scale[2 * kTile];        // squared norms at first
  int32_t norm_place[2 * kTile]; // where the norm of a row goes, if this block writes it; else -1
  uint32_t used[2][kTile / 32];  // members of a side, one bit each
  int32_t plane[kTile];    // of each pixel of the units: where it stands in the map, or -1
  int32_t nominal[kTile];  // and its offset in the nominal window
  TilePair batch[kBatch];
  int32_t batch_count;
  int32_t filled;  // whether the batch holds all pairs of all units
  int32_t staged[2];  // rows of each side in a stage
  int64_t pairs_before[2];
  BlockList list;
  Unit units[kUnits];
  Work work;
  alignas(16) uint32_t buffer[4];  // stages, and after them the cosines, of dynamic size
};

__host__ __device__ constexpr int64_t match_shared_bytes(int64_t stages, bool one_side,
                                                         bool lower) {
  return int64_t(sizeof(MatchShared)) + 4 * product_words(stages, one_side, lower);
}

__device__ inline Work work_of_tile(const Problem& p) {
  const Tiling& t = p.tiling;
  const uint32_t tile_pairs =
      uint32_t(p.set_form ? t.tiles[0] * (t.tiles[0] + 1) / 2 : t.tiles[0] * t.tiles[1]);
  int first = int(blockIdx.x % tile_pairs), second;
  if (p.set_form) {  // the pairs of tiles on and above the diagonal, row by row
    const int tiles = int(t.tiles[0]);
    second = first;
    for (first = 0; second >= tiles - first; ++first) second -= tiles - first;
    second += first;
  } else {
    second = first % int(t.tiles[1]);
    first /= int(t.tiles[1]);
  }
  const int units = int(t.units), pixels = int(t.pixels);
  const bool one_side = p.set_form && first == second;
  return {{{first * t.samples[0], p.maps[0].samples, 0, units, int(t.samples[0]), pixels},
           {second * t.samples[1], p.maps[1].samples, 0, units, int(t.samples[1]), pixels}},
          int64_t(blockIdx.x / tile_pairs) * units,
          one_side,
          {p.set_form ? one_side : second == 0, !p.set_form && first == 0}};
}

// Units and their pixels. Threads of a unit's pixels do the divisions, once.
__device__ inline void fill_units(const Problem& p, MatchShared& shared) {
  const Side& side = shared.work.sides[0];
  if (int(threadIdx.x) < side.units) {
    shared.units[threadIdx.x] = unit_of(p, shared.work.first_unit + threadIdx.x);
  }
  if (threadIdx.x < 2) shared.list.needed[threadIdx.x] = 0;
  if (threadIdx.x < kTile / 32) shared.used[0][threadIdx.x] = shared.used[1][threadIdx.x] = 0;
  __syncthreads();
  const int r = threadIdx.x, pixels = side.pixels;
  if (r < side.units * pixels) {
    const Unit unit = shared.units[r / pixels];
    const bool exists = unit.group >= 0 && r % pixels < unit.pixels();
    shared.plane[r] = exists ? int32_t(plane_index(p, unit, r % pixels)) : -1;
    shared.nominal[r] = exists ? nominal_offset(p, unit, r % pixels) : -1;
  }
}

// Rows of a tile on the diagonal are on their way while the pairs are looked up, be there pairs for
// all of them or not. Other tiles find them in the cache.
template <class T>
__device__ inline void prefetch_tile(const Problem& p, const MatchShared& shared) {
  const Side& side = shared.work.sides[0];
  const Maps& maps = p.maps[0];
  const int r = threadIdx.x, member = r / side.pixels, pixel = r % side.pixels;
  if (!shared.work.one_side || !maps.vector || !side.exists(shared.units, member)) return;
  const Unit& unit = shared.units[side.unit(member)];
  if (pixel >= unit.pixels()) return;
  const int64_t offset = map_offset(maps.strides, unit, side.sample(member), pixel);
  prefetch_row(static_cast<const T*>(maps.data) + offset, uint32_t(p.channels * sizeof(T)));
}

// Which of the units of a block belong to one group.
struct UnitRun {
  int first, end;

  __device__ static UnitRun from(const MatchShared& shared, int first) {
    const int units = shared.work.sides[0].units;
    int end = first + 1;
    while (end < units && shared.units[end].group == shared.units[first].group) ++end;
    return {first, end};
  }
};

// Where a pair stands in the tile, as TilePair has it; kNowhere if it does not.
__device__ inline uint32_t find_in_tile(const Work& work, bool set_form, int query, int key) {
  const auto member = [](const Side& side, int sample) { return sample - int(side.first_sample); };
  const auto in = [](const Side& side, int member) {
    return unsigned(member) < unsigned(side.samples);
  };
  int row = member(work.sides[0], query), column = member(work.sides[1], key);
  bool found = in(work.sides[0], row) && in(work.sides[1], column);
  // On the diagonal products are made above it only, off it they serve both directions.
  bool across = work.one_side && row > column;
  if (set_form && !work.one_side && !found) {
    row = member(work.sides[0], key);
    column = member(work.sides[1], query);
    found = in(work.sides[0], row) && in(work.sides[1], column);
    across = true;
  } else if (across) {
    const int other = row;
    row = column;
    column = other;
  }
  const uint32_t where = uint32_t(row) | uint32_t(column) << 8 | uint32_t(across) << 16;
  return found ? where : kNowhere;
}

// The part of the list that belongs to the group of a run: found by two warps.
__device__ inline void find_pairs(const Problem& p, MatchShared& shared, int64_t group) {
  __syncthreads();
  if (threadIdx.x < 64) {
    const int64_t table = p.maps[0].samples * p.maps[1].samples;
    const int64_t before = pairs_before(p, (group + threadIdx.x / 32) * table);
    if (threadIdx.x % 32 == 0) shared.pairs_before[threadIdx.x / 32] = before;
  }
  __syncthreads();
}

__device__ inline void mark_used(MatchShared& shared, int side, int member) {
  atomicOr(&shared.used[side][member / 32], 1u << member % 32);
}

// The next pairs of the list that stand in the tile, in order within each warp. Where this block is
// to write norms, it marks the samples that have a pair at all.
__device__ inline void fill_batch(const Problem& p, MatchShared& shared, const UnitRun& run,
                                  int64_t from, int64_t to, bool mark) {
  const Work& work = shared.work;
  __syncthreads();
  if (threadIdx.x == 0) shared.batch_count = 0;
  __syncthreads();
  const auto use_member = [&](int side, int sample) {
    const int member = sample - int(work.sides[side].first_sample);
    if (unsigned(member) >= unsigned(work.sides[side].samples)) return;
    for (int v = run.first; v < run.end; ++v) {
      mark_used(shared, side, v * work.sides[side].samples + member);
    }
  };
  const int64_t start = shared.units[run.first].group * p.maps[0].samples * p.maps[1].samples;
  const uint32_t keys = uint32_t(p.maps[1].samples);
  const int lane = threadIdx.x % 32;
  for (int64_t first = from; first < to; first += kThreads) {
    uint32_t where = kNowhere;
    const int64_t i = first + threadIdx.x;
    if (i < to) {
      const uint32_t place = uint32_t(pair_place(p, i) - start);
      const int query = int(place / keys), key = int(place % keys);
      where = find_in_tile(work, p.set_form, query, key);
      if (mark && work.writes[0]) use_member(0, query);
      if (mark && work.writes[0] && p.set_form) use_member(0, key);
      if (mark && work.writes[1]) use_member(1, key);
    }
    const bool found = where != kNowhere;
    const uint32_t all = __ballot_sync(kAllLanes, found);
    int begin = 0;
    if (lane == 0 && all != 0) begin = atomicAdd(&shared.batch_count, __popc(all));
    begin = __shfl_sync(kAllLanes, begin, 0);
    if (found) shared.batch[begin + __popc(all & ((1u << lane) - 1))] = {int32_t(i), where};
  }
  __syncthreads();
}

// The blocks of products that pairs need, and which samples do. Whether the batch that is left
// holds all pairs of all units, so that it need not be filled again.
__device__ inline bool mark_pairs(const Problem& p, MatchShared& shared) {
  const Work& work = shared.work;
  const int pixels = work.sides[0].pixels, units = work.sides[0].units;
  bool all = false;
  for (int u = 0; u < units;) {
    const UnitRun run = UnitRun::from(shared, u);
    const int64_t group = shared.units[u].group;
    u = run.end;
    if (group < 0) continue;
    find_pairs(p, shared, group);
    const int64_t begin = shared.pairs_before[0], end = shared.pairs_before[1];
    all = run.first == 0 && run.end == units && end - begin <= kBatch;
    for (int64_t from = begin; from < end; from += kBatch) {
      fill_batch(p, shared, run, from, from + kBatch < end ? from + kBatch : end, true);
      for (int i = threadIdx.x; i < shared.batch_count; i += kThreads) {
        const TilePair pair = shared.batch[i];
        for (int v = run.first; v < run.end; ++v) {
          const int row = v * work.sides[0].samples + pair.row();
          const int column = v * work.sides[1].samples + pair.column();
          mark_used(shared, 0, row);
          mark_used(shared, work.one_side ? 0 : 1, column);
          const int last_row = (row + 1) * pixels - 1, last_column = (column + 1) * pixels - 1;
          for (int r = row * pixels / 16; r <= last_row / 16; ++r) {
            for (int c = column * pixels / 16; c <= last_column / 16; ++c) {
              shared.list.need(r * 16, c * 16);
            }
          }
        }
      }
    }
  }
  __syncthreads();
  return all;
}

// Where the rows of a side are; null for those that no pair needs, or that take no part.
__device__ inline const unsigned char* find_row(const Problem& p, const MatchShared& shared,
                                                int which, int r, int element) {
  const Side& side = shared.work.sides[which];
  const Maps& maps = p.maps[which];
  if (r >= side.rows()) return nullptr;
  const int member = r / side.pixels, pixel = r % side.pixels, u = side.unit(member);
  const bool used = (shared.used[which][member / 32] >> member % 32 & 1) != 0;
  if (!used || !side.exists(shared.units, member)) {
    return nullptr;
  }
  const int64_t sample = side.sample(member);
  if (shared.plane[u * side.pixels + pixel] < 0) return nullptr;
  if (!is_valid(p, maps, shared.units[u], sample, pixel)) return nullptr;
  return static_cast<const unsigned char*>(maps.data) +
         map_offset(maps.strides, shared.units[u], sample, pixel) * element;
}

// The row of this thread, of either side: where it is, and where its norm goes.
template <class T>
__device__ inline const unsigned char* fill_row(const Problem& p, MatchShared& shared) {
  const Work& work = shared.work;
  const int which = threadIdx.x / kTile, r = threadIdx.x % kTile;
  const Side& side = work.sides[which];
  const unsigned char* row = nullptr;
  int32_t norm_place = -1;
  if (r < side.rows() && !(work.one_side && which == 1)) {
    const int member = r / side.pixels, u = side.unit(member);
    const int plane = shared.plane[u * side.pixels + r % side.pixels];
    if (plane >= 0 && side.exists(shared.units, member)) {
      const int64_t sample = side.sample(member), node = sample + (which == 1 && !p.set_form
                                                                       ? p.maps[0].samples
                                                                       : 0);
      row = find_row(p, shared, which, r, int(sizeof(T)));
      if (work.writes[which]) {
        norm_place = int32_t(node);
        if (row == nullptr) {
          static_cast<float*>(
              p.norm)[norm_index(p, shared.units[u].group, node, plane)] = INFINITY;
          norm_place = -1;
        }
      }
    }
  }
  shared.start[threadIdx.x] = row;
  shared.norm_place[threadIdx.x] = norm_place;
  return row;
}

// Scales from squared norms, and the norms themselves, where they are due.
__device__ inline void find_scales(const Problem& p, MatchShared& shared) {
  const int which = threadIdx.x / kTile, r = threadIdx.x % kTile;
  const Side& side = shared.work.sides[which];
  if (shared.start[threadIdx.x] == nullptr) {
    shared.scale[threadIdx.x] = kAbsent;
    return;
  }
  const float norm = row_norm(shared.scale[threadIdx.x]);
  shared.scale[threadIdx.x] = unit_scale(norm, float(p.eps));
  const int32_t node = shared.norm_place[threadIdx.x];
  if (node < 0) return;
  const int u = side.unit(r / side.pixels);
  static_cast<float*>(p.norm)[norm_index(p, shared.units[u].group, node,
                                         shared.plane[u * side.pixels + r % side.pixels])] = norm;
}

// The best of each window, for all pairs of the tile.
__device__ inline void best_of_windows(const Problem& p, MatchShared& shared, bool filled) {
  const Work& work = shared.work;
  const int pixels = work.sides[0].pixels;
  const int row_samples = work.sides[0].samples, column_samples = work.sides[1].samples;
  const float* const sims = reinterpret_cast<const float*>(shared.buffer);
  for (int first = 0; first < work.sides[0].units;) {
    const UnitRun run = UnitRun::from(shared, first);
    const int64_t group = shared.units[first].group;
    first = run.end;
    if (group < 0) continue;
    if (!filled) find_pairs(p, shared, group);
    const int64_t end = shared.pairs_before[1];
    const int span = (run.end - run.first) * pixels, step = kThreads / span;
    const int u = run.first + threadIdx.x % span / pixels, pixel = threadIdx.x % span % pixels;
    const int plane = shared.plane[u * pixels + pixel];
    const int count = shared.units[u].pixels();
    for (int64_t from = shared.pairs_before[0]; from < end; from += kBatch) {
      if (!filled) {
        fill_batch(p, shared, run, from, from + kBatch < end ? from + kBatch : end, false);
      }
      const int pairs = int(threadIdx.x) < step * span && plane >= 0 ? shared.batch_count : 0;
      for (int i = threadIdx.x / span; i < pairs; i += step) {
        const TilePair pair = shared.batch[i];
        const int row = (u * row_samples + pair.row()) * pixels;
        const int column = (u * column_samples + pair.column()) * pixels;
        const int own = pair.across() ? 1 : kSimPitch, next = pair.across() ? kSimPitch : 1;
        const float* at = sims + row * kSimPitch + column + pixel * own;
        Best<float> best;
#pragma unroll 4
        for (int l = 0; l < count; ++l, at += next) best.take(*at, l);
        store_match(p, match_index(p, pair.slot, plane), best.value,
                    best.place < 0 ? -1 : shared.nominal[u * pixels + best.place]);
      }
    }
  }
}

// Products, norms and cosines of a tile of which each warp has at most kShare blocks.
template <class Mode, int kShare>
__device__ __forceinline__ void multiply_blocks(const Problem& p, MatchShared& shared) {
  const Work& work = shared.work;
  const bool one_side = work.one_side, by_diagonal = one_side && sizeof(typename Mode::T) == 2;
  Sums<kShare> sums = {};
  float squares[kRowsOfThread] = {};
  multiply_tile<Mode, true, false>(
      p, {shared.start, shared.staged, one_side}, &shared.list, by_diagonal, shared.buffer, sums,
      squares);
  if (by_diagonal) {
    store_diagonal(sums, shared.list, shared.scale);
  } else {
    store_squares(squares, one_side, shared.scale);
  }
  __syncthreads();
  find_scales(p, shared);
  __syncthreads();
  store_cosines(sums, shared.list, shared.scale, shared.scale + (one_side ? 0 : kTile),
                reinterpret_cast<float*>(shared.buffer));
}

// A warp can hold the sums of so many blocks of products where two thread blocks share the registers
// of a multiprocessor. Three products for one (Fp32) need more registers even then.
constexpr int kFewBlocks = 5;

// Whether no warp has more than kFewBlocks, whatever the pairs are.
//
//    set form, one tile of two units:  0 1          units of one query and one key:  0 1
//    on and above the diagonals          2 . .      a band along the diagonal        2 3 4
//                                          3 4                                         5 6 7
//                                            5                                           8 9
__host__ __device__ inline bool needs_few_blocks(const Tiling& t, bool set_form) {
  int64_t blocks = kBlocks * kBlocks;
  if (set_form && t.tiles[0] == 1) {
    const int64_t rows = t.samples[0] * t.pixels;
    const int64_t side = (rows + 15) / 16 + (rows % 16 == 0 ? 0 : 1);  // of a unit, out of step
    const int64_t triangle = kBlocks * (kBlocks + 1) / 2, units = t.units * side * (side + 1) / 2;
    blocks = units < triangle ? units : triangle;
  } else if (!set_form && t.samples[0] == 1 && t.samples[1] == 1) {
    blocks = kBlocks * ((16 + 2 * t.pixels) / 16 + 1);
  }
  return blocks <= kFewBlocks * kWarps;
}

template <class Mode, int kMost>
__device__ void match(const Problem& p) {
  SALKERNELS_SHARED(memory);
  MatchShared& shared = *reinterpret_cast<MatchShared*>(memory);
  if (threadIdx.x == 0) {
    shared.work = work_of_tile(p);
    shared.staged[0] = shared.work.sides[0].staged();
    shared.staged[1] = shared.work.one_side ? 0 : shared.work.sides[1].staged();
  }
  __syncthreads();
  fill_units(p, shared);
  prefetch_tile<typename Mode::T>(p, shared);
  // Kept in shared memory: registers are what the products need.
  const bool all = mark_pairs(p, shared);
  if (threadIdx.x == 0) shared.filled = all;
  const unsigned char* row = fill_row<typename Mode::T>(p, shared);
  // Norms of 16-bit features are taken from products of rows with themselves.
  if (row != nullptr && shared.work.one_side && sizeof(typename Mode::T) == 2) {
    shared.list.need(threadIdx.x, threadIdx.x);
  }
  const bool any = __syncthreads_or(row != nullptr);
  if (!any && shared.list.needed[0] == 0 && shared.list.needed[1] == 0) return;
  shared.list.number();
  const int share = (shared.list.count + kWarps - 1) / kWarps;
  // With this version, too, the compiler would spill a register in tf32 on sm_80.
  constexpr bool kTwo = sizeof(typename Mode::T) == 2 || Mode::kProducts == 3;
  if (kTwo && share <= 2) {
    multiply_blocks<Mode, 2>(p, shared);
  } else if (share <= 3) {
    multiply_blocks<Mode, 3>(p, shared);
  } else if (kMost == kFewBlocks || share <= kFewBlocks) {
    multiply_blocks<Mode, kFewBlocks>(p, shared);
  } else {
    multiply_blocks<Mode, kMost>(p, shared);
  }
  __syncthreads();
  best_of_windows(p, shared, shared.filled != 0);
}

}  // namespace cuda
}  // namespace salkernels
