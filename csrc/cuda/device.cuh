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

__device__ inline void copy_async_16(void* shared, const void* global) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
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

// Four 8 x 8 matrices of 16 bits: lane i names row i % 8 of matrix i / 8, and is given words
// (i / 4, i % 4) of all four.
__device__ inline void load_matrices(uint32_t (&to)[4], const uint32_t* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
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

__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
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

struct alignas(16) Piece {
  uint32_t words[4];
};

// A float as the sum of two tf32: what is left is 2^-22 of it, as small as the rounding of fp32.
struct Split {
  uint32_t high, low;
};
__device__ inline Split split(uint32_t bits) {
  const float x = bits_to_float(bits);
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - bits_to_float(high))};
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
