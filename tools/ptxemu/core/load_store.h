// Loads and stores of every space of memory.
#pragma once
#include "shared_memory.h"

// ---------------------------------------------------------------- loads
static inline u64 rdN(const u8* p, int es) {
  u64 v = 0;
  memcpy(&v, p, es);
  return v;
}
static inline void wrReg(u8* base, int w, u32 lane, u64 v) {
  if (w == 4)
    ((u32*)base)[lane] = (u32)v;
  else if (w == 8)
    ((u64*)base)[lane] = v;
  else
    ((u16*)base)[lane] = (u16)v;
}
static inline u64 rdReg(const u8* base, int w, u32 lane) {
  return w == 4   ? ((const u32*)base)[lane]
         : w == 8 ? ((const u64*)base)[lane]
                  : ((const u16*)base)[lane];
}
static inline u64 sext(u64 v, int es) {
  int s = 64 - 8 * es;
  return (u64)((s64)(v << s) >> s);
}
static void loadRegs(Exec& X, Warp& W, const Insn& I, u32 m, u8** hp) {
  const u32* ex = &X.K->ext[I.x];
  int es = I.sz, dw = I.dw;
  for (int j = 0; j < I.vn; j++) {
    if (ex[j] == NOP_) continue;
    u8* d = W.r + ex[j];
    if (es == 16) {
      FORM(m, i) memcpy(d + 16 * i, hp[i] + 16 * j, 16);
    } else if (es == 4 && dw == 4) {
      FORM(m, i)((u32*)d)[i] = *(u32*)(hp[i] + 4 * j);
    } else if (es == 8 && dw == 8) {
      FORM(m, i)((u64*)d)[i] = *(u64*)(hp[i] + 8 * j);
    } else if (es == 2 && dw == 2) {
      FORM(m, i)((u16*)d)[i] = *(u16*)(hp[i] + 2 * j);
    } else {
      FORM(m, i) {
        u64 v = rdN(hp[i] + es * j, es);
        if (I.sgn) v = sext(v, es);
        wrReg(d, dw, i, v);
      }
    }
  }
}
static void storeRegs(Exec& X, Warp& W, const Insn& I, u32 m, u8** hp) {
  const u32* ex = &X.K->ext[I.x];
  int es = I.sz, sw = I.dw;
  for (int j = 0; j < I.vn; j++) {
    u8* s = W.r + ex[j];
    if (es == 16) {
      FORM(m, i) memcpy(hp[i] + 16 * j, s + 16 * i, 16);
    } else if (es == 4 && sw == 4) {
      FORM(m, i) * (u32*)(hp[i] + 4 * j) = ((u32*)s)[i];
    } else
      FORM(m, i) {
        u64 v = rdReg(s, sw, i);
        memcpy(hp[i] + es * j, &v, es);
      }
  }
}
static const u8* stVal(void* c, u32 lane) {
  StCtx* S = (StCtx*)c;
  int es = S->I->sz;
  for (int j = 0; j < S->I->vn; j++) {
    if (es == 16)
      memcpy(S->buf + 16 * j, S->W->r + S->ex[j] + 16 * lane, 16);
    else {
      u64 v = rdReg(S->W->r + S->ex[j], S->I->dw, lane);
      memcpy(S->buf + es * j, &v, es);
    }
  }
  return S->buf;
}

static void ldGlobalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn;
  u8* hp[32];
  chkAlign(X, W, I, m, ad, sz, "global");
  Region* r = xlate(X, W, I, m, ad, sz, false, hp);
  if (X.opt.uninit_global && (!r || r->trackInit)) chkInitGlobal(X, W, I, m, ad, sz);
  if (!(r && r->module)) countSectors(X, W, m, ad, sz, false, X.gl);
  if (X.opt.gl_ww && (!r || r->shadow)) chkGlobalRW(X, W, I, m, ad, sz);
  loadRegs(X, W, I, m, hp);
}
static void stGlobalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn;
  u8* hp[32];
  chkAlign(X, W, I, m, ad, sz, "global");
  Region* r = xlate(X, W, I, m, ad, sz, true, hp);
  if (!(r && r->module)) countSectors(X, W, m, ad, sz, true, X.gs);
  StCtx c;
  c.W = &W;
  c.ex = &X.K->ext[I.x];
  c.I = &I;
  noteGlobalWrite(X, W, I, m, ad, sz, stVal, &c, false);
  storeRegs(X, W, I, m, hp);
}
// Checks and counts an access to shared memory; where each lane's bytes are.
template <class Stats>
static void sharedPointers(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, const char* what,
                           Stats& stats, u8** hp) {
  u32 sz = I.sz * I.vn;
  shRange(X, W, I, m, ad, sz, what);
  chkAlign(X, W, I, m, ad, sz, "shared");
  bankStats(X, m, ad, sz, stats);
  u8* b = W.blk->sh.data();
  FORM(m, i) hp[i] = b + ad[i];
}
static void ldSharedA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn;
  u8* hp[32];
  sharedPointers(X, W, I, m, ad, "read", X.sl, hp);
  if (X.opt.races | X.opt.uninit_shared) FORM(m, i) shRead(X, W, I, i, (u32)ad[i], sz);
  loadRegs(X, W, I, m, hp);
}
static void stSharedA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn;
  u8* hp[32];
  sharedPointers(X, W, I, m, ad, "write", X.ss, hp);
  if (X.opt.races | X.opt.uninit_shared) {
    StCtx c;
    c.W = &W;
    c.ex = &X.K->ext[I.x];
    c.I = &I;
    FORM(m, i) shWrite(X, W, I, i, (u32)ad[i], sz, false, false, &c);
  }
  storeRegs(X, W, I, m, hp);
}
static void localPtr(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, u8** hp,
                     bool wr, bool chk) {
  u32 L = X.K->localBytes;
  if (sz > 1) chkAlign(X, W, I, m, ad, I.sz, "local");
  FORM(m, i) {
    if (ad[i] + sz > L || ad[i] > L)
      fault(X, W, I, i, "local_oob",
            "out-of-bounds local-memory %s of %u bytes at offset %lld (frame %u bytes)",
            wr ? "write" : "read", sz, (long long)ad[i], L);
    hp[i] = W.local + (u64)i * L + ad[i];
    u8* in = W.linit + (u64)i * L + ad[i];
    if (wr)
      memset(in, 1, sz);
    else if (chk && X.opt.uninit_local)
      for (u32 b = 0; b < sz; b++)
        if (!in[b]) {
          if (X.opt.uninit_local == 1)
            fault(X, W, I, i, "uninit_local",
                  "read of local (stack) memory never written by this thread: local offset %lld, "
                  "%u bytes",
                  (long long)ad[i], sz);
          X.uninitLocal++;
          break;
        }
  }
}
static void ldLocalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u8* hp[32];
  u32 sz = I.sz * I.vn;
  localPtr(X, W, I, m, ad, sz, hp, false, I.space != SP_FRAME);
  if (I.space != SP_FRAME) X.llBytes += (u64)sz * __builtin_popcount(m);
  loadRegs(X, W, I, m, hp);
}
static void stLocalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u8* hp[32];
  u32 sz = I.sz * I.vn;
  localPtr(X, W, I, m, ad, sz, hp, true, true);
  if (I.space != SP_FRAME) X.lsBytes += (u64)sz * __builtin_popcount(m);
  storeRegs(X, W, I, m, hp);
}
static void ldParamA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u8* hp[32];
  u32 sz = I.sz * I.vn;
  FORM(m, i) {
    if (ad[i] + sz > X.paramBytes)
      fault(X, W, I, i, "param_oob",
            "kernel-parameter read of %u bytes at offset %lld (params are %u bytes)", sz,
            (long long)ad[i], X.paramBytes);
    hp[i] = (u8*)X.params + ad[i];
  }
  loadRegs(X, W, I, m, hp);
}
static inline int spaceOf(u64 a) {
  u64 t = a >> 40;
  return t == (SH_BASE >> 40)   ? SP_SHARED
         : t == (LO_BASE >> 40) ? SP_LOCAL
         : t == (PA_BASE >> 40) ? SP_PARAM
                                : SP_GLOBAL;
}
template <int ST>
static void h_ldst(Exec& X, Warp& W, const Insn& I, u32 m) {
  u64 ad[32];
  getaddr(W, I, I.o[0], I.aw, I.imm, ad);
  switch (I.space) {
    case SP_GLOBAL:
    case SP_CONST:
      ST ? stGlobalA(X, W, I, m, ad) : ldGlobalA(X, W, I, m, ad);
      return;
    case SP_SHARED:
      ST ? stSharedA(X, W, I, m, ad) : ldSharedA(X, W, I, m, ad);
      return;
    case SP_LOCAL:
    case SP_FRAME:
      ST ? stLocalA(X, W, I, m, ad) : ldLocalA(X, W, I, m, ad);
      return;
    case SP_PARAM:
      ldParamA(X, W, I, m, ad);
      return;
    default: {
      u32 ms[8] = {0};
      FORM(m, i) ms[spaceOf(ad[i])] |= 1u << i;
      u64 a2[32];
      if (ms[SP_GLOBAL])
        ST ? stGlobalA(X, W, I, ms[SP_GLOBAL], ad) : ldGlobalA(X, W, I, ms[SP_GLOBAL], ad);
      if (ms[SP_SHARED]) {
        for (int i = 0; i < 32; i++) a2[i] = ad[i] - SH_BASE;
        ST ? stSharedA(X, W, I, ms[SP_SHARED], a2) : ldSharedA(X, W, I, ms[SP_SHARED], a2);
      }
      if (ms[SP_LOCAL]) {
        for (int i = 0; i < 32; i++) a2[i] = ad[i] - LO_BASE;
        ST ? stLocalA(X, W, I, ms[SP_LOCAL], a2) : ldLocalA(X, W, I, ms[SP_LOCAL], a2);
      }
      if (ms[SP_PARAM]) {
        if (ST) fault(X, W, I, -1, "oob", "store to kernel parameter space");
        for (int i = 0; i < 32; i++) a2[i] = ad[i] - PA_BASE;
        ldParamA(X, W, I, ms[SP_PARAM], a2);
      }
    }
  }
}
