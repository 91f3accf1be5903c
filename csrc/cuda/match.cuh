// Forward: the products of a tile of query rows with tiles of key rows, and the best of each window.
//
// A block owns one tile of queries. Where a window's samples fit a tile (or some do), it meets one
// tile of keys; in the set form a tile above the diagonal serves both directions of its pairs, and
// one on the diagonal is staged once. Where one window is larger than a tile (streamed), a block
// owns some query pixels of one pair and all key pixels stream by, with a running maximum.
#pragma once

#include "rows.cuh"

namespace salkernels {
namespace cuda {

// How products are made. tf32x3 splits each fp32 in two tf32, which loses about what fp32 does.
struct Fp32 {
  using T = float;
  static constexpr int kProducts = 3;
};
struct Tf32 {
  using T = float;
  static constexpr int kProducts = 1;
};
struct Bf16 {
  using T = BFloat16;
  static constexpr int kProducts = 1;
};
struct Fp16 {
  using T = Half;
  static constexpr int kProducts = 1;
};

constexpr int kStagePitch = kChunkWords + 4;  // words; 16-byte rows of ldmatrix fall on all banks
constexpr int kSimPitch = kTile + 8;          // words; so do pairs of columns, and rows of 16 bytes
constexpr float kAbsent = -1;                 // in place of a scale: of a row that takes no part

// What a block works on.
struct Work {
  Side sides[2];
  int64_t first_unit;
  int64_t slot;  // of the one pair, if streamed; negative: nothing to do
  bool one_side;  // both sides are the same rows
  bool asked;     // some query row takes part
};

struct alignas(16) MatchShared {
  const unsigned char* start[2][kTile];  // rows of queries and keys
  float scale[2][kTile];
  float squares[2][kTile];
  PairBits bits;
  Unit units[kUnits];
  Work work;
  alignas(16) uint32_t buffer[4];  // stages, and after them the similarities, of dynamic size
};

__host__ __device__ constexpr int64_t match_shared_bytes(int64_t stages, bool one_side) {
  const int64_t staged = stages * (one_side ? kTile : 2 * kTile) * kStagePitch;
  const int64_t sims = int64_t(kTile) * kSimPitch;
  return int64_t(sizeof(MatchShared)) + 4 * (staged > sims ? staged : sims);
}

// A warp's share of the products: 2 groups of 16 rows, chosen so that the triangle above the
// diagonal is shared evenly, and every other group of 8 columns.
struct WarpTile {
  int rows[2];
  int parity;

  __device__ static WarpTile mine() {
    const int warp = threadIdx.x / 32, quarter = warp / 2;
    return {{quarter * 16, (kTile / 16 - 1 - quarter) * 16}, warp % 2};
  }
  __device__ int column(int n) const { return (2 * n + parity) * 8; }
};

// Of groups of columns 2 n + j: at[n][m][j].
struct Sums {
  float at[4][2][2][4];
};

template <class Mode>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<Bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  multiply_bf16(sum, a, b0, b1);
}
template <>
__device__ inline void multiply<Fp16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  multiply_f16(sum, a, b0, b1);
}

// One operand of one step of the tensor core, which is 8 staged words: four words of it in each
// lane, for fp32 in two parts. As queries these are 16 rows; as keys two groups of 8, n and n + 1.
template <class Mode>
struct Operand {
  static constexpr bool kWide = sizeof(typename Mode::T) == 4;
  uint32_t high[4], low[4];

  __device__ void load(const uint32_t* row) {
    load_matrices(high, row);
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split x = split(high[i]);
        high[i] = x.high;
        low[i] = x.low;
      }
    }
  }
  __device__ void load_queries(const WarpTile& tile, int m, const uint32_t* staged) {
    const int lane = threadIdx.x % 32;
    load(staged + (tile.rows[m] + lane % 16) * kStagePitch + lane / 16 * 4);
  }
  // Both groups lie in one group of 32 rows, so both are staged if one is.
  __device__ void load_keys(const WarpTile& tile, int n, const uint32_t* staged) {
    const int lane = threadIdx.x % 32;
    load(staged + (tile.column(n + lane / 16) + lane % 8) * kStagePitch + lane / 8 % 2 * 4);
  }
};

// Adds the products of 16 queries with the two groups of keys, where these are active.
template <class Mode>
__device__ inline void multiply_groups(float (&sums)[2][4], const Operand<Mode>& a,
                                       const Operand<Mode>& b, uint32_t active) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if ((active >> j & 1) == 0) continue;
    if constexpr (Operand<Mode>::kWide) {
      if constexpr (Mode::kProducts == 3) {  // the small ones first
        multiply_tf32(sums[j], a.low, b.high[2 * j], b.high[2 * j + 1]);
        multiply_tf32(sums[j], a.high, b.low[2 * j], b.low[2 * j + 1]);
      }
      multiply_tf32(sums[j], a.high, b.high[2 * j], b.high[2 * j + 1]);
    } else {
      multiply<Mode>(sums[j], a.high, b.high[2 * j], b.high[2 * j + 1]);
    }
  }
}

// Adds the products of a chunk, of which `words` words are staged.
template <class Mode>
__device__ inline void multiply_chunk(Sums& sums, const WarpTile& tile, uint32_t active,
                                      const uint32_t* queries, const uint32_t* keys, int words) {
  if constexpr (Mode::kProducts == 3) {
    // The tensor core truncates where it adds, hundreds of times in a long row. So a chunk is
    // summed by itself, and added with rounding; queries are loaded again for that.
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((active >> (2 * n) & 0x303) == 0) continue;
      float part[2][2][4] = {};
#pragma unroll 1
      for (int w = 0; w < words; w += 8) {
        Operand<Mode> b;
        b.load_keys(tile, 2 * n, keys + w);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t groups = active >> (8 * m + 2 * n);
          if ((groups & 3) == 0) continue;  // and these queries may not be staged
          Operand<Mode> a;
          a.load_queries(tile, m, queries + w);
          multiply_groups<Mode>(part[m], a, b, groups);
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        sums.at[n][i / 8][i / 4 % 2][i % 4] += part[i / 8][i / 4 % 2][i % 4];
      }
    }
  } else {
#pragma unroll 1
    for (int w = 0; w < words; w += 8) {
      Operand<Mode> a[2] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if ((active >> (8 * m) & 0xff) != 0) a[m].load_queries(tile, m, queries + w);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if ((active >> (2 * n) & 0x303) == 0) continue;
        Operand<Mode> b;
        b.load_keys(tile, 2 * n, keys + w);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_groups<Mode>(sums.at[n][m], a[m], b, active >> (8 * m + 2 * n));
        }
      }
    }
  }
}

// Where the rows of a side are, from a pixel of its window on; null for those that no pair needs,
// or that take no part. Whether this thread's row is any.
template <class Needed>
__device__ bool fill_rows(const Problem& p, const Side& side, int64_t first_pixel,
                          const Maps& maps, int element, const Unit* units, const Needed& needed,
                          const unsigned char** start) {
  const int r = threadIdx.x % kTile;
  const unsigned char* row = nullptr;
  if (r < side.rows()) {
    const int member = r / side.pixels;
    if (side.exists(units, member) && needed(member)) {
      const Unit unit = units[side.unit(member)];
      const int64_t pixel = first_pixel + r % side.pixels;
      const int64_t sample = side.sample(member);
      if (pixel < unit.pixels() && is_valid(p, maps, unit, sample, int(pixel))) {
        row = static_cast<const unsigned char*>(maps.data) +
              map_offset(maps.strides, unit, sample, int(pixel)) * element;
      }
    }
  }
  start[r] = row;
  return row != nullptr;
}

// All products of a tile of queries with one of keys, scaled to cosines, in shared.buffer;
// -INFINITY where either row takes no part: a query pixel that does not finds no match either.
template <class Mode>
__device__ __forceinline__ void tile_cosines(const Problem& p, MatchShared& shared,
                                             int query_rows, int key_rows, bool one_side,
                                             uint32_t active) {
  using T = typename Mode::T;
  constexpr int kChannels = kChunkWords * 4 / int(sizeof(T));
  const int stages = int(p.tiling.stages), words = (one_side ? kTile : 2 * kTile) * kStagePitch;
  const int channels = int(p.channels), chunks = (channels + kChannels - 1) / kChannels;
  const WarpTile tile = WarpTile::mine();
  uint32_t* const buffer = shared.buffer;

  const auto stage = [&](int chunk) {
    uint32_t* to = buffer + chunk % stages * words;
    load_chunk<T, kStagePitch>({shared.start[0], p.maps[0].strides[2], nullptr}, query_rows,
                               p.maps[0].vector, p.maps[0].strides[2] == 1, chunk * kChannels,
                               channels, to);
    if (one_side) return;
    load_chunk<T, kStagePitch>({shared.start[1], p.maps[1].strides[2], nullptr}, key_rows,
                               p.maps[1].vector, p.maps[1].strides[2] == 1, chunk * kChannels,
                               channels, to + kTile * kStagePitch);
  };

  Sums sums = {};
  // Two threads share a row of a single side, half a chunk each; else every row has its own.
  const int half = threadIdx.x / kTile, row = threadIdx.x % kTile;
  const int side = one_side ? 0 : half, side_rows = side == 0 ? query_rows : key_rows;
  float squares = 0;
  for (int chunk = 0; chunk < stages - 1; ++chunk) {
    if (chunk < chunks) stage(chunk);
    copy_async_commit();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait(stages - 2);
    // The chunk has landed for every thread, and none reads the one before it any more.
    __syncthreads();
    if (chunk + stages - 1 < chunks) stage(chunk + stages - 1);
    copy_async_commit();
    const uint32_t* queries = buffer + chunk % stages * words;
    const uint32_t* keys = one_side ? queries : queries + kTile * kStagePitch;
    if (row < side_rows) {
      const uint32_t* mine = (side == 0 ? queries : keys) + row * kStagePitch;
      squares += one_side ? sum_of_squares<T>(mine + half * kChunkWords / 2, kChunkWords / 2, 1)
                          : sum_of_squares<T>(mine, kChunkWords, 1);
    }
    const int left = ((channels - chunk * kChannels) * int(sizeof(T)) + 3) / 4;  // words
    multiply_chunk<Mode>(sums, tile, active, queries, keys,
                         left < kChunkWords ? left : int(kChunkWords));
  }
  copy_async_wait(0);
  shared.squares[half][row] = squares;
  __syncthreads();
  if (row < side_rows) {
    const float total = one_side ? shared.squares[0][row] + shared.squares[1][row]
                                 : shared.squares[half][row];
    shared.scale[half][row] = shared.start[side][row] == nullptr
                                  ? kAbsent
                                  : unit_scale(row_norm(total), float(p.eps));
  }
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const float* const key_scale = shared.scale[one_side ? 0 : 1];
  float* const sims = reinterpret_cast<float*>(buffer);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if ((active >> (8 * m + n) & 1) == 0) continue;
      const int column = tile.column(n) + lane % 4 * 2;
      const float scales[2] = {key_scale[column], key_scale[column + 1]};
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int r = tile.rows[m] + upper * 8 + lane / 4;
        const float scale = shared.scale[0][r];
        float pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          pair[i] = scale < 0 || scales[i] < 0
                        ? -INFINITY
                        : sums.at[n / 2][m][n % 2][2 * upper + i] * scale * scales[i];
        }
        *reinterpret_cast<float2*>(sims + r * kSimPitch + column) = make_float2(pair[0], pair[1]);
      }
    }
  }
  __syncthreads();
}

// The best of each window, for all pairs of a query on one side with a key on the other.
// If `reverse`, the queries are those of the columns, and the keys those of the rows.
template <bool reverse>
__device__ void best_of_windows(const Problem& p, const MatchShared& shared,
                                const Side (&sides)[2], bool one_side) {
  const Side& queries = sides[reverse];
  const Side& keys = sides[!reverse];
  const int pixels = queries.pixels, per_unit = queries.samples * keys.samples;
  const float* const sims = reinterpret_cast<const float*>(shared.buffer);
  for (int i = threadIdx.x; i < queries.units * per_unit * pixels; i += kThreads) {
    // Lanes beside each other take pixels of a query, then what lies beside in shared memory.
    const int pixel = i % pixels, pair = i / pixels, u = pair / per_unit;
    const int fast = pair % per_unit % (reverse ? queries : keys).samples;
    const int slow = pair % per_unit / (reverse ? queries : keys).samples;
    const int query = reverse ? fast : slow, key = reverse ? slow : fast;
    // On the diagonal, products were made for query <= key only.
    if (one_side && (reverse ? query <= key : query > key)) continue;
    const int member = u * queries.samples + query, other = u * keys.samples + key;
    // Off the diagonal a bit stands for either direction, so the number is looked up all the same.
    if (!(reverse && !one_side ? shared.bits.get(other, member) : shared.bits.get(member, other))) {
      continue;
    }
    const Unit unit = shared.units[u];
    if (pixel >= unit.pixels()) continue;
    const int64_t slot = pair_slot(p, unit.group, queries.first_sample + query,
                                   keys.first_sample + key);
    if (slot < 0) continue;
    const int row = member * pixels + pixel, column = other * pixels;
    const float* from = reverse ? sims + column * kSimPitch + row : sims + row * kSimPitch + column;
    Best<float> best;
    const int count = unit.pixels();
    int l = 0;
    if (!reverse && pixels % 4 == 0) {
      for (; l + 4 <= count; l += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + l);
        best.take(four.x, l);
        best.take(four.y, l + 1);
        best.take(four.z, l + 2);
        best.take(four.w, l + 3);
      }
    }
    for (; l < count; ++l) best.take(from[l * (reverse ? kSimPitch : 1)], l);
    store_match(p, slot, unit, pixel, best);
  }
}

// Which of the warp's products are needed: bit 8 m + n for group m of queries and n of keys. On the
// diagonal that is none below it, since above are the same products.
__device__ inline uint32_t active_products(const MatchShared& shared) {
  const Side &queries = shared.work.sides[0], &keys = shared.work.sides[1];
  const bool one_side = shared.work.one_side;
  const int lane = threadIdx.x % 32, m = lane / 8 % 2, n = lane % 8;
  const WarpTile tile = WarpTile::mine();
  const int row = m == 0 ? tile.rows[0] : tile.rows[1], column = tile.column(n);
  const bool above = !one_side || (column + 7) / keys.pixels >= row / keys.pixels;
  const bool on = lane < 16 && above && row < queries.rows() && column < keys.rows() &&
                  shared.bits.any_of_block(row, 16, queries.pixels, queries.members(), column, 8,
                                           keys.pixels, keys.members(), one_side);
  return __ballot_sync(0xffffffffu, on);
}

__device__ inline Work work_of_tile(const Problem& p) {
  const Tiling& t = p.tiling;
  const int64_t tile_pairs =
      p.set_form ? t.tiles[0] * (t.tiles[0] + 1) / 2 : t.tiles[0] * t.tiles[1];
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
  return {{{first * t.samples[0], p.maps[0].samples, 0, units, int(t.samples[0]), pixels},
           {second * t.samples[1], p.maps[1].samples, 0, units, int(t.samples[1]), pixels}},
          blockIdx.x / tile_pairs * units,
          0,
          p.set_form && first == second,
          false};
}

__device__ inline Work work_of_stream(const Problem& p) {
  const Tiling& t = p.tiling;
  const int64_t keys = p.maps[1].samples, table = p.maps[0].samples * keys;
  const int64_t chunk = blockIdx.x % t.chunks, rest = blockIdx.x / t.chunks;
  const int64_t query = rest % table / keys, key = rest % keys;
  const int pixels = int(t.pixels);
  const Unit unit = unit_of(p, rest / table);
  const int64_t slot = chunk * pixels < unit.pixels() ? pair_slot(p, unit.group, query, key) : -1;
  return {{{query, query + 1, chunk * pixels, 1, 1, pixels}, {key, key + 1, 0, 1, 1, pixels}},
          rest / table,
          slot,
          false,
          false};
}

// The match of the query row that this thread shares with the next.
__device__ inline void store_streamed(const Problem& p, const MatchShared& shared,
                                      const Best<float>& best) {
  const Side& queries = shared.work.sides[0];
  const int row = threadIdx.x / 2, pixel = int(queries.first_pixel) + row;
  if (threadIdx.x % 2 == 0 && row < queries.pixels && pixel < shared.units[0].pixels()) {
    store_match(p, shared.work.slot, shared.units[0], pixel, best);
  }
}

template <class Mode>
__device__ void match(const Problem& p) {
  SALKERNELS_SHARED(memory);
  MatchShared& shared = *reinterpret_cast<MatchShared*>(memory);
  const bool streamed = p.tiling.streamed != 0;
  if (threadIdx.x == 0) shared.work = streamed ? work_of_stream(p) : work_of_tile(p);
  __syncthreads();
  const Work& work = shared.work;  // there, since registers are short
  if (work.slot < 0) return;
  const Side &queries = work.sides[0], &keys = work.sides[1];
  const bool one_side = work.one_side;
  if (int(threadIdx.x) < queries.units) {
    shared.units[threadIdx.x] = unit_of(p, work.first_unit + threadIdx.x);
  }
  __syncthreads();
  const Unit* const units = shared.units;
  shared.bits.fill(queries.members(), keys.members(), [&](int a, int b) {
    const int u = queries.unit(a);
    if (u != keys.unit(b)) return false;
    if (!queries.exists(units, a) || !keys.exists(units, b)) return false;
    const int64_t query = queries.sample(a), key = keys.sample(b), group = units[u].group;
    return pair_slot(p, group, query, key) >= 0 ||
           (p.set_form && !one_side && !streamed && pair_slot(p, group, key, query) >= 0);
  });
  __syncthreads();
  const int members = queries.members(), key_rows = keys.staged();
  const uint32_t active = active_products(shared);
  if (!__syncthreads_or(active != 0)) return;

  const int element = int(sizeof(typename Mode::T));
  if (threadIdx.x < kTile) {
    const bool found = fill_rows(
        p, queries, queries.first_pixel, p.maps[0], element, units,
        [&](int a) {
          return shared.bits.any_of_row(a) || (one_side && shared.bits.any_of_column(a, members));
        },
        shared.start[0]);
    if (found) shared.work.asked = true;  // whoever writes it writes the same
  }
  // One tile of keys, or, streamed, all of a window, with a running maximum: two threads share a
  // query row then, and take turns of four key pixels.
  const int row = threadIdx.x / 2, turn = threadIdx.x % 2 * 4;
  const int end = streamed ? units[0].pixels() : keys.pixels;
  const float* const sims = reinterpret_cast<const float*>(shared.buffer) + row * kSimPitch;
  Best<float> best;
  for (int from = 0; from < end; from += keys.pixels) {
    if (threadIdx.x >= kTile && !one_side) {
      fill_rows(
          p, keys, from, p.maps[1], element, units,
          [&](int b) { return shared.bits.any_of_column(b, members); }, shared.start[1]);
    }
    // The rows are known, and the similarities of the tile before were read.
    __syncthreads();
    if (streamed && !work.asked) break;
    tile_cosines<Mode>(p, shared, queries.staged(), key_rows, one_side, active);
    if (streamed) {
      const int width = end - from < keys.pixels ? end - from : keys.pixels;
      for (int l = turn; l < width && row < queries.pixels; l += 8) {
        const float4 four = *reinterpret_cast<const float4*>(sims + l);
        best.take(four.x, from + l);
        if (l + 1 < width) best.take(four.y, from + l + 1);
        if (l + 2 < width) best.take(four.z, from + l + 2);
        if (l + 3 < width) best.take(four.w, from + l + 3);
      }
    } else {
      best_of_windows<false>(p, shared, work.sides, one_side);
      if (p.set_form) best_of_windows<true>(p, shared, work.sides, one_side);
    }
  }
  if (!streamed) return;
  const float other = __shfl_xor_sync(0xffffffffu, best.value, 1);
  best.merge(other, __shfl_xor_sync(0xffffffffu, best.place, 1));
  store_streamed(p, shared, best);
}

}  // namespace cuda
}  // namespace salkernels
