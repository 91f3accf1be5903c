// Backward where all samples of a window fit a tile: V = W X̂, where W holds the weights of matches
// in both roles of a row, and dx = (V − (x̂·V) x̂) / ‖x‖. Features are read twice, for norms and for
// products, the second time from where the first left them: the last chunks are still in shared
// memory, the others in the cache, so device memory is read once. Each gradient is written once: by
// its block, in a fixed order, without atomics.
//
// W (rows x rows) lies in shared memory. As a query a row holds one weight for each pair, at its
// match; as a key, those of the queries that chose it. Either kind alone has at most one weight in
// a place, so they are written one after the other, each thread its own places.
#pragma once

#include "match.cuh"

namespace salkernels {
namespace cuda {

constexpr int kGradientPitch = kChunkWords + 8;  // words; columns of the tensor core on all banks

struct alignas(16) GradientShared {
  const unsigned char* start[kTile];
  const unsigned char* grad_start[kTile];
  int64_t stride[kTile], grad_stride[kTile];
  float scale[kTile];    // to a unit vector; 0 for a row that has none
  float inverse[kTile];  // of the norm, in the gradient
  float along[kTile];    // x̂·V
  int32_t touched[kTile];  // by some pair
  PairBits bits;
  Unit units[kUnits];
  alignas(16) uint32_t buffer[4];  // W, then chunks, of dynamic size
};

__host__ __device__ constexpr int64_t gradient_shared_bytes(int64_t rows, int64_t stages) {
  const int64_t staged = (rows + 31) / 32 * 32;
  return int64_t(sizeof(GradientShared)) + 4 * staged * (staged + 4 + stages * kGradientPitch);
}

// Samples of both sides as the members of one tile: queries first, then, unless they are the
// queries, keys.
struct Nodes {
  Side side;
  int queries, keys, first_key;

  __device__ static Nodes of(const Problem& p) {
    Nodes nodes{};
    nodes.queries = int(p.maps[0].samples);
    nodes.keys = int(p.maps[1].samples);
    nodes.first_key = p.set_form ? 0 : nodes.queries;
    const int samples = nodes.first_key + nodes.keys;
    nodes.side = {0, samples, 0, int(p.tiling.units), samples, int(p.tiling.pixels)};
    return nodes;
  }
  // The number of a pair of nodes of a unit, in this direction.
  __device__ int64_t slot(const Problem& p, const Unit& unit, int query, int key) const {
    if (query >= queries || key < first_key) return -1;
    return pair_slot(p, unit.group, query, key - first_key);
  }
};

// Writes to W the weights of matches, or with `reverse` adds them to its mirror image. `times_sim`:
// times max_sim, whose sum is x̂·V, and takes a max_sim that is NaN to the gradients of both rows;
// else to be multiplied by features that are not unit vectors yet.
template <bool reverse, bool times_sim>
__device__ void add_weights(const Problem& p, GradientShared& shared, const Nodes& nodes,
                            float* weights, int pitch) {
  const int pixels = nodes.side.pixels, per_unit = nodes.queries * nodes.keys;
  for (int i = threadIdx.x; i < nodes.side.units * per_unit * pixels; i += kThreads) {
    const int pixel = i % pixels, pair = i / pixels, u = pair / per_unit;
    const int query = pair % per_unit / nodes.keys, key = pair % nodes.keys;
    const int first = u * nodes.side.samples + query;
    const int second = u * nodes.side.samples + nodes.first_key + key;
    if (!shared.bits.get(first, second)) continue;
    const Unit unit = shared.units[u];
    if (pixel >= unit.pixels()) continue;
    const int64_t slot = pair_slot(p, unit.group, query, key);
    const int64_t at = slot * p.grid.pixels() + plane_index(p, unit, pixel);
    const int match = load_match(p, unit, at);
    if (match < 0) continue;
    const int row = first * pixels + pixel, column = second * pixels + match;
    const float weight = static_cast<const float*>(p.grad_sim)[at] *
                         (times_sim ? static_cast<const float*>(p.max_sim)[at]
                          : reverse ? shared.scale[row]
                                    : shared.scale[column]);
    // Threads that mark the same row write the same.
    if (reverse) {
      weights[column * pitch + row] += weight;
      shared.touched[column] = 1;
    } else {
      weights[row * pitch + column] = weight;
      shared.touched[row] = 1;
    }
  }
}

__device__ inline void clear_words(uint32_t* words, int count) {
  for (int i = threadIdx.x * 4; i < count; i += kThreads * 4) {
    *reinterpret_cast<Piece*>(words + i) = Piece{};
  }
}

// x̂·V of each row, which the maxima give without another product: the sum of weight times max_sim
// over its matches (its row of W) and over those that chose it (its column).
__device__ inline void sum_along(const Problem& p, GradientShared& shared, const Nodes& nodes,
                                 float* weights, int staged) {
  const int pitch = staged + 4, row = threadIdx.x / 2, half = threadIdx.x % 2;
  add_weights<false, true>(p, shared, nodes, weights, pitch);
  __syncthreads();
  float along = 0;
  if (row < staged) {
    for (int c = half * 4; c < staged; c += 8) {
      const float4 four = *reinterpret_cast<const float4*>(weights + row * pitch + c);
      along += (four.x + four.y) + (four.z + four.w);
    }
    for (int r = half; r < staged; r += 2) along += weights[r * pitch + row];
  }
  along += __shfl_xor_sync(0xffffffffu, along, 1);
  if (row < staged && half == 0) shared.along[row] = along;
  __syncthreads();
}

// One 32-bit word of the tensor core's right factor: a feature as tf32, and what is left of it.
__device__ inline Split right_factor(const uint32_t* chunk, int row, int channel, float) {
  return split(chunk[row * kGradientPitch + channel]);
}
template <class T>
__device__ inline Split right_factor(const uint32_t* chunk, int row, int channel, T) {
  const T* values = reinterpret_cast<const T*>(chunk + row * kGradientPitch);
  return {float_to_bits(widen(values[channel])), 0};  // 16 bits fit a tf32 whole
}

// V of the warp's 16 rows and the chunk's channels.
template <class Mode, int kColumns>
__device__ inline void multiply_weights(float (&sums)[kColumns][4], const float* weights,
                                        int staged, uint32_t active, const uint32_t* chunk) {
  using T = typename Mode::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = staged + 4;
  const uint32_t* rows = reinterpret_cast<const uint32_t*>(weights) +
                         (warp * 16 + lane % 16) * pitch + lane / 16 * 4;
  for (int k = 0; k < staged / 8; ++k) {
    if ((active >> k & 1) == 0) continue;
    uint32_t a[4], a_low[4];
    load_matrices(a, rows + k * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split x = split(a[i]);
      a[i] = x.high;
      a_low[i] = x.low;
    }
    const int row = k * 8 + lane % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int channel = n * 8 + lane / 4;
      const Split b0 = right_factor(chunk, row, channel, T{});
      const Split b1 = right_factor(chunk, row + 4, channel, T{});
      if constexpr (Mode::kProducts == 3 || sizeof(T) == 2) {
        multiply_tf32(sums[n], a_low, b0.high, b1.high);
      }
      if constexpr (Mode::kProducts == 3) multiply_tf32(sums[n], a, b0.low, b1.low);
      multiply_tf32(sums[n], a, b0.high, b1.high);
    }
  }
}

// dx of two channels beside each other, in the place of x.
template <class T>
__device__ inline void replace_by_gradient(uint32_t* chunk, int row, int channel, float v0,
                                           float v1, float along, float scale, float inverse,
                                           bool touched) {
  T* x = reinterpret_cast<T*>(chunk + row * kGradientPitch) + channel;
  const float d0 = (v0 - along * (widen(x[0]) * scale)) * inverse;
  const float d1 = (v1 - along * (widen(x[1]) * scale)) * inverse;
  // Without a pair there is no gradient, be x an Inf or a NaN.
  narrow(touched ? d0 : 0.0f, x[0]);
  narrow(touched ? d1 : 0.0f, x[1]);
}

// Fills the rows of the tile, and says by which nodes the tile is needed at all.
template <class Mode>
__device__ bool find_rows(const Problem& p, GradientShared& shared, const Nodes& nodes) {
  const Side& side = nodes.side;
  if (int(threadIdx.x) < side.units) {
    shared.units[threadIdx.x] = unit_of(p, int64_t(blockIdx.x) * side.units + threadIdx.x);
  }
  __syncthreads();
  const Unit* const all = shared.units;
  shared.bits.fill(side.members(), side.members(), [&](int a, int b) {
    const int u = side.unit(a);
    if (u != side.unit(b) || !side.exists(all, a)) return false;
    return nodes.slot(p, all[u], a % side.samples, b % side.samples) >= 0;
  });
  __syncthreads();
  const int r = threadIdx.x;
  bool needed = false;
  if (r < kTile) {
    const int member = r / side.pixels, element = int(sizeof(typename Mode::T));
    shared.start[r] = shared.grad_start[r] = nullptr;
    shared.along[r] = 0;
    shared.touched[r] = 0;
    if (side.exists(all, member)) {
      const Unit unit = all[side.unit(member)];
      const int node = member % side.samples, pixel = r % side.pixels;
      const Maps& maps = p.maps[node >= nodes.queries];
      const int64_t sample = node >= nodes.queries ? node - nodes.queries : node;
      if (pixel < unit.pixels()) {
        shared.grad_start[r] = static_cast<const unsigned char*>(maps.grad) +
                               map_offset(maps.grad_strides, unit, sample, pixel) * element;
        shared.grad_stride[r] = maps.grad_strides[2];
        needed = (shared.bits.any_of_row(member) ||
                  shared.bits.any_of_column(member, side.members())) &&
                 is_valid(p, maps, unit, sample, pixel);
        if (needed) {
          shared.start[r] = static_cast<const unsigned char*>(maps.data) +
                            map_offset(maps.strides, unit, sample, pixel) * element;
          shared.stride[r] = maps.strides[2];
        }
      }
    }
  }
  return __syncthreads_or(needed);
}

template <class Mode>
__device__ void gradient_tile(const Problem& p) {
  using T = typename Mode::T;
  constexpr int kChannels = kChunkWords * 4 / int(sizeof(T)), kColumns = kChannels / 8;
  SALKERNELS_SHARED(memory);
  GradientShared& shared = *reinterpret_cast<GradientShared*>(memory);
  const Nodes nodes = Nodes::of(p);
  const bool needed = find_rows<Mode>(p, shared, nodes);
  const int staged = nodes.side.staged(), words = staged * kGradientPitch;
  const int stages = int(p.tiling.stages), ahead = stages > 4 ? 3 : stages - 1;
  float* const weights = reinterpret_cast<float*>(shared.buffer);
  uint32_t* const buffer = shared.buffer + staged * (staged + 4);
  const int64_t chunks = (p.channels + kChannels - 1) / kChannels;

  const bool load_vector = p.maps[0].vector && p.maps[1].vector;
  const bool load_along = p.maps[0].strides[2] == 1 && p.maps[1].strides[2] == 1;
  const bool store_vector = p.maps[0].grad_vector && p.maps[1].grad_vector;
  const bool store_along = p.maps[0].grad_strides[2] == 1 && p.maps[1].grad_strides[2] == 1;
  const auto stage = [&](int64_t chunk) {
    load_chunk<T, kGradientPitch>({shared.start, 0, shared.stride}, staged, load_vector,
                                  load_along, chunk * kChannels, p.channels,
                                  buffer + chunk % stages * words);
  };
  const auto store = [&](int64_t chunk, const uint32_t* from) {
    store_chunk<T, kGradientPitch>({shared.grad_start, 0, shared.grad_stride}, staged,
                                   store_vector, store_along, chunk * kChannels, p.channels, from);
  };
  if (!needed) {
    clear_words(buffer, words);
    __syncthreads();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) store(chunk, buffer);
    return;
  }

  // First pass: norms. The last chunks stay for the second pass, which begins with them.
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;  // every other 16 bytes each
  float total = 0;
  for (int64_t chunk = 0; chunk < ahead; ++chunk) {
    if (chunk < chunks) stage(chunk);
    copy_async_commit();
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (ahead > 0) copy_async_wait(ahead - 1);
    __syncthreads();
    if (chunk + ahead < chunks) stage(chunk + ahead);
    copy_async_commit();
    if (ahead == 0) {
      copy_async_wait(0);
      __syncthreads();
    }
    if (row < staged) {
      total += sum_of_squares<T>(
          buffer + chunk % stages * words + row * kGradientPitch + half * 4,
          kChunkWords - half * 4, 2);
    }
  }
  copy_async_wait(0);
  total += __shfl_xor_sync(0xffffffffu, total, 1);
  bool lost = false;  // a row without a unit vector
  if (row < staged && half == 0) {
    const float norm = row_norm(total);  // 0 of a row that is not there
    const float scale = unit_scale(norm, float(p.eps));
    lost = !is_finite(norm);
    shared.scale[row] = lost ? 0.0f : scale;
    shared.inverse[row] = gradient_scale(norm, float(p.eps));
  }
  const bool any_lost = __syncthreads_or(lost);

  const int pitch = staged + 4;
  clear_words(shared.buffer, staged * pitch);
  __syncthreads();
  sum_along(p, shared, nodes, weights, staged);
  clear_words(shared.buffer, staged * pitch);
  __syncthreads();
  add_weights<false, false>(p, shared, nodes, weights, pitch);
  __syncthreads();
  add_weights<true, false>(p, shared, nodes, weights, pitch);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pixels = nodes.side.pixels, members = nodes.side.members();
  const uint32_t active = __ballot_sync(
      0xffffffffu, lane * 8 < staged && warp * 16 < staged &&
                       shared.bits.any_of_block(warp * 16, 16, pixels, members, lane * 8, 8,
                                                pixels, members, true));
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    uint32_t* const x = buffer + chunk % stages * words;
    copy_async_wait(stages - 1);
    __syncthreads();
    if (any_lost) {  // 0 · NaN would reach rows that are in no pair with this one
      for (int i = threadIdx.x; i < staged * kChunkWords; i += kThreads) {
        const int r = i / kChunkWords;
        if (shared.scale[r] == 0) x[r * kGradientPitch + i % kChunkWords] = 0;
      }
      __syncthreads();
    }
    float sums[kColumns][4] = {};
    if (active != 0) multiply_weights<Mode, kColumns>(sums, weights, staged, active, x);
    __syncthreads();
    if (warp * 16 < staged) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int r = warp * 16 + upper * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          replace_by_gradient<T>(x, r, n * 8 + lane % 4 * 2, sums[n][2 * upper],
                                 sums[n][2 * upper + 1], shared.along[r], shared.scale[r],
                                 shared.inverse[r], shared.touched[r] != 0);
        }
      }
    }
    __syncthreads();
    store(chunk, x);
    __syncthreads();
    if (chunk >= stages) stage(chunk - stages);
    copy_async_commit();
  }
}

}  // namespace cuda
}  // namespace salkernels
