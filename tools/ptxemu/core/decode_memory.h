// Decodes movements of data, of fences and of cp.async and atomics.
#pragma once
#include "decoder.h"

inline void Decoder::memOp(bool st) {
  m.has("weak");
  m.has("volatile");
  m.has("relaxed");
  m.has("acquire");
  m.has("release");
  m.has("mmio");
  m.has("cta");
  m.has("gpu");
  m.has("sys");
  m.has("cluster");
  m.has("nc");
  m.has("ca");
  m.has("cg");
  m.has("cs");
  m.has("lu");
  m.has("cv");
  m.has("wb");
  m.has("wt");
  m.pre("L1::");
  m.pre("L2::");
  m.has("unified");
  int sp = SP_GEN;
  if (m.has("global"))
    sp = SP_GLOBAL;
  else if (m.has("shared") || m.has("shared::cta"))
    sp = SP_SHARED;
  else if (m.has("local"))
    sp = SP_LOCAL;
  else if (m.has("const"))
    sp = SP_CONST;
  else if (m.has("param") || m.has("param::entry") || m.has("param::func"))
    sp = SP_PARAM;
  I.vn = m.has("v2") ? 2 : m.has("v4") ? 4 : m.has("v8") ? 8 : 1;
  Ty t = m.ty();
  if (t == T_NONE || t == T_PRED) unsupp("memory type");
  m.done();
  const Opnd& A = o.at(st ? 0 : 1);
  Opnd D = o.at(st ? 1 : 0);
  if (o.size() > 2 && o.size() != 3) unsupp("operand count");
  I.sz = tsize(t);
  I.sgn = isS(t);
  u8 aw;
  s64 imm;
  addr(A, I, 0, aw, imm);
  I.aw = aw;
  I.imm = imm;
  if (sp == SP_PARAM && A.v[0].k == Opnd::SYM && A.v[0].symspace == SP_FRAME) sp = SP_FRAME;
  if (A.v[0].k == Opnd::SYM && sp == SP_GEN) {
    int s = A.v[0].symspace;
    sp = s == SP_SHARED  ? SP_SHARED
         : s == SP_LOCAL ? SP_LOCAL
         : s == SP_PARAM ? SP_PARAM
         : s == SP_FRAME ? SP_FRAME
                         : SP_GLOBAL;
  }
  I.space = sp;
  vector<Opnd> vs;
  if (D.k == Opnd::VEC)
    vs = D.v;
  else
    vs.push_back(D);
  if ((int)vs.size() != I.vn) {
    if (I.vn == 1 && vs.size() == 1) {
    } else
      unsupp("vector length");
  }
  int w = -1;
  vector<u32> ex;
  for (auto& v : vs)
    if (v.k == Opnd::REG) {
      if (w >= 0 && w != v.w) unsupp("mixed register widths");
      w = v.w;
    }
  if (w < 0) w = std::max(2, (int)I.sz);
  if (w == 0) unsupp("predicate memory operand");
  if (w < I.sz) unsupp("register narrower than access");
  for (auto& v : vs) {
    if (st)
      ex.push_back(src(v, w, t));
    else
      ex.push_back(v.k == Opnd::SINK ? NOP_ : dst(v, w));
  }
  I.dw = w;
  I.x = addExt(ex);
  I.nx = ex.size();
  I.fn = st ? h_ldst<1> : h_ldst<0>;
  if ((sp == SP_SHARED || sp == SP_GEN)) C.minSh = std::min<u32>(C.minSh, I.sz);
  I.cls = sp == SP_GLOBAL   ? (st ? C_STG : C_LDG)
          : sp == SP_SHARED ? (st ? C_STS : C_LDS)
          : sp == SP_LOCAL  ? (st ? C_STL : C_LDL)
          : sp == SP_CONST  ? C_LDC
          : sp == SP_PARAM  ? C_LDPARAM
          : sp == SP_FRAME  ? C_HIDDEN
                            : (st ? C_STGEN : C_LDGEN);
}

inline void Decoder::decodeMov() {
  t = m.ty();
  m.done();
  I.cls = C_MOV;
  need(2);
  if (t == T_PRED) {
    I.o[0] = dst(o[0], 0);
    I.o[1] = src(o[1], 0);
    I.sub2 = o[1].neg;
    I.fn = h_pred;
    I.cls = C_PRED;
    return;
  }
  int w = regW(t);
  if (o[1].k == Opnd::VEC) {
    int n = o[1].v.size(), ew = w / n;
    vector<u32> ex;
    for (auto& v : o[1].v) ex.push_back(src(v, ew < 2 ? 2 : ew));
    I.x = addExt(ex);
    I.vn = n;
    I.sz = ew;
    I.dw = w;
    I.o[0] = dst(o[0], w);
    I.fn = h_pack;
    return;
  }
  if (o[0].k == Opnd::VEC) {
    int n = o[0].v.size(), ew = w / n;
    vector<u32> ex;
    for (auto& v : o[0].v) ex.push_back(v.k == Opnd::SINK ? NOP_ : dst(v, ew < 2 ? 2 : ew));
    I.x = addExt(ex);
    I.vn = n;
    I.sz = ew;
    I.dw = w;
    I.o[0] = src(o[1], w);
    I.fn = h_unpack;
    return;
  }
  if (o[1].k == Opnd::SREG && o[1].sreg >= SR_CLOCK && o[1].sreg < SR_WARPSZ) {
    I.o[0] = dst(o[0], w);
    I.dw = w;
    I.fn = h_clock;
    return;
  }
  if (w == 16) {
    I.o[0] = dst(o[0], 16);
    I.o[1] = src(o[1], 16);
    I.fn = h_mov16;
    return;
  }
  I.o[0] = dst(o[0], w);
  I.o[1] = src(o[1], w, t);
  W_ = w;
  I.fn = SELI(1, Mov);
  return;
}

inline void Decoder::decodeCvta() {
  bool to = m.has("to");
  int sp = m.has("global")                           ? SP_GLOBAL
           : m.has("shared") || m.has("shared::cta") ? SP_SHARED
           : m.has("local")                          ? SP_LOCAL
           : m.has("const")                          ? SP_CONST
           : m.has("param") || m.has("param::entry") ? SP_PARAM
                                                     : -1;
  if (sp < 0) unsupp("cvta space");
  t = m.ty();
  m.done();
  if (tsize(t) != 8) unsupp("32-bit cvta");
  u64 base = sp == SP_SHARED ? SH_BASE : sp == SP_LOCAL ? LO_BASE : sp == SP_PARAM ? PA_BASE : 0;
  std1(8);
  I.dw = 8;
  I.imm = to ? -(s64)base : (s64)base;
  I.fn = base ? h_addimm : (Fn)H1<u64, 32, Mov<u64>>;
  I.cls = C_MOV;
  return;
}

inline void Decoder::decodeIsspacep() {
  I.space = m.has("global")                           ? SP_GLOBAL
            : m.has("shared") || m.has("shared::cta") ? SP_SHARED
            : m.has("local")                          ? SP_LOCAL
            : m.has("param") || m.has("param::entry") ? SP_PARAM
            : m.has("const")                          ? SP_CONST
                                                      : 255;
  if (I.space == 255) unsupp("isspacep space");
  m.done();
  need(2);
  I.o[0] = dst(o[0], 0);
  I.o[1] = src(o[1], 8);
  I.aw = 8;
  I.fn = h_isspacep;
  I.cls = C_PRED;
  return;
}

inline void Decoder::decodePrefetch() {
  I.fn = h_nop;
  I.cls = C_OTHER;
  return;
}

inline void Decoder::decodeCreatepolicy() {
  if (o.empty()) unsupp("createpolicy");
  I.o[0] = dst(o[0], 8);
  I.o[1] = cst(8, 0x12f0000000000000ull);
  I.fn = H1<u64, 32, Mov<u64>>;
  I.cls = C_OTHER;
  return;
}

inline void Decoder::decodeMembar() {
  I.fn = h_nop;
  I.cls = C_FENCE;
  return;
}

inline void Decoder::decodeNanosleep() {
  if (b == "setmaxnreg") unsupp("setmaxnreg");
  I.fn = h_nop;
  return;
}

inline void Decoder::decodeCp() {
  if (!m.has("async")) unsupp("cp");
  if (m.has("bulk") || m.has("mbarrier") || m.has("reduce")) unsupp("cp.async variant");
  if (m.has("commit_group")) {
    m.done();
    I.fn = h_cpcommit;
    I.cls = C_CPASYNC;
    I.eff = 1;
    return;
  }
  if (m.has("wait_group")) {
    m.done();
    need(1);
    I.imm = o[0].u;
    I.fn = h_cpwait;
    I.cls = C_CPASYNC;
    I.eff = 1;
    return;
  }
  if (m.has("wait_all")) {
    m.done();
    I.sub = 1;
    I.fn = h_cpwait;
    I.cls = C_CPASYNC;
    I.eff = 1;
    return;
  }
  bool ca = m.has("ca"), cg = m.has("cg");
  (void)ca;
  m.has("shared");
  m.has("shared::cta");
  m.has("global");
  bool hint = m.has("L2::cache_hint");
  m.pre("L2::");
  m.done();
  u8 aw;
  s64 im;
  addr(o.at(0), I, 0, aw, im);
  I.aw = aw;
  I.imm = im;
  u8 aw2;
  s64 im2;
  addr(o.at(1), I, 1, aw2, im2);
  I.sub = aw2;
  if (im2 != (s64)(s32)im2) unsupp("offset");
  I.target = (s32)im2;
  if (o.size() < 3 || o[2].k != Opnd::IMM) unsupp("cp size");
  I.sz = o[2].u;
  if (I.sz != 4 && I.sz != 8 && I.sz != 16) unsupp("cp size %d", I.sz);
  if (cg && I.sz != 16) unsupp("cp.async.cg size must be 16");
  size_t no = o.size() - (hint ? 1 : 0);
  I.o[2] = NOP_;
  I.o[4] = NOP_;
  if (no == 4) {
    if (o[3].k == Opnd::REG && o[3].w == 0) {
      I.o[4] = o[3].off;
      I.sub2 = o[3].neg;
    } else
      I.o[2] = src(o[3], 4);
  } else if (no != 3)
    unsupp("operand count");
  I.cls = C_CPASYNC;
  I.fn = h_cpasync;
  return;
}

inline void Decoder::decodeAtom() {
  bool rd = b == "red";
  I.cls = C_ATOM;
  if (m.has("async")) unsupp("red.async");
  m.has("relaxed");
  m.has("acquire");
  m.has("release");
  m.has("acq_rel");
  m.has("cta");
  m.has("gpu");
  m.has("sys");
  m.has("cluster");
  m.has("noftz");
  m.pre("L2::");
  m.pre("L1::");
  I.space = m.has("global")                           ? SP_GLOBAL
            : m.has("shared") || m.has("shared::cta") ? SP_SHARED
                                                      : SP_GEN;
  static const char* N[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
  int k = -1;
  for (int i = 0; i < 10; i++)
    if (m.has(N[i])) k = i;
  int vn = m.has("v2") ? 2 : m.has("v4") ? 4 : m.has("v8") ? 8 : 1;
  t = m.ty();
  m.done();
  if (k < 0) unsupp("atomic op");
  I.sub = k;
  I.ty = t;
  I.sz = tsize(t);
  I.vn = vn;
  int w = regW(t);
  I.dw = w;
  if (w > 8) unsupp("128-bit atomic");
  size_t ai = rd ? 0 : 1;
  u8 aw;
  s64 im;
  addr(o.at(ai), I, 0, aw, im);
  I.aw = aw;
  I.imm = im;
  vector<u32> ex;
  auto vecOf = [](Opnd& q) {
    vector<Opnd> v;
    if (q.k == Opnd::VEC)
      v = q.v;
    else
      v.push_back(q);
    return v;
  };
  if (rd)
    for (int i = 0; i < vn; i++) ex.push_back(NOP_);
  else {
    auto v = vecOf(o[0]);
    if ((int)v.size() != vn) unsupp("vector length");
    for (auto& q : v) ex.push_back(q.k == Opnd::SINK ? NOP_ : dst(q, w));
  }
  auto v = vecOf(o.at(ai + 1));
  if ((int)v.size() != vn) unsupp("vector length");
  for (auto& q : v) ex.push_back(src(q, w, t));
  if (k == A_CAS) ex.push_back(src(o.at(ai + 2), w, t));
  I.x = addExt(ex);
  if (I.space != SP_GLOBAL) C.minSh = std::min<u32>(C.minSh, I.sz);
  I.fn = h_atom;
  return;
}
