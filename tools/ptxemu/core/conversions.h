// Handlers of mov with packed operands and of cvt.
#pragma once
#include "predicates.h"

// ---------------------------------------------------------------- mov pack/unpack
static void h_pack(Exec& X, Warp& W, const Insn& I, u32 m) {
  const u32* ex = &X.K->ext[I.x];
  int ew = I.sz, n = I.vn, dw = I.dw;
  u8* d = W.r + I.o[0];
  FORM(m, i) {
    u8 b[16];
    for (int j = 0; j < n; j++) {
      if (ew == 8)
        memcpy(b + 8 * j, W.r + ex[j] + 8 * i, 8);
      else {
        u64 v = rdReg(W.r + ex[j], ew < 2 ? 2 : ew, i);
        memcpy(b + ew * j, &v, ew);
      }
    }
    memcpy(d + (u64)dw * i, b, dw);
  }
}
static void h_unpack(Exec& X, Warp& W, const Insn& I, u32 m) {
  const u32* ex = &X.K->ext[I.x];
  int ew = I.sz, n = I.vn, sw = I.dw;
  u8* s = W.r + I.o[0];
  FORM(m, i) {
    u8 b[16];
    memcpy(b, s + (u64)sw * i, sw);
    for (int j = 0; j < n; j++)
      if (ex[j] != NOP_) {
        if (ew == 8)
          memcpy(W.r + ex[j] + 8 * i, b + 8 * j, 8);
        else {
          u64 v = rdN(b + ew * j, ew);
          wrReg(W.r + ex[j], ew < 2 ? 2 : ew, i, v);
        }
      }
  }
}
static void h_mov16(Exec&, Warp& W, const Insn& I, u32 m) {
  FORM(m, i) memcpy(W.r + I.o[0] + 16 * i, W.r + I.o[1] + 16 * i, 16);
}
static void h_clock(Exec& X, Warp& W, const Insn& I, u32 m) {
  FORM(m, i) wrReg(W.r + I.o[0], I.dw, i, W.icount + X.totalInsns);
}
static void h_nop(Exec&, Warp&, const Insn&, u32) {}
static void h_addimm(Exec&, Warp& W, const Insn& I, u32 m) {
  const u8* a = W.r + I.o[1];
  FORM(m, i) wrReg(W.r + I.o[0], I.dw, i, rdReg(a, I.dw, i) + I.imm);
}
static void h_isspacep(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 r = 0;
  const u64* a = REGP(u64, 1);
  FORM(m, i) {
    int s = I.aw == 8 ? spaceOf(a[i]) : SP_GLOBAL;
    bool b = s == I.space;
    r |= (u32)b << i;
  }
  putP(W, I.o[0], r, m);
}

// ---------------------------------------------------------------- cvt (generic, per lane)
struct CvtP {
  Ty d, s;
  int rm;
  bool intround, sat, relu, ftz, satfin;
};  // rm: 0 rn 1 rz 2 rm 3 rp 4 rna(ties away)
static inline bool isF(Ty t) {
  return t == T_F16 || t == T_BF16 || t == T_F32 || t == T_F64 || t == T_TF32;
}
static inline bool isS(Ty t) { return t == T_S8 || t == T_S16 || t == T_S32 || t == T_S64; }
static int tsize(Ty t) {
  switch (t) {
    case T_B8:
    case T_U8:
    case T_S8:
      return 1;
    case T_B16:
    case T_U16:
    case T_S16:
    case T_F16:
    case T_BF16:
    case T_E4M3X2:
    case T_E5M2X2:
      return 2;
    case T_B64:
    case T_U64:
    case T_S64:
    case T_F64:
      return 8;
    case T_B128:
      return 16;
    case T_PRED:
      return 0;
    default:
      return 4;
  }
}
static u64 cvt1(u64 v, Ty d, Ty s, int rm, bool ir, bool sat, bool relu, bool ftz) {
  if (isF(s)) {
    double x;
    switch (s) {
      case T_F16:
        x = h2f((u16)v);
        break;
      case T_BF16:
        x = b2f((u16)v);
        break;
      case T_F32:
      case T_TF32: {
        float f = bitsf((u32)v);
        if (ftz && std::fpclassify(f) == FP_SUBNORMAL) f = std::copysign(0.f, f);
        x = f;
        break;
      }
      default:
        x = bitsd(v);
    }
    if (isF(d)) {
      if (ir) {
        x = rm == 0   ? std::nearbyint(x)
            : rm == 1 ? std::trunc(x)
            : rm == 2 ? std::floor(x)
                      : std::ceil(x);
      }
      if (sat) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : (x == 0 ? 0 : x);
      if (relu) x = x != x ? x : x < 0 ? 0 : x;
      switch (d) {
        case T_F64:
          return dbits(x);
        case T_F32: {
          if (s != T_F64) return fbits((float)x);
          float f;
          static const u32 rc[4] = {0, 0x6000, 0x2000, 0x4000};
          setCsr(rc[rm & 3]);
          volatile double xv = x;
          volatile float fv = (float)xv;
          f = fv;
          setCsr(0);
          if (ftz && std::fpclassify(f) == FP_SUBNORMAL) f = std::copysign(0.f, f);
          return fbits(f);
        }
        case T_TF32: {
          u32 b = fbits((float)x);
          if (x != x) return 0x7fffffff;
          u32 lo = b & 0x1fff;
          b &= ~0x1fffu;
          if (std::isinf(x)) return b;
          if (rm == 4) {
            if (lo >= 0x1000) b += 0x2000;
          } else if (rm == 0) {
            if (lo > 0x1000 || (lo == 0x1000 && (b & 0x2000))) b += 0x2000;
          }
          return b;
        }
        case T_F16:
          if (x != x) return 0x7fff;
          return f2h(s == T_F64 ? d2f_odd(x) : (float)x, rm);
        case T_BF16:
          return f2b(s == T_F64 ? d2f_odd(x) : (float)x, rm);
        default:
          return 0;
      }
    }
    int bits = tsize(d) * 8;
    bool sg = isS(d);
    if (x != x)
      return (bits == 64) ? 0x8000000000000000ull : (s == T_F64 && bits == 32 ? 0x80000000u : 0);
    x = rm == 0   ? std::nearbyint(x)
        : rm == 1 ? std::trunc(x)
        : rm == 2 ? std::floor(x)
                  : std::ceil(x);
    if (sg) {
      double lim = std::ldexp(1.0, bits - 1);
      if (x >= lim) return bits == 64 ? 0x7fffffffffffffffull : ((1ull << (bits - 1)) - 1);
      if (x < -lim) return bits == 64 ? 0x8000000000000000ull : (u64)(-(s64)(1ull << (bits - 1)));
      return (u64)(s64)x;
    }
    double lim = std::ldexp(1.0, bits);
    if (x <= 0) return 0;
    if (x >= lim) return bits == 64 ? ~0ull : ((1ull << bits) - 1);
    return (u64)x;
  }
  int sb = tsize(s);
  bool ss = isS(s);
  v = ss ? sext(v, sb) : (sb == 8 ? v : v & ((1ull << 8 * sb) - 1));
  if (isF(d)) {
    static const u32 rc[5] = {0, 0x6000, 0x2000, 0x4000, 0};
    if (d == T_F64) {
      setCsr(rc[rm]);
      volatile u64 vv = v;
      volatile double r = ss ? (double)(s64)vv : (double)vv;
      setCsr(0);
      double q = r;
      return dbits(q);
    }
    if (d == T_F32) {
      setCsr(rc[rm]);
      volatile u64 vv = v;
      volatile float r = ss ? (float)(s64)vv : (float)vv;
      setCsr(0);
      float q = r;
      return fbits(q);
    }
    // int -> half: go through a double rounded to odd (exact for <=53 bits; wider ints overflow or
    // are rounded to odd first)
    double x;
    u64 mag = ss && (s64)v < 0 ? (u64)(-(s64)v) : v;
    if (mag >> 53) {
      int sh = 11;
      mag = (mag >> sh << sh) | ((mag & ((1ull << sh) - 1)) ? (1ull << sh) : 0);
    }
    x = (double)mag;
    if (ss && (s64)v < 0) x = -x;
    float f = d2f_odd(x);
    return d == T_F16 ? f2h(f, rm) : f2b(f, rm);
  }
  if (sat) {
    int bits = tsize(d) * 8;
    if (isS(d)) {
      s128 lo = -((s128)1 << (bits - 1)), hi = ((s128)1 << (bits - 1)) - 1;
      s128 x = ss ? (s128)(s64)v : (s128)v;
      return (u64)(s64)(x < lo ? lo : x > hi ? hi : x);
    }
    u128 hi = ((u128)1 << bits) - 1;
    if (ss && (s64)v < 0) return 0;
    return (u128)v > hi ? (u64)hi : v;
  }
  int db = tsize(d);
  if (db < 8) {
    v &= (1ull << 8 * db) - 1;
    if (isS(d)) v = sext(v, db);
  }
  return v;
}
// flags bits: 1 intround 2 sat 4 relu 8 ftz ; sub = rm ; ty = d, ty2 = s ; dw dest reg width ; sz
// src reg width
static void h_cvt(Exec&, Warp& W, const Insn& I, u32 m) {
  u8* d = W.r + I.o[0];
  const u8* s = W.r + I.o[1];
  FORM(m, i)
  wrReg(d, I.dw, i,
        cvt1(rdReg(s, I.sz, i), (Ty)I.ty, (Ty)I.ty2, I.sub, I.flags & 1, I.flags & 2, I.flags & 4,
             I.flags & 8));
}
static void h_cvt_pack2(Exec&, Warp& W, const Insn& I, u32 m) {
  u32* d = REGP(u32, 0);
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2);
  FORM(m, i) {
    u32 hi = (u32)cvt1(a[i], (Ty)I.ty, T_F32, I.sub, false, false, I.flags & 4, false),
        lo = (u32)cvt1(b[i], (Ty)I.ty, T_F32, I.sub, false, false, I.flags & 4, false);
    d[i] = (hi << 16) | (lo & 0xffff);
  }
}
template <class D, class S>
struct Cast {
  static inline D f(S a) { return (D)a; }
};
struct F2S32rz {
  static inline s32 f(float a) {
    return a != a ? 0 : a >= 2147483648.f ? INT32_MAX : a < -2147483648.f ? INT32_MIN : (s32)a;
  }
};
struct H2F {
  static inline float f(u16 a) { return h2f(a); }
};
struct B2F {
  static inline float f(u16 a) { return b2f(a); }
};
struct F2H {
  static inline u16 f(float a) { return a != a ? 0x7fff : f2h_rn(a); }
};
struct F2B {
  static inline u16 f(float a) { return f2b(a); }
};
struct FloorF {
  static inline float f(float a) { return floorf(a); }
};
struct RintF {
  static inline float f(float a) { return nearbyintf(a); }
};
struct TruncF {
  static inline float f(float a) { return truncf(a); }
};
struct CeilF {
  static inline float f(float a) { return ceilf(a); }
};
