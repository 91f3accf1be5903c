// Decodes arithmetic on integers and floats.
#pragma once
#include "decoder.h"

inline void Decoder::decodeAdd() {
  bool cc = m.has("cc"), hi = m.has("hi"), lo = m.has("lo"), wide = m.has("wide");
  bool c = b == "addc" || b == "subc" || b == "madc";
  round(m, I);
  bool relu = m.has("relu");
  m.has("noftz");
  bool oob = m.has("oob");
  if (oob) unsupp(".oob");
  t = m.ty();
  if (t == T_F32) {
    if (b == "fma" || b == "mad") {
      std3(4, t);
      I.fn = H3<float, 32, Fma32>;
      I.cls = C_FMA32;
    } else {
      std2(4, t);
      I.fn = b == "add"   ? (Fn)H2<float, 32, FAdd<float>>
             : b == "sub" ? (Fn)H2<float, 32, FSub<float>>
                          : (Fn)H2<float, 32, FMul<float>>;
      I.cls = b == "mul" ? C_MUL32 : C_ADD32;
    }
    finishF(m, I, t);
    return;
  }
  if (t == T_F64) {
    I.cls = C_FP64;
    if (b == "fma" || b == "mad") {
      std3(8, t);
      I.fn = H3<double, 32, Fma64>;
    } else {
      std2(8, t);
      I.fn = b == "add"   ? (Fn)H2<double, 32, FAdd<double>>
             : b == "sub" ? (Fn)H2<double, 32, FSub<double>>
                          : (Fn)H2<double, 32, FMul<double>>;
    }
    finishF(m, I, t);
    return;
  }
  if (isHalf(t)) {
    I.cls = C_FP16;
    I.csr &= ~0x8040u;
    if (I.csr) unsupp("half rounding mode");
    int w = isX2(t) ? 4 : 2;
    if (b == "fma") {
      std3(w, isB(t) ? T_BF16 : T_F16);
      if (relu)
        I.fn = t == T_F16     ? (Fn)H3<u16, 32, HFma<HF, true>>
               : t == T_F16X2 ? (Fn)H3<u16, 64, HFma<HF, true>>
               : t == T_BF16  ? (Fn)H3<u16, 32, HFma<BF, true>>
                              : (Fn)H3<u16, 64, HFma<BF, true>>;
      else
        I.fn = t == T_F16     ? (Fn)H3<u16, 32, HFma<HF, false>>
               : t == T_F16X2 ? (Fn)H3<u16, 64, HFma<HF, false>>
               : t == T_BF16  ? (Fn)H3<u16, 32, HFma<BF, false>>
                              : (Fn)H3<u16, 64, HFma<BF, false>>;
    } else if (b == "mad")
      unsupp("mad half");
    else {
      std2(w, isB(t) ? T_BF16 : T_F16);
      I.fn = b == "add" ? halfBin<FAdd>(t) : b == "sub" ? halfBin<FSub>(t) : halfBin<FMul>(t);
    }
    if (isB(t) && m.has("sat")) unsupp("bf16 .sat");
    finishF(m, I, t);
    return;
  }
  if (b == "fma") unsupp("fma type");
  I.cls = C_INT;
  if (I.csr) unsupp("rounding on integer op");
  bool sat = m.has("sat");
  m.done();
  int w = tsize(t);
  W_ = w;
  if (w < 2 || w > 8 || t == T_PRED) unsupp("integer type");
  if (t == T_U16X2 || t == T_S16X2) {
    if (b == "add" && !sat) {
      std2(4);
      I.fn = H2<u16, 64, Add<u16>>;
      return;
    }
    unsupp("packed 16-bit op");
  }
  if (cc || c) {
    I.sub = (c ? 1 : 0) | (cc ? 2 : 0);
    I.sub2 = (b == "sub" || b == "subc") ? 1 : (b == "mad" || b == "madc") ? (hi ? 3 : 2) : 0;
    if (I.sub2 >= 2)
      std3(w);
    else
      std2(w);
    if (w == 4)
      I.fn = isS(t) ? (Fn)h_xprec<s32, s64> : (Fn)h_xprec<u32, u64>;
    else if (w == 8)
      I.fn = isS(t) ? (Fn)h_xprec<s64, s128> : (Fn)h_xprec<u64, u128>;
    else
      unsupp("16-bit carry op");
    return;
  }
  if (b == "add") {
    std2(w);
    if (sat) {
      if (t != T_S32) unsupp("sat type");
      I.fn = H2<s32, 32, AddSatS>;
    } else
      I.fn = SELI(2, Add);
    return;
  }
  if (b == "sub") {
    std2(w);
    if (sat) {
      if (t != T_S32) unsupp("sat type");
      I.fn = H2<s32, 32, SubSatS>;
    } else
      I.fn = SELI(2, Sub);
    return;
  }
  if (sat) unsupp("integer .sat");
  bool s = isS(t);
  if (b == "mul") {
    if (wide) {
      need(3);
      int dw = w * 2;
      I.o[0] = dst(o[0], dw);
      I.o[1] = src(o[1], w);
      I.o[2] = src(o[2], w);
      I.fn = w == 2   ? (s ? (Fn)HX2<s32, s16, s16, MulWide<s32, s16>>
                           : (Fn)HX2<u32, u16, u16, MulWide<u32, u16>>)
             : w == 4 ? (s ? (Fn)HX2<s64, s32, s32, MulWide<s64, s32>>
                           : (Fn)HX2<u64, u32, u32, MulWide<u64, u32>>)
                      : nullptr;
      if (!I.fn) unsupp("mul.wide.64");
      return;
    }
    std2(w);
    if (hi) {
      I.fn = w == 2   ? (s ? (Fn)H2<s16, 32, MulHi<s16, s32>> : (Fn)H2<u16, 32, MulHi<u16, u32>>)
             : w == 4 ? (s ? (Fn)H2<s32, 32, MulHi<s32, s64>> : (Fn)H2<u32, 32, MulHi<u32, u64>>)
                      : (s ? (Fn)H2<s64, 32, MulHi<s64, s128>> : (Fn)H2<u64, 32, MulHi<u64, u128>>);
      return;
    }
    if (!lo) unsupp("mul needs lo/hi/wide");
    I.fn = SELI(2, MulLo);
    return;
  }
  if (wide) {
    need(4);
    int dw = w * 2;
    I.o[0] = dst(o[0], dw);
    I.o[1] = src(o[1], w);
    I.o[2] = src(o[2], w);
    I.o[3] = src(o[3], dw);
    I.fn = w == 2   ? (s ? (Fn)HX3<s32, s16, s16, s32, MadWide<s32, s16>>
                         : (Fn)HX3<u32, u16, u16, u32, MadWide<u32, u16>>)
           : w == 4 ? (s ? (Fn)HX3<s64, s32, s32, s64, MadWide<s64, s32>>
                         : (Fn)HX3<u64, u32, u32, u64, MadWide<u64, u32>>)
                    : nullptr;
    if (!I.fn) unsupp("mad.wide.64");
    return;
  }
  std3(w);
  if (hi) {
    I.fn = w == 4   ? (s ? (Fn)H3<s32, 32, MadHi<s32, s64>> : (Fn)H3<u32, 32, MadHi<u32, u64>>)
           : w == 8 ? (s ? (Fn)H3<s64, 32, MadHi<s64, s128>> : (Fn)H3<u64, 32, MadHi<u64, u128>>)
                    : nullptr;
    if (!I.fn) unsupp("mad.hi.16");
    return;
  }
  if (!lo) unsupp("mad needs lo/hi/wide");
  I.fn = SELI(3, MadLo);
  return;
}

inline void Decoder::decodeMul24() {
  if (m.has("hi")) unsupp("24-bit hi");
  m.has("lo");
  t = m.ty();
  m.done();
  I.cls = C_INT;
  if (b == "mul24") {
    std2(4);
    I.fn = t == T_S32 ? (Fn)H2<s32, 32, Mul24S> : (Fn)H2<u32, 32, Mul24U>;
  } else {
    std3(4);
    I.fn = t == T_S32 ? (Fn)H3<s32, 32, Mad24S> : (Fn)H3<u32, 32, Mad24U>;
  }
  return;
}

inline void Decoder::decodeSad() {
  t = m.ty();
  m.done();
  std3(tsize(t));
  I.cls = C_INT;
  I.fn = SELT(3, Sad);
  if (!I.fn) unsupp("type");
  return;
}

inline void Decoder::decodeDiv() {
  bool ap = m.has("approx"), fu = m.has("full");
  round(m, I);
  t = m.ty();
  if (t == T_F32 || t == T_F64) {
    fcls(t, C_SFU);
    (void)ap;
    (void)fu;
    if (t == T_F32) {
      std2(4, t);
      I.fn = H2<float, 32, FDiv<float>>;
    } else {
      std2(8, t);
      I.fn = H2<double, 32, FDiv<double>>;
    }
    finishF(m, I, t);
    return;
  }
  m.done();
  I.cls = C_INT;
  std2(tsize(t));
  bool d = b == "div";
  switch (t) {
    case T_U16:
      I.fn = d ? (Fn)H2<u16, 32, UDiv<u16>> : (Fn)H2<u16, 32, URem<u16>>;
      break;
    case T_S16:
      I.fn = d ? (Fn)H2<s16, 32, SDiv<s16>> : (Fn)H2<s16, 32, SRem<s16>>;
      break;
    case T_U32:
      I.fn = d ? (Fn)H2<u32, 32, UDiv<u32>> : (Fn)H2<u32, 32, URem<u32>>;
      break;
    case T_S32:
      I.fn = d ? (Fn)H2<s32, 32, SDiv<s32>> : (Fn)H2<s32, 32, SRem<s32>>;
      break;
    case T_U64:
      I.fn = d ? (Fn)H2<u64, 32, UDiv<u64>> : (Fn)H2<u64, 32, URem<u64>>;
      break;
    case T_S64:
      I.fn = d ? (Fn)H2<s64, 32, SDiv<s64>> : (Fn)H2<s64, 32, SRem<s64>>;
      break;
    default:
      unsupp("type");
  }
  return;
}

inline void Decoder::decodeRcp() {
  bool ap = m.has("approx");
  round(m, I);
  t = m.ty();
  if (t == T_F64) {
    I.cls = C_FP64;
    std1(8, t);
    if (b == "rcp")
      I.fn = ap ? (Fn)H1<double, 32, Rcp64A> : (Fn)H1<double, 32, Rcp64>;
    else if (b == "sqrt")
      I.fn = H1<double, 32, Sqrt64>;
    else if (b == "rsqrt")
      I.fn = (I.csr & 0x8040) ? (Fn)H1<double, 32, Rsq64A> : (Fn)H1<double, 32, Rsq64>;
    else
      unsupp("f64");
    if (ap) I.csr &= ~0x8040u;
    finishF(m, I, t);
    return;
  }
  I.cls = C_SFU;
  if (isHalf(t)) {
    std1(isX2(t) ? 4 : 2);
    I.csr = 0;
    if (b == "ex2")
      I.fn = halfUn<Ex2>(t);
    else if (b == "tanh")
      I.fn = halfUn<TanhA>(t);
    else
      unsupp("half");
    finishF(m, I, t);
    return;
  }
  if (t != T_F32) unsupp("type");
  std1(4, t);
  I.fn = b == "rcp"     ? (Fn)H1<float, 32, Rcp32>
         : b == "sqrt"  ? (Fn)H1<float, 32, Sqrt32>
         : b == "rsqrt" ? (Fn)H1<float, 32, Rsq32>
         : b == "sin"   ? (Fn)H1<float, 32, Sin32>
         : b == "cos"   ? (Fn)H1<float, 32, Cos32>
         : b == "lg2"   ? (Fn)H1<float, 32, Lg2>
         : b == "ex2"   ? (Fn)H1<float, 32, Ex2>
                        : (Fn)H1<float, 32, TanhA>;
  finishF(m, I, t);
  return;
}

inline void Decoder::decodeMin() {
  bool nan = m.has("NaN"), xs = m.has("xorsign"), mn = b == "min";
  if (xs) m.has("abs");
  bool ftz = m.has("ftz");
  bool relu = m.has("relu");
  t = m.ty();
  if (t == T_F32) {
    I.cls = C_FP32X;
    if (relu) unsupp(".relu");
    std2(4, t);
    if (ftz) I.csr |= 0x8040;
    if (xs) {
      if (nan)
        I.fn = mn ? (Fn)H2<float, 32, XorSignAbs32<FMinN<float>>>
                  : (Fn)H2<float, 32, XorSignAbs32<FMaxN<float>>>;
      else
        I.fn = mn ? (Fn)H2<float, 32, XorSignAbs32<FMin<float>>>
                  : (Fn)H2<float, 32, XorSignAbs32<FMax<float>>>;
    } else
      I.fn = nan ? (mn ? (Fn)H2<float, 32, FMinN<float>> : (Fn)H2<float, 32, FMaxN<float>>)
                 : (mn ? (Fn)H2<float, 32, FMin<float>> : (Fn)H2<float, 32, FMax<float>>);
    finishF(m, I, t);
    return;
  }
  if (xs) unsupp("xorsign");
  if (t == T_F64) {
    I.cls = C_FP64;
    std2(8, t);
    I.fn = mn ? (Fn)H2<double, 32, FMin<double>> : (Fn)H2<double, 32, FMax<double>>;
    finishF(m, I, t);
    return;
  }
  if (isHalf(t)) {
    if (relu) unsupp(".relu");
    I.cls = C_FP16;
    std2(isX2(t) ? 4 : 2, isB(t) ? T_BF16 : T_F16);
    I.fn = nan ? (mn ? halfBin<FMinN>(t) : halfBin<FMaxN>(t))
               : (mn ? halfBin<FMin>(t) : halfBin<FMax>(t));
    finishF(m, I, t);
    return;
  }
  m.done();
  if (relu) unsupp(".relu");
  I.cls = C_INT;
  if (t == T_U16X2 || t == T_S16X2) {
    std2(4);
    I.fn = t == T_U16X2 ? (mn ? (Fn)H2<u16, 64, Min<u16>> : (Fn)H2<u16, 64, Max<u16>>)
                        : (mn ? (Fn)H2<s16, 64, Min<s16>> : (Fn)H2<s16, 64, Max<s16>>);
    return;
  }
  std2(tsize(t));
  I.fn = mn ? SELT(2, Min) : SELT(2, Max);
  if (!I.fn) unsupp("type");
  return;
}

inline void Decoder::decodeAbs() {
  bool ftz = m.has("ftz");
  t = m.ty();
  bool ab = b == "abs";
  m.done();
  if (t == T_F32) {
    std1(4, t);
    I.cls = C_FP32X;
    (void)ftz;
    I.fn = ab ? (Fn)H1<u32, 32, AbsF32> : (Fn)H1<u32, 32, NegF32>;
    return;
  }
  if (t == T_F64) {
    std1(8, t);
    I.cls = C_FP64;
    I.fn = ab ? (Fn)H1<u64, 32, AbsF64> : (Fn)H1<u64, 32, NegF64>;
    return;
  }
  if (isHalf(t)) {
    I.cls = C_FP16;
    std1(isX2(t) ? 4 : 2);
    I.fn = isX2(t) ? (ab ? (Fn)H1<u16, 64, AbsH> : (Fn)H1<u16, 64, NegH>)
                   : (ab ? (Fn)H1<u16, 32, AbsH> : (Fn)H1<u16, 32, NegH>);
    return;
  }
  I.cls = C_INT;
  std1(tsize(t));
  W_ = tsize(t);
  if (ab)
    I.fn = SELT(1, Abs);
  else
    I.fn = SELI(1, Neg);
  if (!I.fn) unsupp("type");
  return;
}

inline void Decoder::decodeCopysign() {
  t = m.ty();
  m.done();
  I.cls = C_FP32X;
  std2(tsize(t), t);
  I.fn = t == T_F32 ? (Fn)H2<u32, 32, CpySgn32> : (Fn)H2<u64, 32, CpySgn64>;
  return;
}

inline void Decoder::decodeTestp() {
  static const char* N[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  int k = -1;
  for (int i = 0; i < 6; i++)
    if (m.has(N[i])) k = i;
  t = m.ty();
  m.done();
  if (k < 0) unsupp("testp");
  need(2);
  I.sub = k;
  I.ty = t;
  I.o[0] = dst(o[0], 0);
  I.o[1] = src(o[1], tsize(t), t);
  I.fn = h_testp;
  I.cls = C_PRED;
  return;
}
