// Handlers of setp, selp and their relatives.
#pragma once
#include <type_traits>

#include "floats.h"

// ---------------------------------------------------------------- setp / selp
enum {
  CMP_EQ,
  CMP_NE,
  CMP_LT,
  CMP_LE,
  CMP_GT,
  CMP_GE,
  CMP_EQU,
  CMP_NEU,
  CMP_LTU,
  CMP_LEU,
  CMP_GTU,
  CMP_GEU,
  CMP_NUM,
  CMP_NAN
};
template <int C, class T>
static inline bool cmp1(T a, T b) {
  switch (C) {
    case CMP_EQ:
      return a == b;
    case CMP_NE:
      return (a < b) || (a > b);
    case CMP_LT:
      return a < b;
    case CMP_LE:
      return a <= b;
    case CMP_GT:
      return a > b;
    case CMP_GE:
      return a >= b;
    case CMP_EQU:
      return !((a < b) || (a > b));
    case CMP_NEU:
      return !(a == b);
    case CMP_LTU:
      return !(a >= b);
    case CMP_LEU:
      return !(a > b);
    case CMP_GTU:
      return !(a <= b);
    case CMP_GEU:
      return !(a < b);
    case CMP_NUM:
      return a == a && b == b;
    default:
      return a != a || b != b;
  }
}
struct HTag {
  u16 v;
  float g() const { return h2f(v); }
};
struct BTag {
  u16 v;
  float g() const { return b2f(v); }
};
// A bit for each lane: half precision is compared as fp32.
template <int C, class T>
static u32 cmpMask(const void* pa, const void* pb) {
  const T* a = (const T*)pa;
  const T* b = (const T*)pb;
  if constexpr (std::is_arithmetic_v<T>) {
    alignas(32) u8 t[32];
    for (int i = 0; i < 32; i++) t[i] = cmp1<C, T>(a[i], b[i]) ? 0xff : 0;
    return (u32)_mm256_movemask_epi8(*(__m256i*)t);
  } else {
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= (u32)cmp1<C, float>(a[i].g(), b[i].g()) << i;
    return r;
  }
}
typedef u32 (*CmpFn)(const void*, const void*);
template <class T>
static CmpFn pickCmp(int c) {
  switch (c) {
#define CC(x) \
  case x:     \
    return cmpMask<x, T>;
    CC(CMP_EQ)
    CC(CMP_NE)
    CC(CMP_LT) CC(CMP_LE) CC(CMP_GT) CC(CMP_GE) CC(CMP_EQU) CC(CMP_NEU) CC(CMP_LTU) CC(CMP_LEU)
        CC(CMP_GTU) CC(CMP_GEU) CC(CMP_NUM) CC(CMP_NAN)
  }
  return nullptr;
}
#undef CC
static CmpFn cmpFor(int c, Ty t) {
  switch (t) {
    case T_U8:
    case T_B8:
    case T_B16:
    case T_U16:
      return pickCmp<u16>(c);
    case T_S16:
      return pickCmp<s16>(c);
    case T_B32:
    case T_U32:
      return pickCmp<u32>(c);
    case T_S32:
      return pickCmp<s32>(c);
    case T_B64:
    case T_U64:
      return pickCmp<u64>(c);
    case T_S64:
      return pickCmp<s64>(c);
    case T_F32:
      return pickCmp<float>(c);
    case T_F64:
      return pickCmp<double>(c);
    case T_F16:
      return pickCmp<HTag>(c);
    case T_BF16:
      return pickCmp<BTag>(c);
    default:
      return nullptr;
  }
}
static inline void putP(Warp& W, u32 off, u32 v, u32 m) {
  u32& p = *(u32*)(W.r + off);
  p = (p & ~m) | (v & m);
}
static inline void putPair(Warp& W, const Insn& I, u32 r, u32 q, u32 m) {
  if (I.o[0] != NOP_) putP(W, I.o[0], r, m);
  if (I.o[1] != NOP_) putP(W, I.o[1], q, m);
}
// What .and, .or and .xor make of both results and a predicate, which may be negated.
static inline void combine(Warp& W, const Insn& I, u32& r, u32& q) {
  if (!I.sub) return;
  u32 c = *(u32*)(W.r + I.o[4]);
  if (I.sub2) c = ~c;
  if (I.sub == 1)
    r &= c, q &= c;
  else if (I.sub == 2)
    r |= c, q |= c;
  else
    r ^= c, q ^= c;
}
// Packed halves: `r` of the low ones, `q` of the high ones.
static inline void compareHalves(Warp& W, const Insn& I, u32& r, u32& q) {
  alignas(64) u16 al[32], ah[32], bl[32], bh[32];
  const u32 *a = (u32*)(W.r + I.o[2]), *b = (u32*)(W.r + I.o[3]);
  for (int i = 0; i < 32; i++) {
    al[i] = a[i];
    ah[i] = a[i] >> 16;
    bl[i] = b[i];
    bh[i] = b[i] >> 16;
  }
  r = ((CmpFn)I.fn2)(al, bl), q = ((CmpFn)I.fn2)(ah, bh);
}
// o0 = p, o1 = q (or NOP_), o2,o3 = a,b; o4 = c pred; sub: 0 none 1 and 2 or 3 xor ; sub2: negate
// c.  fn2 = CmpFn
static void h_setp(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 r = ((CmpFn)I.fn2)(W.r + I.o[2], W.r + I.o[3]), q = ~r;
  combine(W, I, r, q);
  putPair(W, I, r, q, m);
}
static void h_setp_ftz(Exec& X, Warp& W, const Insn& I, u32 m) {
  setCsr(0x8040);
  h_setp(X, W, I, m);
  setCsr(0);
}
static void h_setp_x2(Exec&, Warp& W, const Insn& I,
                      u32 m) {  // packed half compare: p from low, q from high
  u32 r, q;
  compareHalves(W, I, r, q);
  combine(W, I, r, q);
  putPair(W, I, r, q, m);
}
// set: ty = dst kind 0: all-ones int32, 1: float 1.0, 2: half 1.0 (f16), 3: bf16 1.0, 4: f16x2 5:
// bf16x2, 6: 16-bit int ones
static void h_set(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 r, q = 0;
  if (I.ty2)
    compareHalves(W, I, r, q);
  else
    r = ((CmpFn)I.fn2)(W.r + I.o[2], W.r + I.o[3]);
  combine(W, I, r, q);
  u8* d = W.r + I.o[0];
  FORM(m, i) {
    bool v = r >> i & 1, w = q >> i & 1;
    switch (I.ty) {
      case 0:
        ((u32*)d)[i] = v ? ~0u : 0;
        break;
      case 1:
        ((float*)d)[i] = v;
        break;
      case 2:
        ((u16*)d)[i] = v ? 0x3c00 : 0;
        break;
      case 3:
        ((u16*)d)[i] = v ? 0x3f80 : 0;
        break;
      case 4:
        ((u32*)d)[i] = (v ? 0x3c00u : 0) | (w ? 0x3c000000u : 0);
        break;
      case 5:
        ((u32*)d)[i] = (v ? 0x3f80u : 0) | (w ? 0x3f800000u : 0);
        break;
      case 6:
        ((u16*)d)[i] = v ? 0xffff : 0;
        break;
      case 7:
        ((u32*)d)[i] = (v ? 0xffffu : 0) | (w ? 0xffff0000u : 0);
        break;
    }
  }
}
template <class T>
static void h_selp(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  u32 p = *(u32*)(W.r + I.o[3]);
  if (I.sub2) p = ~p;
  alignas(64) T t[32];
  for (int i = 0; i < 32; i++) t[i] = (p >> i & 1) ? a[i] : b[i];
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    putT(d, t, m);
}
template <class T, bool FL>
static void h_slct(Exec&, Warp& W, const Insn& I, u32 m) {
  T* d = REGP(T, 0);
  const T* a = REGP(T, 1);
  const T* b = REGP(T, 2);
  FORM(m, i) {
    bool ge = FL ? (REGP(float, 3)[i] >= 0) : (REGP(s32, 3)[i] >= 0);
    d[i] = ge ? a[i] : b[i];
  }
}
// predicate logic: sub 0 mov 1 and 2 or 3 xor 4 not ; negs in sub2 bit0/bit1
static void h_pred(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 a = *(u32*)(W.r + I.o[1]), b = (I.sub >= 1 && I.sub <= 3) ? *(u32*)(W.r + I.o[2]) : 0;
  if (I.sub2 & 1) a = ~a;
  if (I.sub2 & 2) b = ~b;
  u32 r = a;
  switch (I.sub) {
    case 1:
      r = a & b;
      break;
    case 2:
      r = a | b;
      break;
    case 3:
      r = a ^ b;
      break;
    case 4:
      r = ~a;
  }
  putP(W, I.o[0], r, m);
}
static void h_testp(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 r = 0;
  FORM(m, i) {
    double v = I.ty == T_F32 ? REGP(float, 1)[i] : REGP(double, 1)[i];
    int c = I.ty == T_F32 ? std::fpclassify(REGP(float, 1)[i]) : std::fpclassify(v);
    bool b = false;
    switch (I.sub) {
      case 0:
        b = std::isfinite(v);
        break;
      case 1:
        b = std::isinf(v);
        break;
      case 2:
        b = !std::isnan(v);
        break;
      case 3:
        b = std::isnan(v);
        break;
      case 4:
        b = c == FP_NORMAL || c == FP_ZERO;
        break;
      case 5:
        b = c == FP_SUBNORMAL;
        break;
    }
    r |= (u32)b << i;
  }
  putP(W, I.o[0], r, m);
}
