// Decodes what lanes and warps do together: shuffles, barriers, products.
#pragma once
#include "decoder.h"

inline void Decoder::decodeShfl() {
  bool sy = m.has("sync");
  int k = m.has("up") ? 0 : m.has("down") ? 1 : m.has("bfly") ? 2 : m.has("idx") ? 3 : -1;
  m.ty();
  m.done();
  if (k < 0) unsupp("shfl mode");
  need(sy ? 5 : 4);
  I.sub = k;
  I.cls = C_WARP;
  I.o[0] = o[0].k == Opnd::SINK ? NOP_ : dst(o[0], 4);
  I.o[4] = pq.empty() ? NOP_ : dstP(pq[0]);
  I.o[1] = src(o[1], 4);
  I.o[2] = src(o[2], 4);
  I.o[3] = src(o[3], 4);
  I.o[5] = sy ? src(o[4], 4) : NOP_;
  if (sy) I.kind = K_SYNC;
  I.fn = h_shfl;
  return;
}

inline void Decoder::decodeVote() {
  bool sy = m.has("sync");
  I.sub = m.has("all") ? 0 : m.has("any") ? 1 : m.has("uni") ? 2 : m.has("ballot") ? 3 : 9;
  m.ty();
  m.done();
  if (I.sub == 9) unsupp("vote");
  need(sy ? 3 : 2);
  I.o[0] = dst(o[0], I.sub == 3 ? 4 : 0);
  I.o[1] = src(o[1], 0);
  I.sub2 = o[1].neg;
  I.o[5] = sy ? src(o[2], 4) : NOP_;
  if (sy) I.kind = K_SYNC;
  I.fn = h_vote;
  I.cls = C_WARP;
  return;
}

inline void Decoder::decodeMatch() {
  m.has("sync");
  I.sub = m.has("all") ? 1 : 0;
  m.has("any");
  t = m.ty();
  m.done();
  need(3);
  I.sz = tsize(t);
  I.o[0] = o[0].k == Opnd::SINK ? NOP_ : dst(o[0], 4);
  I.o[4] = pq.empty() ? NOP_ : dstP(pq[0]);
  I.o[1] = src(o[1], tsize(t));
  I.o[5] = src(o[2], 4);
  I.kind = K_SYNC;
  I.fn = h_match;
  I.cls = C_WARP;
  return;
}

inline void Decoder::decodeRedux() {
  m.has("sync");
  static const char* N[] = {"add", "min", "max", "and", "or", "xor"};
  int k = -1;
  for (int i = 0; i < 6; i++)
    if (m.has(N[i])) k = i;
  t = m.ty();
  m.done();
  if (k < 0 || tsize(t) != 4 || t == T_F32) unsupp("redux");
  need(3);
  I.sub = k;
  I.sgn = t == T_S32;
  I.o[0] = dst(o[0], 4);
  I.o[1] = src(o[1], 4);
  I.o[5] = src(o[2], 4);
  I.kind = K_SYNC;
  I.fn = h_redux;
  I.cls = C_WARP;
  return;
}

inline void Decoder::decodeElect() {
  m.has("sync");
  m.done();
  need(2);
  I.o[0] = o[0].k == Opnd::SINK ? NOP_ : dst(o[0], 4);
  I.o[4] = pq.empty() ? NOP_ : dstP(pq[0]);
  I.o[5] = src(o[1], 4);
  I.kind = K_SYNC;
  I.fn = h_elect;
  I.cls = C_WARP;
  return;
}

inline void Decoder::decodeActivemask() {
  m.ty();
  m.done();
  need(1);
  I.o[0] = dst(o[0], 4);
  I.fn = h_activemask;
  I.cls = C_WARP;
  return;
}

inline void Decoder::decodeBar() {
  I.cls = C_BAR;
  m.has("cta");
  bool al = m.has("aligned");
  (void)al;
  if (m.has("warp")) {
    m.has("sync");
    m.done();
    need(1);
    I.o[5] = src(o[0], 4);
    I.kind = K_SYNC;
    I.fn = h_nop;
    return;
  }
  if (m.has("cluster")) unsupp("cluster barrier");
  I.kind = K_BAR;
  I.fn = h_nop;
  if (m.has("sync"))
    I.sub = 0;
  else if (m.has("arrive"))
    I.sub = 1;
  else if (m.has("red")) {
    I.sub = m.has("popc") ? 2 : m.has("and") ? 3 : m.has("or") ? 4 : 9;
    if (I.sub == 9) unsupp("bar.red op");
    m.ty();
    m.done();
    if (o.size() < 3) unsupp("bar.red operands");
    I.o[0] = dst(o[0], I.sub == 2 ? 4 : 0);
    I.o[1] = src(o[1], 4);
    I.o[2] = o.size() == 4 ? src(o[2], 4) : NOP_;
    I.o[3] = src(o.back(), 0);
    I.sub2 = o.back().neg;
    return;
  } else
    unsupp("bar variant");
  m.done();
  if (o.empty()) unsupp("bar operands");
  I.o[1] = src(o[0], 4);
  I.o[2] = o.size() > 1 ? src(o[1], 4) : NOP_;
  return;
}

inline void Decoder::decodeLdmatrix() {
  bool st = b == "stmatrix";
  I.cls = C_LDMATRIX;
  m.has("sync");
  m.has("aligned");
  if (!m.has("m8n8")) unsupp("shape");
  I.vn = m.has("x1") ? 1 : m.has("x2") ? 2 : m.has("x4") ? 4 : 0;
  if (!I.vn) unsupp("count");
  I.sub = m.has("trans");
  I.space = (m.has("shared") || m.has("shared::cta")) ? SP_SHARED : SP_GEN;
  if (m.ty() != T_B16) unsupp("type");
  m.done();
  need(2);
  Opnd& D = st ? o[1] : o[0];
  u8 aw;
  s64 im;
  addr(st ? o[0] : o[1], I, 0, aw, im);
  I.aw = aw;
  I.imm = im;
  I.sub2 = st;
  vector<u32> ex;
  if (D.k != Opnd::VEC) unsupp("vector");
  for (auto& v : D.v) ex.push_back(st ? src(v, 4) : dst(v, 4));
  if (ex.size() != I.vn) unsupp("vector length");
  I.x = addExt(ex);
  I.kind = K_ALIGNED;
  I.fn = h_ldmatrix;
  return;
}

inline void Decoder::decodeMma() {
  I.cls = C_MMA;
  m.has("sync");
  m.has("aligned");
  int M = 0, N = 0, K = 0;
  for (size_t i = 1; i < m.m.size(); i++)
    if (sscanf(m.m[i].c_str(), "m%dn%dk%d", &M, &N, &K) == 3) {
      m.used[i] = 1;
      break;
    }
  if (!m.has("row") || !m.has("col")) unsupp("layout");
  bool satf = m.has("satfinite");
  if (m.has("and") || m.has("xor") || m.has("popc") || m.has("sp")) unsupp("mma op");
  Ty d = m.ty(), a = m.ty(), bt = m.ty(), c = m.ty();
  m.done();
  need(4);
  if (N != 8) unsupp("mma shape");
  I.sz = K;
  int nd, na, nb, nc;
  int aw = 4;
  bool ok = false;
  if (a == T_F16 || a == T_BF16) {
    ok = M == 16 && (K == 8 || K == 16) && a == bt;
    na = K / 4;
    nb = K / 8;
    I.sub = a == T_BF16;
  } else if (a == T_TF32) {
    ok = M == 16 && (K == 4 || K == 8) && bt == T_TF32;
    na = K / 2;
    nb = K / 4;
    I.sub = 2;
  } else if (a == T_F64) {
    aw = 8;
    ok = (M == 8 && K == 4) || (M == 16 && (K == 4 || K == 8 || K == 16));
    na = M == 8 ? 1 : K / 2;
    nb = M == 8 ? 1 : K / 4;
    I.sub = 3;
    I.eff = M;
  } else if (a == T_S8 || a == T_U8) {
    ok = M == 16 && (K == 16 || K == 32);
    na = K / 8;
    nb = K / 16;
    I.sub = 4;
    I.flags = (a == T_S8 ? 1 : 0) | (bt == T_S8 ? 2 : 0) | (satf ? 4 : 0);
  } else
    na = nb = 0;
  if (!ok) unsupp("mma shape/type");
  I.sub2 = (c == T_F16 ? 1 : 0) | (d == T_F16 ? 2 : 0);
  nd = I.sub == 3 ? (M == 8 ? 2 : 4) : d == T_F16 ? 2 : 4;
  nc = I.sub == 3 ? nd : c == T_F16 ? 2 : 4;
  if (d != T_F16 && d != T_F32 && d != T_F64 && d != T_S32) unsupp("mma d type");
  vector<u32> ex;
  auto vec = [&](Opnd& q, int n, bool ds, int w) {
    vector<Opnd> vs;
    if (q.k == Opnd::VEC)
      vs = q.v;
    else
      vs.push_back(q);
    if ((int)vs.size() != n) unsupp("mma operand vector of %zu where %d expected", vs.size(), n);
    for (auto& v : vs) ex.push_back(ds ? dst(v, w) : src(v, w, w == 8 ? T_F64 : T_NONE));
  };
  int cw = I.sub == 3 ? 8 : 4;
  vec(o[0], nd, true, cw);
  vec(o[1], na, false, aw);
  vec(o[2], nb, false, aw);
  vec(o[3], nc, false, cw);
  I.x = addExt(ex);
  I.vn = nd;
  I.dw = na;
  I.aw = nb;
  I.sgn = nc;
  I.imm = M | (N << 8) | (K << 16);
  I.kind = K_ALIGNED;
  I.fn = h_mma;
  return;
}
