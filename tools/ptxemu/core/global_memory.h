// Global memory: sectors, races between blocks, reads of what was never written.
#pragma once
#include "execution.h"

static inline bool setbit(vector<u64>& v, u64 i) {
  u64& w = v[i >> 6];
  u64 b = 1ull << (i & 63);
  bool old = w & b;
  w |= b;
  return !old;
}
static void markSector(Exec& X, Warp& W, u64 sec, bool wr, MemStat& S) {
  u64 a = sec << 5;
  Region* r = X.regions[a >> REG_SHIFT];
  u64 k = (a - (r->va & ~31ull)) >> 5;
  if (r->module) return;
  auto& bm = wr ? r->wr : r->rd;
  auto& st = wr ? r->stwr : r->strd;
  if (bm.empty()) {
    u64 n = (r->size + 95) / 32 + 2;
    bm.assign((n + 63) / 64, 0);
    st.assign(n, 0);
  }
  bm[k >> 6] |= 1ull << (k & 63);
  if (st[k] != W.blk->stamp) {
    st[k] = W.blk->stamp;
    S.blk_sectors++;
  }
}
static void countSectors(Exec& X, Warp& W, u32 m, const u64* ad, u32 sz, bool wr, MemStat& S,
                         bool rdwr = false) {
  S.req++;
  u32 n = __builtin_popcount(m);
  S.lanes += n;
  S.bytes += (u64)n * sz;
  if (!X.opt.stats) return;
  u64 sec[64];
  u32 bm[64];
  int ns = 0;
  u32 szm = sz >= 32 ? ~0u : ((1u << sz) - 1);
  FORM(m, i) {
    u64 s = ad[i] >> 5;
    u32 b = szm << (ad[i] & 31);
    if (ns && sec[ns - 1] == s) {
      bm[ns - 1] |= b;
      continue;
    }
    int k = ns - 1;
    while (k >= 0 && sec[k] != s) k--;
    if (k < 0) {
      k = ns++;
      sec[k] = s;
      bm[k] = 0;
    }
    bm[k] |= b;
  }
  S.sectors += ns;
  for (int k = 0; k < ns; k++) {
    S.ubytes += __builtin_popcount(bm[k]);
    markSector(X, W, sec[k], wr, S);
    if (rdwr) {
      MemStat d;
      markSector(X, W, sec[k], false, d);
    }
  }
}
static void shadowGran(Region* r, int g) {  // make shadow granularity <= g
  if (r->shadow && r->gran <= g) return;
  u64 n = r->size / g + 8;
  u64* ns = (u64*)calloc(n, 8);
  if (r->shadow) {
    int f = r->gran / g;
    for (u64 i = 0; i < r->shadowN; i++)
      if (r->shadow[i])
        for (int j = 0; j < f; j++)
          if (i * f + j < n) ns[i * f + j] = r->shadow[i];
    free(r->shadow);
  }
  r->shadow = ns;
  r->shadowN = n;
  r->gran = g;
}
static inline void initRange(Region* r, u64 off, u32 sz) {
  for (u32 b = 0; b < sz; b++) {
    u64 k = off + b;
    r->init[k >> 6] |= 1ull << (k & 63);
  }
}
// called before the data is stored.  val(lane) points at the bytes to be stored.
static void noteGlobalWrite(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz,
                            const u8* (*val)(void*, u32), void* ctx, bool atomic) {
  FORM(m, i) {
    Region* r = X.regions[ad[i] >> REG_SHIFT];
    u64 off = ad[i] - r->va;
    if (r->trackInit) initRange(r, off, sz);
    if (!X.opt.gl_ww || atomic) continue;
    int g = sz < 4 ? sz : 4;
    if (!r->shadow || r->gran > g) shadowGran(r, g);
    u64 me = ((W.blk->lin * X.nthreads + W.id * 32 + i + 1) << 24) | (W.blk->epoch & 0xFFFFFF);
    u64 thr0 = W.blk->lin * X.nthreads + 1, thr1 = thr0 + X.nthreads;
    const u8* nv = val(ctx, i);
    const u8* hp = r->host + off;
    for (u64 k = off / r->gran; k < (off + sz) / r->gran; k++) {
      u64 o = r->shadow[k];
      if (o && (o >> 24) != (me >> 24)) {
        u64 ot = o >> 24;
        bool sameblk = ot >= thr0 && ot < thr1;
        bool ordered = sameblk && (o & 0xFFFFFF) != (me & 0xFFFFFF);
        if (!ordered) {
          u64 bo = k * r->gran - off;
          if (memcmp(hp + bo, nv + bo, r->gran)) {
            if (!X.glWW)
              X.warnings.push_back("global write-write race (different values) at " +
                                   descAddr(X, r->va + k * r->gran) + " -- " + where(X, W, I, i));
            X.glWW++;
          } else
            X.glWWsame++;
        }
      }
      r->shadow[k] = me;
    }
    memcpy(r->host + off, nv, sz);  // keep memory current so that later lanes compare against it
  }
}
static void chkInitGlobal(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz) {
  FORM(m, i) {
    Region* r = X.regions[ad[i] >> REG_SHIFT];
    if (!r->trackInit) continue;
    u64 off = ad[i] - r->va;
    for (u32 b = 0; b < sz; b++) {
      u64 k = off + b;
      if (!(r->init[k >> 6] >> (k & 63) & 1))
        fault(X, W, I, i, "uninit_global",
              "read of global bytes never written in buffer declared uninitialised: %s",
              descAddr(X, ad[i]).c_str());
    }
  }
}
// read of a location that an unordered thread wrote in this launch (other block, or other warp of
// this block since the last block barrier)
static void chkGlobalRW(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz) {
  u64 thr0 = W.blk->lin * X.nthreads + 1, thr1 = thr0 + X.nthreads, w0 = thr0 + W.id * 32;
  FORM(m, i) {
    Region* r = X.regions[ad[i] >> REG_SHIFT];
    if (!r->shadow) continue;
    u64 off = ad[i] - r->va;
    for (u64 k = off / r->gran; k <= (off + sz - 1) / r->gran; k++) {
      u64 o = r->shadow[k];
      if (!o) continue;
      u64 t = o >> 24;
      if (t >= w0 && t < w0 + 32) continue;
      if (t >= thr0 && t < thr1 && (o & 0xFFFFFF) != (W.blk->epoch & 0xFFFFFF)) continue;
      if (!X.glRW)
        X.warnings.push_back(
            "global read of data written by an unordered thread in the same launch: " +
            descAddr(X, r->va + k * r->gran) + " -- " + where(X, W, I, i));
      X.glRW++;
      break;
    }
  }
}
static inline bool anyTrack(Exec& X, u32 m, const u64* ad) {
  FORM(m, i) if (X.regions[ad[i] >> REG_SHIFT]->trackInit) return true;
  return false;
}
