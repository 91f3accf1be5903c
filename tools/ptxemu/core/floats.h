// Handlers of fp32 and fp64 arithmetic, and of approximate functions.
#pragma once
#include "arithmetic.h"

// ---------------------------------------------------------------- float
FN2(FAdd, a + b) FN2(FSub, a - b) FN2(FMul, a* b) FN2(FDiv, a / b) struct Fma32 {
  static inline float f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};
struct Fma64 {
  static inline double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
template <class T>
struct FMin {
  static inline T f(T a, T b) {
    if (a != a) return b != b ? std::numeric_limits<T>::quiet_NaN() : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
  }
};
template <class T>
struct FMax {
  static inline T f(T a, T b) {
    if (a != a) return b != b ? std::numeric_limits<T>::quiet_NaN() : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
  }
};
template <class T>
struct FMinN {
  static inline T f(T a, T b) {
    if (a != a || b != b) return std::numeric_limits<T>::quiet_NaN();
    return FMin<T>::f(a, b);
  }
};
template <class T>
struct FMaxN {
  static inline T f(T a, T b) {
    if (a != a || b != b) return std::numeric_limits<T>::quiet_NaN();
    return FMax<T>::f(a, b);
  }
};
template <class M>
struct XorSignAbs32 {
  static inline float f(float a, float b) {
    u32 s = (fbits(a) ^ fbits(b)) & 0x80000000u;
    float r = M::f(std::fabs(a), std::fabs(b));
    return bitsf((fbits(r) & 0x7fffffffu) | s);
  }
};
struct AbsF32 {
  static inline u32 f(u32 a) { return a & 0x7fffffffu; }
};
struct NegF32 {
  static inline u32 f(u32 a) { return a ^ 0x80000000u; }
};
struct AbsF64 {
  static inline u64 f(u64 a) { return a & ~(1ull << 63); }
};
struct NegF64 {
  static inline u64 f(u64 a) { return a ^ (1ull << 63); }
};
struct AbsH {
  static inline u16 f(u16 a) { return a & 0x7fff; }
};
struct NegH {
  static inline u16 f(u16 a) { return a ^ 0x8000; }
};
struct CpySgn32 {
  static inline u32 f(u32 a, u32 b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
};
struct CpySgn64 {
  static inline u64 f(u64 a, u64 b) { return (a & (1ull << 63)) | (b & ~(1ull << 63)); }
};
struct Rcp32 {
  static inline float f(float a) { return 1.0f / a; }
};
struct Rcp64 {
  static inline double f(double a) { return 1.0 / a; }
};
struct Rcp64A {
  static inline double f(double a) {
    double r = 1.0 / a;
    return bitsd(dbits(r) & 0xffffffff00000000ull);
  }
};
struct Rsq64 {
  static inline double f(double a) { return 1.0 / std::sqrt(a); }
};
struct Rsq64A {
  static inline double f(double a) {
    double r = 1.0 / std::sqrt(a);
    return bitsd(dbits(r) & 0xffffffff00000000ull);
  }
};
struct Sqrt32 {
  static inline float f(float a) { return std::sqrt(a); }
};
struct Sqrt64 {
  static inline double f(double a) { return std::sqrt(a); }
};
struct Rsq32 {
  static inline float f(float a) { return (float)(1.0 / std::sqrt((double)a)); }
};
struct Sin32 {
  static inline float f(float a) { return (float)std::sin((double)a); }
};
struct Cos32 {
  static inline float f(float a) { return (float)std::cos((double)a); }
};
struct Lg2 {
  static inline float f(float a) { return log2f(a); }
};
struct Ex2 {
  static inline float f(float a) { return exp2f(a); }
};
// tanh.approx.f32 has a documented max relative error of 2^-11: model it pessimistically by keeping
// 11 mantissa bits
struct TanhA {
  static inline float f(float a) {
    float r = tanhf(a);
    if (std::fabs(r) == 1.0f || r == 0 || r != r) return r;
    u32 b = fbits(r);
    b = (b + 0x800) & ~0xfffu;
    return bitsf(b);
  }
};
template <class H, class F>
struct HU {
  static inline u16 f(u16 a) { return H::dn(F::f((float)H::up(a))); }
};
template <class H, template <class> class F>
struct HB {
  static inline u16 f(u16 a, u16 b) { return H::dn(F<double>::f(H::up(a), H::up(b))); }
};
template <class H, bool RELU>
struct HFma {
  static inline u16 f(u16 a, u16 b, u16 c) {
    double r = __builtin_fma(H::up(a), H::up(b), H::up(c));
    u16 v = H::dn(r);
    if (RELU && (r < 0)) v = 0;
    return v;
  }
};

static inline void setCsr(u32 bits) { _mm_setcsr(0x1f80u | bits); }
static void satDst(Warp& W, const Insn& I, u32 m) {
  if (I.sat == 1) {
    float* d = REGP(float, 0);
    FORM(m, i)
    d[i] = d[i] != d[i] ? 0.f : d[i] < 0 ? 0.f : d[i] > 1 ? 1.f : (d[i] == 0 ? 0.f : d[i]);
  } else if (I.sat == 2) {
    double* d = REGP(double, 0);
    FORM(m, i) d[i] = d[i] != d[i] ? 0. : d[i] < 0 ? 0. : d[i] > 1 ? 1. : d[i];
  } else {
    u16* d = REGP(u16, 0);
    int n = I.sat == 4 ? 2 : I.sat == 3 ? 1 : 0;
    FORM(m, i) for (int k = 0; k < n; k++) {
      u16& h = d[i * n + k];
      float v = h2f(h);
      h = v != v ? 0 : v < 0 ? 0 : v > 1 ? 0x3c00 : h;
    }
  }
}
static void h_csr(Exec& X, Warp& W, const Insn& I, u32 m) {
  setCsr(I.csr);
  I.fn2(X, W, I, m);
  setCsr(0);
  if (I.sat) satDst(W, I, m);
}
