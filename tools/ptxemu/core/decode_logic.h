// Decodes bits, predicates and conversions.
#pragma once
#include "decoder.h"

inline void Decoder::decodeAnd() {
  t = m.ty();
  m.done();
  int k = b == "and" ? 1 : b == "or" ? 2 : b == "xor" ? 3 : 4;
  if (t == T_PRED) {
    I.cls = C_PRED;
    I.sub = k;
    I.o[0] = dst(o[0], 0);
    I.o[1] = src(o[1], 0);
    I.sub2 = o[1].neg;
    if (k != 4) {
      need(3);
      I.o[2] = src(o[2], 0);
      I.sub2 |= o[2].neg ? 2 : 0;
    }
    I.fn = h_pred;
    return;
  }
  I.cls = C_INT;
  W_ = regW(t);
  if (k == 4) {
    std1(W_);
    I.fn = SELI(1, Not);
  } else {
    std2(W_);
    I.fn = k == 1 ? SELI(2, And) : k == 2 ? SELI(2, Or) : SELI(2, Xor);
  }
  return;
}

inline void Decoder::decodeCnot() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  W_ = tsize(t);
  std1(W_);
  I.fn = SELI(1, CNot);
  return;
}

inline void Decoder::decodeLop3() {
  t = m.ty();
  m.done();
  need(5);
  I.cls = C_INT;
  for (int i = 0; i < 4; i++) I.o[i] = i ? src(o[i], 4) : dst(o[0], 4);
  I.imm = o[4].u;
  I.fn = h_lop3;
  return;
}

inline void Decoder::decodeShl() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  int w = tsize(t);
  take({w, w, 4});
  bool s = isS(t);
  if (b == "shl")
    I.fn = w == 2   ? (Fn)HX2<u16, u16, u32, Shl<u16>>
           : w == 4 ? (Fn)HX2<u32, u32, u32, Shl<u32>>
                    : (Fn)HX2<u64, u64, u32, Shl<u64>>;
  else
    I.fn = w == 2   ? (s ? (Fn)HX2<s16, s16, u32, Shr<s16>> : (Fn)HX2<u16, u16, u32, Shr<u16>>)
           : w == 4 ? (s ? (Fn)HX2<s32, s32, u32, Shr<s32>> : (Fn)HX2<u32, u32, u32, Shr<u32>>)
                    : (s ? (Fn)HX2<s64, s64, u32, Shr<s64>> : (Fn)HX2<u64, u64, u32, Shr<u64>>);
  return;
}

inline void Decoder::decodeShf() {
  bool l = m.has("l"), r = m.has("r"), wr = m.has("wrap"), cl = m.has("clamp");
  m.ty();
  m.done();
  if (l == r || wr == cl) unsupp("shf modifiers");
  std3(4);
  I.cls = C_INT;
  I.fn = l ? (wr ? (Fn)H3<u32, 32, Shf<true, true>> : (Fn)H3<u32, 32, Shf<true, false>>)
           : (wr ? (Fn)H3<u32, 32, Shf<false, true>> : (Fn)H3<u32, 32, Shf<false, false>>);
  return;
}

inline void Decoder::decodePopc() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  int w = tsize(t);
  take({4, w});
  I.fn = b == "popc" ? (w == 4 ? (Fn)HX1<u32, u32, Popc<u32>> : (Fn)HX1<u32, u64, Popc<u64>>)
                     : (w == 4 ? (Fn)HX1<u32, u32, Clz32> : (Fn)HX1<u32, u64, Clz64>);
  return;
}

inline void Decoder::decodeBrev() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  std1(tsize(t));
  I.fn = tsize(t) == 4 ? (Fn)H1<u32, 32, Brev<u32>> : (Fn)H1<u64, 32, Brev<u64>>;
  return;
}

inline void Decoder::decodeBfind() {
  bool sh = m.has("shiftamt");
  t = m.ty();
  m.done();
  I.cls = C_INT;
  take({4, (int)tsize(t)});
  switch (t) {
    case T_U32:
      I.fn = sh ? (Fn)HX1<u32, u32, Bfind<u32, false, true>>
                : (Fn)HX1<u32, u32, Bfind<u32, false, false>>;
      break;
    case T_S32:
      I.fn = sh ? (Fn)HX1<u32, s32, Bfind<s32, true, true>>
                : (Fn)HX1<u32, s32, Bfind<s32, true, false>>;
      break;
    case T_U64:
      I.fn = sh ? (Fn)HX1<u32, u64, Bfind<u64, false, true>>
                : (Fn)HX1<u32, u64, Bfind<u64, false, false>>;
      break;
    case T_S64:
      I.fn = sh ? (Fn)HX1<u32, s64, Bfind<s64, true, true>>
                : (Fn)HX1<u32, s64, Bfind<s64, true, false>>;
      break;
    default:
      unsupp("type");
  }
  return;
}

inline void Decoder::decodeBfe() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  int w = tsize(t);
  take({w, w, 4, 4});
  I.fn = t == T_U32   ? (Fn)HX3<u32, u32, u32, u32, Bfe<u32>>
         : t == T_S32 ? (Fn)HX3<s32, s32, u32, u32, Bfe<s32>>
         : t == T_U64 ? (Fn)HX3<u64, u64, u32, u32, Bfe<u64>>
                      : (Fn)HX3<s64, s64, u32, u32, Bfe<s64>>;
  return;
}

inline void Decoder::decodeBfi() {
  t = m.ty();
  m.done();
  I.cls = C_INT;
  int w = tsize(t);
  take({w, w, w, 4, 4});
  I.fn = w == 4 ? (Fn)h_bfi<u32> : (Fn)h_bfi<u64>;
  return;
}

inline void Decoder::decodePrmt() {
  m.ty();
  static const char* N[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (int i = 1; i < 7; i++)
    if (m.has(N[i])) I.sub = i;
  m.done();
  std3(4);
  I.cls = C_INT;
  I.fn = h_prmt;
  return;
}

inline void Decoder::decodeDp4a() {
  bool hi = m.has("hi");
  m.has("lo");
  Ty a = m.ty(), c = m.ty();
  m.done();
  std3(4);
  I.cls = C_INT;
  I.sub = (isS(a) ? 1 : 0) | (isS(c) ? 2 : 0) | (hi ? 4 : 0);
  I.fn = b == "dp4a" ? h_dp4a : h_dp2a;
  return;
}

inline void Decoder::decodeSetp() {
  if (m.m.size() < 3) unsupp("modifiers");
  int c = cmpCode(m.m[1]);
  if (c < 0) unsupp("comparison .%s", m.m[1].c_str());
  m.used[1] = 1;
  I.cls = C_PRED;
  I.sub = m.has("and") ? 1 : m.has("or") ? 2 : m.has("xor") ? 3 : 0;
  bool ftz = m.has("ftz");
  (void)ftz;
  // Both operands of the comparison, and the predicate that it is combined with.
  auto compared = [&](Ty t) {
    int w = regW(t);
    I.o[2] = src(o[1], w, isB(t) ? T_BF16 : t);
    I.o[3] = src(o[2], w, isB(t) ? T_BF16 : t);
    if (I.sub) {
      I.o[4] = src(o[3], 0);
      I.sub2 = o[3].neg;
    }
    CmpFn f = cmpFor(c, isX2(t) ? (t == T_F16X2 ? T_F16 : T_BF16) : t);
    if (!f) unsupp("compare type");
    I.fn2 = (Fn)f;
  };
  if (b == "setp") {
    t = m.ty();
    m.done();
    if (o.size() != (I.sub ? 4u : 3u)) unsupp("operand count");
    I.o[0] = dstP(o[0]);
    I.o[1] = pq.empty() ? NOP_ : dstP(pq[0]);
    compared(t);
    I.fn = isX2(t) ? h_setp_x2 : h_setp;
    if (ftz && t == T_F32) I.fn = h_setp_ftz;
    return;
  }
  Ty d = m.ty(), s = m.ty();
  m.done();
  if (s == T_NONE) {
    s = d;
  }
  if (o.size() != (I.sub ? 4u : 3u)) unsupp("operand count");
  I.ty2 = isX2(s);
  compared(s);
  I.fn = h_set;
  I.o[0] = dst(o[0], regW(d));
  I.ty = d == T_F32                   ? 1
         : d == T_F16                 ? 2
         : d == T_BF16                ? 3
         : d == T_F16X2               ? 4
         : d == T_BF16X2              ? 5
         : (d == T_U16 || d == T_S16) ? 6
         : (d == T_U32 || d == T_S32) ? (isX2(s) ? 7 : 0)
                                      : 255;
  if (I.ty == 255) unsupp("set destination type");
  return;
}

inline void Decoder::decodeSelp() {
  t = m.ty();
  m.done();
  need(4);
  I.cls = C_PRED;
  int w = regW(t);
  I.o[0] = dst(o[0], w);
  I.o[1] = src(o[1], w, t);
  I.o[2] = src(o[2], w, t);
  I.o[3] = src(o[3], 0);
  I.sub2 = o[3].neg;
  I.fn = w == 2 ? h_selp<u16> : w == 4 ? h_selp<u32> : h_selp<u64>;
  return;
}

inline void Decoder::decodeSlct() {
  m.has("ftz");
  t = m.ty();
  Ty s = m.ty();
  m.done();
  need(4);
  I.cls = C_PRED;
  int w = regW(t);
  I.o[0] = dst(o[0], w);
  I.o[1] = src(o[1], w, t);
  I.o[2] = src(o[2], w, t);
  I.o[3] = src(o[3], 4, s);
  bool f = s == T_F32;
  I.fn = w == 2   ? (f ? (Fn)h_slct<u16, true> : (Fn)h_slct<u16, false>)
         : w == 4 ? (f ? (Fn)h_slct<u32, true> : (Fn)h_slct<u32, false>)
                  : (f ? (Fn)h_slct<u64, true> : (Fn)h_slct<u64, false>);
  return;
}

inline void Decoder::decodeCvt() {
  I.cls = C_CVT;
  bool intr = false;
  int rm = -1;
  if (m.has("rni"))
    rm = 0, intr = true;
  else if (m.has("rzi"))
    rm = 1, intr = true;
  else if (m.has("rmi"))
    rm = 2, intr = true;
  else if (m.has("rpi"))
    rm = 3, intr = true;
  else if (m.has("rn"))
    rm = 0;
  else if (m.has("rz"))
    rm = 1;
  else if (m.has("rm"))
    rm = 2;
  else if (m.has("rp"))
    rm = 3;
  else if (m.has("rna"))
    rm = 4;
  bool ftz = m.has("ftz"), sat = m.has("sat"), relu = m.has("relu");
  if (m.has("pack")) unsupp("cvt.pack");
  if (m.has("satfinite")) unsupp(".satfinite");
  Ty d = m.ty(), s = m.ty();
  m.done();
  if (d == T_NONE || s == T_NONE) unsupp("cvt type");
  I.sub = rm < 0 ? 0 : rm;
  I.flags = (intr ? 1 : 0) | (sat ? 2 : 0) | (relu ? 4 : 0) | (ftz ? 8 : 0);
  if (isX2(d)) {
    need(3);
    if (s != T_F32) unsupp("packed cvt source");
    I.ty = d == T_F16X2 ? T_F16 : T_BF16;
    I.o[0] = dst(o[0], 4);
    I.o[1] = src(o[1], 4, T_F32);
    I.o[2] = src(o[2], 4, T_F32);
    I.fn = h_cvt_pack2;
    return;
  }
  need(2);
  I.ty = d;
  I.ty2 = s;
  int sw, dwid;
  I.o[1] = srcAny(o[1], sw, regW(s));
  if (o[0].k != Opnd::REG) unsupp("cvt destination");
  dwid = o[0].w;
  I.o[0] = o[0].off;
  if (dwid == 0 || sw == 0 || dwid < tsize(d) || sw < tsize(s)) unsupp("cvt register width");
  I.dw = dwid;
  I.sz = sw;
  I.fn = h_cvt;
  if (sw == regW(s) && dwid == regW(d) && !ftz && !sat && !relu) {  // fast paths
    if (d == T_F32 && s == T_S32 && rm == 0)
      I.fn = HX1<float, s32, Cast<float, s32>>;
    else if (d == T_F32 && s == T_U32 && rm == 0)
      I.fn = HX1<float, u32, Cast<float, u32>>;
    else if (d == T_S32 && s == T_F32 && rm == 1)
      I.fn = HX1<s32, float, F2S32rz>;
    else if (d == T_F64 && s == T_F32)
      I.fn = HX1<double, float, Cast<double, float>>;
    else if (d == T_F32 && s == T_F64 && rm == 0)
      I.fn = HX1<float, double, Cast<float, double>>;
    else if (d == T_F64 && s == T_S32)
      I.fn = HX1<double, s32, Cast<double, s32>>;
    else if (d == T_F32 && s == T_F16)
      I.fn = HX1<float, u16, H2F>;
    else if (d == T_F32 && s == T_BF16)
      I.fn = HX1<float, u16, B2F>;
    else if (d == T_F16 && s == T_F32 && rm == 0)
      I.fn = HX1<u16, float, F2H>;
    else if (d == T_BF16 && s == T_F32 && rm == 0)
      I.fn = HX1<u16, float, F2B>;
    else if ((d == T_U64 || d == T_S64 || d == T_B64) && s == T_U32)
      I.fn = HX1<u64, u32, Cast<u64, u32>>;
    else if ((d == T_U64 || d == T_S64) && s == T_S32)
      I.fn = HX1<s64, s32, Cast<s64, s32>>;
    else if ((d == T_U32 || d == T_S32) && tsize(s) == 8 && !isF(s))
      I.fn = HX1<u32, u64, Cast<u32, u64>>;
    else if ((d == T_U32 || d == T_S32) && s == T_U16)
      I.fn = HX1<u32, u16, Cast<u32, u16>>;
    else if ((d == T_U32 || d == T_S32) && s == T_S16)
      I.fn = HX1<s32, s16, Cast<s32, s16>>;
    else if ((d == T_U16 || d == T_S16) && tsize(s) == 4 && !isF(s) && s != T_F32)
      I.fn = HX1<u16, u32, Cast<u16, u32>>;
    else if (d == T_F32 && s == T_F32 && intr)
      I.fn = rm == 0   ? (Fn)HX1<float, float, RintF>
             : rm == 1 ? (Fn)HX1<float, float, TruncF>
             : rm == 2 ? (Fn)HX1<float, float, FloorF>
                       : (Fn)HX1<float, float, CeilF>;
  }
  return;
}
