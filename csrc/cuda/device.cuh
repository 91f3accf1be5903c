// What the kernels take from the hardware: each of these has a twin in plain C++ that the tests put
// in its place, so that the same kernels run on a host under its sanitizers.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SALKERNELS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulator.h"  // tools/host_cuda
#endif

namespace salkernels {
namespace cuda {

// Storage of the 16-bit dtypes.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#ifdef __CUDACC__

__device__ inline float bits_to_float(uint32_t x) { return __uint_as_float(x); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, Half& to) {
  to.bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void narrow(float x, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
// Two 16-bit values in a word, the first in its lower half.
__device__ inline void widen_pair(uint32_t word, BFloat16, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t word, Half, float& first, float& second) {
  first = __half2float(__ushort_as_half(uint16_t(word)));
  second = __half2float(__ushort_as_half(uint16_t(word >> 16)));
}
__device__ inline uint32_t narrow_pair(float first, float second, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t narrow_pair(float first, float second, Half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A place in shared memory as the instructions below take it; offsets are part of them.
struct SharedWords {
  uint32_t address;

  __device__ SharedWords operator+(int words) const { return {address + 4 * uint32_t(words)}; }
};
__device__ inline SharedWords shared_words(const void* from) {
  return {uint32_t(__cvta_generic_to_shared(from))};
}

// 16 bytes to shared memory; zeros, and nothing is read, where there is nothing.
template <int kWord = 0>
__device__ inline void copy_async_16(SharedWords to, const void* global, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(to.address),
               "l"(global), "r"(bytes), "n"(4 * kWord)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest groups have landed: `newest` of them, or fewer where that is not
// a constant the instruction offers.
__device__ inline void copy_async_wait(int newest) {
  switch (newest) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
  }
}

// Asks the second-level cache for a row that will be read soon; bytes and address by sixteens. Only
// where one instruction does it.
__device__ inline void prefetch_row([[maybe_unused]] const void* row,
                                    [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(bytes) : "memory");
#endif
}

// Four 8 x 8 matrices of 16 bits: lane i names row i % 8 of matrix i / 8, and is given words
// (i / 4, i % 4) of all four.
template <int kWord = 0>
__device__ inline void load_matrices(uint32_t (&to)[4], SharedWords row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row.address), "n"(4 * kWord)
               : "memory");
}

// The same, but each lane is given column values: of matrix m, rows 2 (i % 4) and that plus one of
// column i / 4. That is the right factor of a product whose rows lie one below the other.
template <int kWord = 0>
__device__ inline void load_matrices_across(uint32_t (&to)[4], SharedWords row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row.address), "n"(4 * kWord)
               : "memory");
}

// sum += a · b over 8 words of a row: 8 tf32 or 16 values of 16 bits.
#define SALKERNELS_MMA(NAME, SHAPE)                                                            \
  __device__ inline void NAME(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,            \
                              uint32_t b1) {                                                   \
    asm volatile("mma.sync.aligned." SHAPE                                                     \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
  }
SALKERNELS_MMA(multiply_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
SALKERNELS_MMA(multiply_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SALKERNELS_MMA(multiply_f16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef SALKERNELS_MMA

#else

inline void prefetch_row(const void*, uint32_t) {}

float widen(BFloat16 x);

template <class T>
inline void widen_pair(uint32_t word, T, float& first, float& second) {
  first = widen(T{uint16_t(word)});
  second = widen(T{uint16_t(word >> 16)});
}
template <class T>
inline uint32_t narrow_pair(float first, float second, T) {
  T low, high;
  narrow(first, low);
  narrow(second, high);
  return low.bits | uint32_t(high.bits) << 16;
}

#endif  // __CUDACC__

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }

// The dtype of sums: double for double, else float.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <class T>
struct IsHalf {
  static constexpr bool value = false;
};
template <>
struct IsHalf<Half> {
  static constexpr bool value = true;
};

struct alignas(16) Piece {
  uint32_t words[4];
};

// A float as the sum of two tf32, in three instructions: the upper part is rounded to 11 bits by an
// addition (half away from zero), and what it leaves is exact in fp32. Of that the tensor core
// takes the upper 11 bits by itself, so what is lost is below 2^-22 of x:
//
//   x     1.mmmmmmmmmm mmmmmmmmmmmmm     24 bits
//   high  1.mmmmmmmmmm                   11 bits, |x - high| <= 2^-11 |x|
//   low                1.mmmmmmmmmm|mm   12 bits and a sign; one of them is not looked at
//
// Inf becomes a NaN in `low`, and a NaN may become an Inf in `high`; the norm of such a row is NaN.
struct Split {
  uint32_t high, low;
};
__device__ inline uint32_t to_tf32(uint32_t bits) { return (bits + 0x1000u) & 0xffffe000u; }
__device__ inline Split split(uint32_t bits) {
  const uint32_t high = to_tf32(bits);
  return {high, float_to_bits(bits_to_float(bits) - bits_to_float(high))};
}

// The norm of a row from its sum of squares. One beyond the range of F is as lost as a NaN: the
// unit vector would be zero, without a word.
template <class F>
__device__ inline F row_norm(F squares) {
  return squares - squares == F(0) ? sqrt(squares) : F(NAN);
}
// Features of a row are scaled by this to a unit vector; that of a zero vector is zero.
template <class F>
__device__ inline F unit_scale(F norm, F eps) {
  return norm == F(0) ? F(0) : F(1) / (norm <= eps ? eps : norm);
}
// 1 / norm in the gradient: 0 at or below eps.
template <class F>
__device__ inline F gradient_scale(F norm, F eps) {
  return norm <= eps ? F(0) : F(1) / norm;
}

template <class F>
__device__ inline bool is_finite(F x) {
  return x - x == F(0);
}

// The largest value so far and where: NaN is above all numbers, the first of equals stays. No
// cosine is -INFINITY, which stands for one that does not count: it is never taken.
template <class F>
struct Best {
  F value = -INFINITY;
  int place = -1;  // none yet

  __device__ void take(F other, int where) {  // in ascending order of `where`
    if (other > value || (other != other && value == value)) {
      value = other;
      place = where;
    }
  }
  __device__ void merge(F other, int where) {  // in any order
    if (where < 0) return;
    const bool lost = value != value, other_lost = other != other;
    const bool equal = lost == other_lost && (lost || other == value);
    const bool greater = lost == other_lost ? other > value : other_lost;
    if (greater || (equal && where < place)) {
      value = other;
      place = where;
    }
  }
};

}  // namespace cuda
}  // namespace salkernels
