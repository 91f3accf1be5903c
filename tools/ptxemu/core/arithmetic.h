// Handlers of arithmetic: 16-bit floats, integers, 32 lanes in a loop.
#pragma once
#include "load_store.h"

static inline float h2f(u16 h) { return _cvtsh_ss(h); }
// The same bits as another type.
template <class To, class From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline u32 fbits(float f) { return as<u32>(f); }
static inline float bitsf(u32 x) { return as<float>(x); }
static inline u64 dbits(double x) { return as<u64>(x); }
static inline double bitsd(u64 x) { return as<double>(x); }
static inline float b2f(u16 h) { return bitsf((u32)h << 16); }
static inline float d2f_odd(
    double d) {  // round-to-odd double->float (so that a second rounding to <=22 bits is exact)
  float f = (float)d;
  if (std::isnan(d)) return f;
  if ((double)f == d) return f;
  u32 b = fbits(f);
  if (std::fabs((double)f) > std::fabs(d)) b -= 1;
  b |= 1;
  return bitsf(b);
}
static inline u16 f2h_rn(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
static inline u16 f2h(float f, int rm) {
  switch (rm) {
    case 1:
      return _cvtss_sh(f, _MM_FROUND_TO_ZERO);
    case 2:
      return _cvtss_sh(f, _MM_FROUND_TO_NEG_INF);
    case 3:
      return _cvtss_sh(f, _MM_FROUND_TO_POS_INF);
    default:
      return f2h_rn(f);
  }
}
static inline u16 f2b(float f, int rm = 0) {
  u32 x = fbits(f);
  if (std::isnan(f)) return 0x7fff;
  u32 lo = x & 0xffff, hi = x >> 16;
  if (rm == 0) {
    if (lo > 0x8000 || (lo == 0x8000 && (hi & 1))) hi++;
  } else if (rm == 4) {
    if (lo >= 0x8000) hi++;
  } else if (rm == 2) {
    if (lo && (x >> 31)) hi++;
  } else if (rm == 3) {
    if (lo && !(x >> 31)) hi++;
  }
  return (u16)hi;
}
static inline u16 d2h(double d) { return f2h_rn(d2f_odd(d)); }
static inline u16 d2b(double d) { return f2b(d2f_odd(d)); }
struct HF {
  static inline double up(u16 h) { return h2f(h); }
  static inline u16 dn(double d) { return std::isnan(d) ? 0x7fff : d2h(d); }
};
struct BF {
  static inline double up(u16 h) { return b2f(h); }
  static inline u16 dn(double d) { return d2b(d); }
};

// ---------------------------------------------------------------- generic elementwise handlers
template <class T, int NE, class F>
__attribute__((noinline)) static void H1(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  if (m == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < NE; i++) d[i] = F::f(a[i]);
  } else {
    alignas(64) T t[NE < 32 ? 32 : NE];
    for (int i = 0; i < NE; i++) t[i] = F::f(a[i]);
    putw(d, t, m, sizeof(T) * NE / 32);
  }
}
template <class T, int NE, class F>
__attribute__((noinline)) static void H2(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  if (m == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < NE; i++) d[i] = F::f(a[i], b[i]);
  } else {
    alignas(64) T t[NE];
    for (int i = 0; i < NE; i++) t[i] = F::f(a[i], b[i]);
    putw(d, t, m, sizeof(T) * NE / 32);
  }
}
template <class T, int NE, class F>
__attribute__((noinline)) static void H3(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  const T* c = REGP(T, 3);
  if (m == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < NE; i++) d[i] = F::f(a[i], b[i], c[i]);
  } else {
    alignas(64) T t[NE];
    for (int i = 0; i < NE; i++) t[i] = F::f(a[i], b[i], c[i]);
    putw(d, t, m, sizeof(T) * NE / 32);
  }
}
// D = f(A,B) with different types
template <class D, class A, class F>
__attribute__((noinline)) static void HX1(Exec&, Warp& W, const Insn& I, u32 m) {
  D* d = REGP(D, 0);
  const A* a = REGP(A, 1);
  alignas(64) D t[32];
  for (int i = 0; i < 32; i++) t[i] = F::f(a[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    putT(d, t, m);
}
template <class D, class A, class B, class F>
__attribute__((noinline)) static void HX2(Exec&, Warp& W, const Insn& I, u32 m) {
  D* d = REGP(D, 0);
  const A* a = REGP(A, 1);
  const B* b = REGP(B, 2);
  alignas(64) D t[32];
  for (int i = 0; i < 32; i++) t[i] = F::f(a[i], b[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    putT(d, t, m);
}
template <class D, class A, class B, class C, class F>
__attribute__((noinline)) static void HX3(Exec&, Warp& W, const Insn& I, u32 m) {
  D* d = REGP(D, 0);
  const A* a = REGP(A, 1);
  const B* b = REGP(B, 2);
  const C* c = REGP(C, 3);
  alignas(64) D t[32];
  for (int i = 0; i < 32; i++) t[i] = F::f(a[i], b[i], c[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    putT(d, t, m);
}

#define FN1(N, E)                        \
  template <class T>                     \
  struct N {                             \
    static inline T f(T a) { return E; } \
  };
#define FN2(N, E)                             \
  template <class T>                          \
  struct N {                                  \
    static inline T f(T a, T b) { return E; } \
  };
#define FN3(N, E)                                  \
  template <class T>                               \
  struct N {                                       \
    static inline T f(T a, T b, T c) { return E; } \
  };
FN1(Mov, a)
FN1(Neg, (T)(-a))
FN1(Not, (T)~a) FN1(CNot, (T)(a == 0)) FN1(Abs, a < 0 ? (T)(-a) : a) FN2(Add, (T)(a + b))
    FN2(Sub, (T)(a - b)) FN2(And, (T)(a & b)) FN2(Or, (T)(a | b)) FN2(Xor, (T)(a ^ b))
        FN2(Min, a < b ? a : b) FN2(Max, a > b ? a : b) template <class T>
        struct MulLo {
  static inline T f(T a, T b) { return (T)((u64)a * (u64)b); }
};
template <>
struct MulLo<u32> {
  static inline u32 f(u32 a, u32 b) { return a * b; }
};
template <class T>
struct MadLo {
  static inline T f(T a, T b, T c) { return (T)((T)((u64)a * (u64)b) + c); }
};
template <>
struct MadLo<u32> {
  static inline u32 f(u32 a, u32 b, u32 c) { return a * b + c; }
};
template <class T, class Wd>
struct MulHi {
  static inline T f(T a, T b) { return (T)(((Wd)a * (Wd)b) >> (8 * sizeof(T))); }
};
template <class T, class Wd>
struct MadHi {
  static inline T f(T a, T b, T c) { return (T)((T)(((Wd)a * (Wd)b) >> (8 * sizeof(T))) + c); }
};
template <class D, class A>
struct MulWide {
  static inline D f(A a, A b) { return (D)a * (D)b; }
};
template <class D, class A>
struct MadWide {
  static inline D f(A a, A b, D c) { return (D)((D)a * (D)b + c); }
};
FN2(UDiv, b == 0 ? (T) ~(T)0 : (T)(a / b))
FN2(URem, b == 0 ? a : (T)(a % b))
FN2(SDiv,
    b == 0 ? (T)-1 : (b == (T)-1 ? (T)(0 - (typename std::make_unsigned<T>::type)a) : (T)(a / b)))
FN2(SRem, b == 0 ? a : (b == (T)-1 ? (T)0 : (T)(a % b)))
FN3(Sad, (T)(c + (a > b ? a - b : b - a))) struct AddSatS {
  static inline s32 f(s32 a, s32 b) {
    s64 r = (s64)a + b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (s32)r;
  }
};
struct SubSatS {
  static inline s32 f(s32 a, s32 b) {
    s64 r = (s64)a - b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (s32)r;
  }
};
struct Mul24S {
  static inline s32 f(s32 a, s32 b) {
    return (s32)((u32)((s32)((u32)a << 8) >> 8) * (u32)((s32)((u32)b << 8) >> 8));
  }
};
struct Mul24U {
  static inline u32 f(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }
};
struct Mad24S {
  static inline s32 f(s32 a, s32 b, s32 c) { return (s32)((u32)Mul24S::f(a, b) + (u32)c); }
};
struct Mad24U {
  static inline u32 f(u32 a, u32 b, u32 c) { return Mul24U::f(a, b) + c; }
};
template <class T>
struct Shl {
  static inline T f(T a, u32 b) { return b >= 8 * sizeof(T) ? (T)0 : (T)(a << b); }
};
template <class T>
struct Shr {
  static inline T f(T a, u32 b) {
    if (b >= 8 * sizeof(T)) b = 8 * sizeof(T) - 1, a = (T)(std::is_signed<T>::value ? a : 0);
    return (T)(a >> b);
  }
};
template <class T>
struct Popc {
  static inline u32 f(T a) { return __builtin_popcountll((u64)a); }
};
struct Clz32 {
  static inline u32 f(u32 a) { return a ? __builtin_clz(a) : 32; }
};
struct Clz64 {
  static inline u32 f(u64 a) { return a ? __builtin_clzll(a) : 64; }
};
template <class T>
struct Brev {
  static inline T f(T a) {
    T r = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); i++) {
      r = (T)((r << 1) | (a & 1));
      a >>= 1;
    }
    return r;
  }
};
template <class T, bool S, bool SH>
struct Bfind {
  static inline u32 f(T a) {
    u64 v;
    int bits = 8 * sizeof(T);
    v = S && (a < 0) ? (u64)(typename std::make_unsigned<T>::type)(~a)
                     : (u64)(typename std::make_unsigned<T>::type)a;
    if (!v) return ~0u;
    u32 p = 63 - __builtin_clzll(v);
    return SH ? bits - 1 - p : p;
  }
};
template <class T>
struct Bfe {
  static inline T f(T a, u32 b, u32 c) {
    const int bits = 8 * sizeof(T);
    u32 pos = b & 0xff, len = c & 0xff;
    typedef typename std::make_unsigned<T>::type U;
    U ua = (U)a;
    bool sb = false;
    if (std::is_signed<T>::value && len) {
      u32 sp = pos + len - 1;
      if (sp > (u32)bits - 1) sp = bits - 1;
      sb = (ua >> sp) & 1;
    }
    U r = pos >= (u32)bits ? 0 : (U)(ua >> pos);
    u32 avail = pos >= (u32)bits ? 0 : bits - pos;
    u32 n = len < avail ? len : avail;
    U mk = n >= (u32)bits ? (U) ~(U)0 : (U)(((U)1 << n) - 1);
    r &= mk;
    if (sb) r |= (U)~mk;
    return (T)r;
  }
};
template <class T>
struct Bfi {
  static inline T f(T a, T b, u32 pos, u32 len) {
    const u32 bits = 8 * sizeof(T);
    pos &= 0xff;
    len &= 0xff;
    if (pos >= bits || !len) return b;
    u32 n = len < bits - pos ? len : bits - pos;
    T mk = (n >= bits ? (T) ~(T)0 : (T)(((T)1 << n) - 1)) << pos;
    return (T)((b & ~mk) | ((a << pos) & mk));
  }
};
template <class T>
static void h_bfi(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  const u32* p = REGP(u32, 3);
  const u32* l = REGP(u32, 4);
  T t[32];
  for (int i = 0; i < 32; i++) t[i] = Bfi<T>::f(a[i], b[i], p[i], l[i]);
  putT(d, t, m);
}
static void h_lop3(Exec&, Warp& W, const Insn& I, u32 m) {
  u32* d = REGP(u32, 0);
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2), *c = REGP(u32, 3);
  u32 L = (u32)I.imm;
  alignas(64) u32 t[32];
  u32 k[8];
  for (int j = 0; j < 8; j++) k[j] = (L >> j & 1) ? ~0u : 0;
  for (int i = 0; i < 32; i++) {
    u32 A = a[i], B = b[i], C = c[i];
    t[i] = (k[0] & ~A & ~B & ~C) | (k[1] & ~A & ~B & C) | (k[2] & ~A & B & ~C) |
           (k[3] & ~A & B & C) | (k[4] & A & ~B & ~C) | (k[5] & A & ~B & C) | (k[6] & A & B & ~C) |
           (k[7] & A & B & C);
  }
  put<u32>(d, t, m);
}
template <bool L, bool WRAP>
struct Shf {
  static inline u32 f(u32 a, u32 b, u32 c) {
    u64 v = ((u64)b << 32) | a;
    u32 n = WRAP ? c & 31 : (c > 32 ? 32 : c);
    return L ? (u32)((v << n) >> 32) : (u32)(v >> n);
  }
};
static inline u32 prmt1(u32 a, u32 b, u32 c, int mode) {
  u64 v = ((u64)b << 32) | a;
  u32 sel[4];
  u32 q = c & 3;
  switch (mode) {
    case 0:
      for (int i = 0; i < 4; i++) sel[i] = (c >> (4 * i)) & 0xf;
      break;
    case 1:
      for (int i = 0; i < 4; i++) sel[i] = q + i;
      break;  // f4e
    case 2:
      for (int i = 0; i < 4; i++) sel[i] = (q + 8 - i) & 7;
      break;  // b4e
    case 3:
      for (int i = 0; i < 4; i++) sel[i] = q;
      break;  // rc8
    case 4:
      for (int i = 0; i < 4; i++) sel[i] = (u32)i < q ? q : i;
      break;  // ecl
    case 5:
      for (int i = 0; i < 4; i++) sel[i] = (u32)i > q ? q : i;
      break;  // ecr
    default: {
      u32 h = c & 1;
      sel[0] = 2 * h;
      sel[1] = 2 * h + 1;
      sel[2] = 2 * h;
      sel[3] = 2 * h + 1;
    }
  }
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 by = (u32)(v >> (8 * (sel[i] & 7))) & 0xff;
    if (mode == 0 && (sel[i] & 8)) by = (by & 0x80) ? 0xff : 0;
    r |= by << (8 * i);
  }
  return r;
}
static void h_prmt(Exec&, Warp& W, const Insn& I, u32 m) {
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2), *c = REGP(u32, 3);
  alignas(64) u32 t[32];
  for (int i = 0; i < 32; i++) t[i] = prmt1(a[i], b[i], c[i], I.sub);
  put<u32>(REGP(u32, 0), t, m);
}
static void h_dp4a(Exec&, Warp& W, const Insn& I, u32 m) {
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2), *c = REGP(u32, 3);
  alignas(64) u32 t[32];
  for (int i = 0; i < 32; i++) {
    u32 s = c[i];
    for (int j = 0; j < 4; j++) {
      s32 x = (I.sub & 1) ? (s8)(a[i] >> 8 * j) : (u8)(a[i] >> 8 * j),
          y = (I.sub & 2) ? (s8)(b[i] >> 8 * j) : (u8)(b[i] >> 8 * j);
      s += (u32)(x * y);
    }
    t[i] = s;
  }
  put<u32>(REGP(u32, 0), t, m);
}
static void h_dp2a(Exec&, Warp& W, const Insn& I, u32 m) {
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2), *c = REGP(u32, 3);
  alignas(64) u32 t[32];
  for (int i = 0; i < 32; i++) {
    u32 s = c[i];
    for (int j = 0; j < 2; j++) {
      int k = j + ((I.sub & 4) ? 2 : 0);
      s64 x = (I.sub & 1) ? (s16)(a[i] >> 16 * j) : (u16)(a[i] >> 16 * j),
          y = (I.sub & 2) ? (s8)(b[i] >> 8 * k) : (u8)(b[i] >> 8 * k);
      s += (u32)(x * y);
    }
    t[i] = s;
  }
  put<u32>(REGP(u32, 0), t, m);
}
// extended precision: sub bits: 1 carry-in, 2 carry-out(write CC); op in sub2: 0 add, 1 sub, 2
// mad.lo, 3 mad.hi
template <class T, class Wd>
static void h_xprec(Exec&, Warp& W, const Insn& I, u32 m) {
  typedef typename std::make_unsigned<T>::type U;
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  const T* c = I.sub2 >= 2 ? REGP(T, 3) : a;
  u32 cc = W.cc;
  FORM(m, i) {
    U x, y;
    u32 ci = (I.sub & 1) ? (cc >> i) & 1 : 0;
    bool co;
    U r;
    if (I.sub2 >= 2) {
      Wd p = (Wd)a[i] * (Wd)b[i];
      x = I.sub2 == 2 ? (U)p : (U)(p >> (8 * sizeof(T)));
      y = (U)c[i];
    } else {
      x = (U)a[i];
      y = (U)b[i];
    }
    if (I.sub2 == 1) {
      u128 t = (u128)x - (u128)y - ci;
      r = (U)t;
      co = (u128)x < (u128)y + ci;
    } else {
      u128 t = (u128)x + y + ci;
      r = (U)t;
      co = (t >> (8 * sizeof(T))) & 1;
    }
    d[i] = (T)r;
    if (I.sub & 2) W.cc = (W.cc & ~(1u << i)) | ((u32)co << i);
  }
}
