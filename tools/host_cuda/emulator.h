// The CUDA kernels as host code: one fiber for each thread of a block, block after block.
//
// Barriers and warp operations are places where fibers wait for each other. Whatever a kernel does
// that the hardware would not forgive ends the run with a message: a barrier that some threads do
// not reach, a warp operation that some lanes do not take part in. Shared memory is allocated anew
// for each block, filled with NaN, with the size that the launch asked for, so that the address
// sanitizer sees what lies outside. Asynchronous copies land when they are waited for, no sooner.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

// Runs `body` as each thread of each block of a grid. Threads of a block that can go on do so in
// an order: 0 ascending, -1 descending, else the seed of a permutation.
void run(const std::function<void()>& body, int threads, int64_t blocks, int64_t rows,
         int64_t shared_bytes, int64_t order);

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

Index& thread_index();
Index& block_index();
unsigned char* shared_memory();

// Waits for all threads of the block; whether `on` held for any of them.
bool block_barrier(bool on, int line);
// Waits for the other lanes; the last to arrive runs `together` on what each of them brought.
void warp_together(void* own, const char* what, int line,
                   const std::function<void(void* const*)>& together);
void copy_async(void* to, const void* from);
void copy_commit();
void copy_wait(int newest);

template <class V, class Argument>
struct Offer {
  V value;
  Argument argument;
  V result;
};

// result of lane i = pick(offers, i)
template <class V, class Argument, class Pick>
V exchange(V value, Argument argument, const char* what, int line, const Pick& pick) {
  Offer<V, Argument> own{value, argument, V{}};
  warp_together(&own, what, line, [&](void* const* lanes) {
    auto* const* offers = reinterpret_cast<Offer<V, Argument>* const*>(lanes);
    for (int i = 0; i < 32; ++i) offers[i]->result = pick(offers, i);
  });
  return own.result;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define SALKERNELS_SHARED(name) unsigned char* const name = ::emulator::shared_memory()

#define __syncthreads() ::emulator::block_barrier(false, __LINE__)
#define __syncthreads_or(on) ::emulator::block_barrier((on) != 0, __LINE__)
#define __syncwarp() ::emulator::warp_together(nullptr, "__syncwarp", __LINE__, [](void* const*) {})
#define __shfl_sync(mask, offer, lane)                            \
  ::emulator::exchange((offer), int(lane), "__shfl_sync", __LINE__, \
                       [](auto o, int i) { return o[o[i]->argument & 31]->value; })
#define __shfl_xor_sync(mask, offer, bits)                            \
  ::emulator::exchange((offer), int(bits), "__shfl_xor_sync", __LINE__, \
                       [](auto o, int i) { return o[i ^ o[i]->argument]->value; })
#define __shfl_up_sync(mask, offer, step)                                                   \
  ::emulator::exchange((offer), int(step), "__shfl_up_sync", __LINE__, [](auto o, int i) {   \
    return o[i < o[i]->argument ? i : i - o[i]->argument]->value;                            \
  })
#define __ballot_sync(mask, on)                                                          \
  ::emulator::exchange(uint32_t((on) ? 1 : 0), 0, "__ballot_sync", __LINE__, [](auto o, int) { \
    uint32_t votes = 0;                                                                  \
    for (int i = 0; i < 32; ++i) votes |= o[i]->value << i;                              \
    return votes;                                                                        \
  })
#define __match_any_sync(mask, offer)                                                     \
  ::emulator::exchange(uint32_t(offer), 0, "__match_any_sync", __LINE__, [](auto o, int lane) { \
    uint32_t same = 0;                                                                    \
    for (int i = 0; i < 32; ++i) same |= uint32_t(o[i]->value == o[lane]->value) << i;     \
    return same;                                                                          \
  })

#define __shfl_down_sync(mask, offer, step)                                                 \
  ::emulator::exchange((offer), int(step), "__shfl_down_sync", __LINE__, [](auto o, int i) { \
    return o[i + o[i]->argument > 31 ? i : i + o[i]->argument]->value;                       \
  })

// Fibers take turns where they wait only, so nothing comes between.
template <class V>
V atomicAdd(V* at, V value) {
  const V before = *at;
  *at += value;
  return before;
}
inline uint32_t atomicOr(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at |= value;
  return before;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace salkernels {
namespace cuda {

struct BFloat16;
struct Half;

inline float bits_to_float(uint32_t x) {
  float result;
  std::memcpy(&result, &x, 4);
  return result;
}
inline uint32_t float_to_bits(float x) {
  uint32_t result;
  std::memcpy(&result, &x, 4);
  return result;
}
float widen(Half x);
void narrow(float x, Half& to);
void narrow(float x, BFloat16& to);

struct SharedWords {
  uint32_t* address;

  SharedWords operator+(int words) const { return {address + words}; }
};
inline SharedWords shared_words(const void* from) {
  return {static_cast<uint32_t*>(const_cast<void*>(from))};
}
template <int kWord = 0>
void copy_async_16(SharedWords to, const void* global, bool there) {
  ::emulator::copy_async(to.address + kWord, there ? global : nullptr);
}
inline void copy_async_commit() { ::emulator::copy_commit(); }
inline void copy_async_wait(int newest) { ::emulator::copy_wait(newest < 3 ? newest : 3); }

void load_matrices_at(uint32_t (&to)[4], const uint32_t* row);
void load_matrices_across_at(uint32_t (&to)[4], const uint32_t* row);
template <int kWord = 0>
void load_matrices(uint32_t (&to)[4], SharedWords row) {
  load_matrices_at(to, row.address + kWord);
}
template <int kWord = 0>
void load_matrices_across(uint32_t (&to)[4], SharedWords row) {
  load_matrices_across_at(to, row.address + kWord);
}
void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace cuda
}  // namespace salkernels
