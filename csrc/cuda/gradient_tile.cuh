// Backward of 16-bit features where all samples of a window fit a tile: V = W X on the tensor core,
// where W holds the weights of the terms of each row, and dx = (V − (x̂·V) x̂) / ‖x‖.
//
//           columns: rows of the unit as partners
//   W  row  [ . w . | . . w | w . . | ... ]      a warp fills the rows of its samples from their
//      row  [ w . . | . . . | . . w | ... ]      matches: no two lanes meet, so the order is fixed
//
// W is fp32. Each warp takes 16 rows of it to registers, as two 16-bit parts that together hold 16
// bits of each weight (22 in fp16, whose rows are scaled by a power of two), and multiplies all
// channels: features go through shared memory once, chunk by chunk, and what comes out is written
// to where they were, then to memory. Memory of W is free for stages as soon as it is in registers.
#pragma once

#include "gradient_rows.cuh"

namespace salkernels {
namespace cuda {

constexpr int kWeightPitch = kTile + 4;       // words
constexpr int kGradientPitch = kChunkWords + 4;  // words; rows of ldmatrix on all banks
constexpr int kSteps = kTile / 16;            // of the tensor core over the columns of W

struct alignas(16) GradientShared {
  const unsigned char* start[kTile];
  unsigned char* grad[kTile];
  int64_t stride[kTile], grad_stride[kTile];
  float along[kTile];    // x̂·V
  float self[kTile];     // dx = (V - self * x) * inverse
  float inverse[kTile];
  int32_t touched[kTile];  // by some term
  int32_t plane[kTile];    // of the pixels of each unit
  float exchange[kWarps][32];
  Unit units[kUnits];
  alignas(16) uint32_t buffer[4];  // W, and stages in its place and after it, of dynamic size
};

__host__ __device__ constexpr int64_t gradient_shared_bytes(int64_t rows, int64_t stages) {
  const int64_t staged = (rows + 31) / 32 * 32;
  const int64_t weights = staged * kWeightPitch, chunks = stages * staged * kGradientPitch;
  return int64_t(sizeof(GradientShared)) + 4 * (weights > chunks ? weights : chunks);
}

// Where each row of the tile is: row r is pixel r % L of node r / L % nodes of unit r / L / nodes.
template <class T>
__device__ inline void find_rows(const Problem& p, GradientShared& shared) {
  const int units = int(p.tiling.units), nodes = int(p.group_nodes());
  const int pixels = int(p.window_pixels()), r = threadIdx.x;
  if (r < units) shared.units[r] = unit_of(p, int64_t(blockIdx.x) * units + r);
  __syncthreads();
  if (r >= kTile) return;
  shared.start[r] = nullptr;
  shared.grad[r] = nullptr;
  shared.along[r] = 0;
  shared.touched[r] = 0;
  const int u = r / pixels;
  shared.plane[r] = u < units && shared.units[u].group >= 0 && r % pixels < shared.units[u].pixels()
                        ? int32_t(plane_index(p, shared.units[u], r % pixels))
                        : -1;
  const int member = r / pixels, node = member % nodes, pixel = r % pixels;
  if (member >= units * nodes) return;
  const Unit unit = shared.units[member / nodes];
  if (unit.group < 0 || pixel >= unit.pixels()) return;
  const int which = node >= p.maps[0].samples;
  const Maps& maps = p.maps[which];
  const int64_t sample = node - (which ? p.maps[0].samples : 0);
  const int64_t element = sizeof(T);
  shared.grad[r] = static_cast<unsigned char*>(maps.grad) +
                   map_offset(maps.grad_strides, unit, sample, pixel) * element;
  shared.grad_stride[r] = maps.grad_strides[2];
  const float norm = static_cast<const float*>(
      p.norm)[norm_index(p, unit.group, node, plane_index(p, unit, pixel))];
  shared.self[r] = unit_scale(norm, float(p.eps));  // times x̂·V, as soon as that is known
  shared.inverse[r] = gradient_scale(norm, float(p.eps));
  // Those that are lost are left out: a NaN times zero would reach rows without a pair with them.
  if (!is_finite(norm) || norm == 0) return;
  shared.start[r] = static_cast<const unsigned char*>(maps.data) +
                    map_offset(maps.strides, unit, sample, pixel) * element;
  shared.stride[r] = maps.strides[2];
  // On its way while W is filled.
  if (maps.vector) prefetch_row(shared.start[r], uint32_t(p.channels * sizeof(T)));
}

// W and x̂·V: each warp those of its samples.
__device__ inline void fill_weights(const Problem& p, GradientShared& shared) {
  const int nodes = int(p.group_nodes()), pixels = int(p.window_pixels());
  const int warp = threadIdx.x / 32, members = int(p.tiling.units) * nodes;
  float* const weights = reinterpret_cast<float*>(shared.buffer);
  for (int member = warp; member < members; member += kWarps) {
    const int u = member / nodes;
    if (shared.units[u].group < 0) break;
    const NodeWindow at = NodeWindow::of(p, shared.units[u], member % nodes);
    MatchWalk<float> walk(p, at, shared.plane + u * pixels);
    float* const along = shared.along + member * pixels;
    FewRows<float> few;
    float* const rows = weights + member * pixels * kWeightPitch + u * nodes * pixels;
    for (int role = 0; role < 2; ++role) {
      const int chunks = walk.chunks(role == 1);
      walk.start(0);
      for (int chunk = 0; chunk < chunks; ++chunk, walk.next()) {
        const RoleMatch<float> found = walk.load(role == 1);
        if (found.row >= 0) {
          // The two roles may share a place, but never these lanes.
          rows[found.row * kWeightPitch + found.partner] += found.gradient * found.scale;
          shared.touched[member * pixels + found.row] = 1;
        }
        const float part = found.gradient * found.max_sim;
        if (FewRows<float>::suffice(pixels)) {
          few.add(found.row, part);
        } else {
          const uint32_t same = __match_any_sync(kAllLanes, found.row);
          add_by_row(along, found.row, same, part, shared.exchange[warp]);
        }
        __syncwarp();  // the next lanes may add to the same places
      }
    }
    if (FewRows<float>::suffice(pixels)) few.store(along, pixels);
  }
}

// 16 rows of W in registers: a[step] as the tensor core takes them.
template <class T>
struct Weights {
  uint32_t high[kSteps][4], low[kSteps][4];
  uint32_t active;   // steps with any weight
  float factor[2];   // of the rows of this lane: undoes the scaling of fp16

  __device__ static float rest(float x) {
    T rounded;
    narrow(x, rounded);
    return x - float(widen(rounded));
  }
  // A power of two that takes the largest weight of a row near 2^13, in fp16.
  __device__ static float scale_of(const float* row, int staged) {
    if constexpr (!kScaled) return 1;
    float largest = 0;
    for (int c = threadIdx.x % 4 * 2; c < staged; c += 8) {
      largest = fmaxf(largest, fmaxf(fabsf(row[c]), fabsf(row[c + 1])));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const int exponent = int(float_to_bits(largest) >> 23);
    if (exponent == 255 || exponent < 20) return exponent == 255 ? 1 : bits_to_float(240u << 23);
    return bits_to_float(uint32_t(127 + 13 + 127 - exponent) << 23);
  }
  static constexpr bool kScaled = IsHalf<T>::value;

  __device__ void load(const float* weights, int staged) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    active = 0;
    factor[0] = factor[1] = 1;
    if (warp * 16 >= staged) return;
    const float* rows[2];
    float scale[2];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      rows[upper] = weights + (warp * 16 + upper * 8 + lane / 4) * kWeightPitch;
      scale[upper] = scale_of(rows[upper], staged);
      factor[upper] = 1 / scale[upper];
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 pair = make_float2(0, 0);
        if (k * 16 < staged) {
          pair = *reinterpret_cast<const float2*>(rows[i % 2] + k * 16 + i / 2 * 8 + lane % 4 * 2);
        }
        const float x = pair.x * scale[i % 2], y = pair.y * scale[i % 2];
        high[k][i] = narrow_pair(x, y, T{});
        low[k][i] = narrow_pair(rest(x), rest(y), T{});
        any = any || x != 0 || y != 0;
      }
      if (__ballot_sync(kAllLanes, any) != 0) active |= 1u << k;
    }
  }
};

template <class T>
__device__ inline void multiply_16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  if constexpr (IsHalf<T>::value) {
    multiply_f16(sum, a, b0, b1);
  } else {
    multiply_bf16(sum, a, b0, b1);
  }
}

// 16 columns of W, by 16 channels.
template <class T, int kStep, int kChannels>
__device__ inline void multiply_channels(float (&sums)[8][4], const Weights<T>& weights,
                                         SharedWords chunk) {
  uint32_t b[4];
  load_matrices_across<kStep * 16 * kGradientPitch + kChannels * 8>(b, chunk);
  multiply_16<T>(sums[2 * kChannels], weights.low[kStep], b[0], b[1]);
  multiply_16<T>(sums[2 * kChannels + 1], weights.low[kStep], b[2], b[3]);
  multiply_16<T>(sums[2 * kChannels], weights.high[kStep], b[0], b[1]);
  multiply_16<T>(sums[2 * kChannels + 1], weights.high[kStep], b[2], b[3]);
}
template <class T, int kStep>
__device__ inline void multiply_columns(float (&sums)[8][4], const Weights<T>& weights,
                                        SharedWords chunk) {
  if ((weights.active >> kStep & 1) != 0) {
    multiply_channels<T, kStep, 0>(sums, weights, chunk);
    multiply_channels<T, kStep, 1>(sums, weights, chunk);
    multiply_channels<T, kStep, 2>(sums, weights, chunk);
    multiply_channels<T, kStep, 3>(sums, weights, chunk);
  }
  if constexpr (kStep + 1 < kSteps) multiply_columns<T, kStep + 1>(sums, weights, chunk);
}

// V of the warp's 16 rows and the chunk's 64 channels. Lanes 0 to 15 name the rows of a step, the
// others those rows 8 channels on.
template <class T>
__device__ inline void multiply_weights(float (&sums)[8][4], const Weights<T>& weights,
                                        const uint32_t* chunk) {
  const int lane = threadIdx.x % 32;
  const SharedWords at = shared_words(chunk + lane % 16 * kGradientPitch + lane / 16 * 4);
  multiply_columns<T, 0>(sums, weights, at);
}

// dx in the place of x, for the warp's 16 rows.
template <class T>
__device__ inline void replace_by_gradient(const GradientShared& shared, uint32_t* chunk,
                                           const float (&sums)[8][4], const float (&factor)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int r = warp * 16 + upper * 8 + lane / 4;
    const float self = shared.self[r], inverse = shared.inverse[r];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      uint32_t* const at = chunk + r * kGradientPitch + n * 4 + lane % 4;
      float x[2];
      widen_pair(*at, T{}, x[0], x[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v = sums[n][2 * upper + i];
        if constexpr (Weights<T>::kScaled) v *= factor[upper];
        x[i] = (v - self * x[i]) * inverse;
      }
      *at = narrow_pair(x[0], x[1], T{});
    }
  }
}

template <class T>
__device__ void gradient_tile(const Problem& p) {
  constexpr int kChannels = kChunkWords * 4 / int(sizeof(T));
  SALKERNELS_SHARED(memory);
  GradientShared& shared = *reinterpret_cast<GradientShared*>(memory);
  const int rows = int(p.tiling.units * p.group_nodes() * p.window_pixels());
  const int staged = (rows + 31) / 32 * 32, words = staged * kGradientPitch;
  const int channels = int(p.channels), chunks = (channels + kChannels - 1) / kChannels;
  const int stages = int(p.tiling.stages), warp = threadIdx.x / 32;
  find_rows<T>(p, shared);
  for (int i = threadIdx.x * 4; i < staged * kWeightPitch; i += kThreads * 4) {
    *reinterpret_cast<Piece*>(shared.buffer + i) = Piece{};
  }
  __syncthreads();
  fill_weights(p, shared);
  __syncthreads();
  Weights<T> weights;
  weights.load(reinterpret_cast<const float*>(shared.buffer), staged);
  if (threadIdx.x < kTile) {
    const int r = threadIdx.x;
    const bool touched = shared.touched[r] != 0;
    shared.self[r] = touched ? shared.self[r] * shared.along[r] : 0;
    shared.inverse[r] = touched ? shared.inverse[r] : 0;
  }
  __syncthreads();  // W is in registers

  const bool load_vector = p.maps[0].vector && p.maps[1].vector;
  const bool load_along = p.maps[0].strides[2] == 1 && p.maps[1].strides[2] == 1;
  const bool store_vector = p.maps[0].grad_vector && p.maps[1].grad_vector;
  const bool store_along = p.maps[0].grad_strides[2] == 1 && p.maps[1].grad_strides[2] == 1;
  const auto stage = [&](int chunk, int place) {
    if (chunk < chunks) {
      load_chunk<T, kGradientPitch>({shared.start, 0, shared.stride}, staged, load_vector,
                                    load_along, chunk * kChannels, channels,
                                    shared.buffer + place * words);
    }
    copy_async_commit();
  };
  for (int chunk = 0; chunk < stages - 1; ++chunk) stage(chunk, chunk);
  int place = 0, next = stages - 1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait(stages - 2);
    // The chunk has landed, and the gradient of the one before is on its way.
    __syncthreads();
    stage(chunk + stages - 1, next);
    uint32_t* const x = shared.buffer + place * words;
    float sums[8][4] = {};
    multiply_weights<T>(sums, weights, x);
    __syncthreads();
    if (warp * 16 < staged) replace_by_gradient<T>(shared, x, sums, weights.factor);
    __syncthreads();
    store_chunk<T, kGradientPitch>(
        {reinterpret_cast<const unsigned char* const*>(shared.grad), 0, shared.grad_stride},
        staged, store_vector, store_along, chunk * kChannels, channels, x);
    place = place + 1 == stages ? 0 : place + 1;
    next = next + 1 == stages ? 0 : next + 1;
  }
}

}  // namespace cuda
}  // namespace salkernels
