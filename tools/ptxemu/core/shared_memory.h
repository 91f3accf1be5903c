// Shared memory: bank conflicts, and races by vector clocks of warps.
#pragma once
#include "global_memory.h"

// ---------------------------------------------------------------- shared memory
static void bankStats(Exec& X, u32 m, const u64* ad, u32 sz, ShStat& S) {
  S.req++;
  u32 n = __builtin_popcount(m);
  S.lanes += n;
  S.bytes += (u64)n * sz;
  if (!X.opt.stats) return;
  int grp = sz <= 4 ? 32 : sz == 8 ? 16 : 8;
  for (int g = 0; g < 32; g += grp) {
    u32 gm = grp == 32 ? m : (m >> g) & ((1u << grp) - 1);
    if (!gm) continue;
    gm <<= (grp == 32 ? 0 : g);
    S.ideal++;
    u32 words[32][8];
    u8 cnt[32];
    memset(cnt, 0, 32);
    int mx = 1;
    u32 nw = sz <= 4 ? 1 : sz / 4;
    u32 over[32];
    bool ov = false;
    FORM(gm, i) for (u32 k = 0; k < nw; k++) {
      u32 w = (u32)(ad[i] >> 2) + k, b = w & 31;
      int c = cnt[b] > 8 ? 8 : cnt[b], j = 0;
      for (; j < c; j++)
        if (words[b][j] == w) break;
      if (j == c) {
        if (c < 8) {
          words[b][c] = w;
          cnt[b]++;
          if (cnt[b] > mx) mx = cnt[b];
        } else {
          ov = true;
        }
      }
    }
    if (ov) {  // exact slow path
      std::set<u32> sb[32];
      FORM(gm, i) for (u32 k = 0; k < nw; k++) {
        u32 w = (u32)(ad[i] >> 2) + k;
        sb[w & 31].insert(w);
      }
      mx = 1;
      for (auto& s : sb) mx = std::max<int>(mx, s.size());
    }
    (void)over;
    S.wave += mx;
  }
}
static void raceReport(Exec& X, Warp& W, const char* kind, u32 pc1, u32 pc2, u64 addr, u32 w1,
                       u32 w2) {
  X.raceCount++;
  u64 key = ((u64)pc1 << 32) | pc2;
  auto it = X.raceKey.find(key);
  if (it != X.raceKey.end()) {
    X.races[it->second].count++;
    return;
  }
  if (X.races.size() >= 50) return;
  X.raceKey[key] = X.races.size();
  auto& c = X.K->code;
  X.races.push_back({kind, "shared", pc1 < c.size() ? c[pc1].line : 0,
                     pc2 < c.size() ? c[pc2].line : 0, addr, W.blk->lin, w1, w2, 1});
}
static const u32 PEND = 0xFFFFFFFFu;
struct StCtx {
  Warp* W;
  const u32* ex;
  const Insn* I;
  u8 buf[64];
};
static const u8* stVal(void* c, u32 lane);
static inline void shRead(Exec& X, Warp& W, const Insn& I, u32 lane, u32 a, u32 sz) {
  Block& B = *W.blk;
  u32 G = X.K->granule;
  u32 g0 = a / G, g1 = (a + sz - 1) / G;
  u32 own = W.vc[W.id];
  int nw = B.nw;
  for (u32 g = g0; g <= g1; g++) {
    u32* rc = &B.rclk[(u64)g * nw];
    if (rc[W.id] == own) continue;
    u32 wc = B.wclk[g];
    u32 ww = B.wwarp[g] & 0x1f;
    if (wc <= B.base) {
      if (X.opt.uninit_shared)
        fault(X, W, I, lane, "uninit_shared",
              "read of shared memory never written by this block: shared offset %u (access at %u, "
              "%u bytes)",
              g * G, a, sz);
    } else if (wc == PEND) {
      if (X.opt.races)
        raceReport(X, W, "read of cp.async destination before wait_group", B.wpc[g], X.curPc, a, ww,
                   W.id);
    } else if (ww != (u32)W.id && wc > W.vc[ww] && X.opt.races) {
      bool ok = false;
      if (B.wwarp[g] & 0x40)
        for (auto& p : B.multi[g])
          if (p.first == (u32)W.id || p.second <= W.vc[p.first])
            ok = true;  // ordered after one of several same-value writers
      if (!ok) raceReport(X, W, "write->read", B.wpc[g], X.curPc, a, ww, W.id);
    }
    rc[W.id] = own;
    B.rpc[g] = X.curPc;
  }
}
// A store is benign when another warp wrote the same bytes from the same instruction without
// ordering (Triton stores replicated layouts that way); counted in shBenign instead of being
// reported.
static inline void shWrite(Exec& X, Warp& W, const Insn& I, u32 lane, u32 a, u32 sz,
                           bool atomic = false, bool async = false, StCtx* c = nullptr) {
  Block& B = *W.blk;
  u32 G = X.K->granule;
  u32 g0 = a / G, g1 = (a + sz - 1) / G;
  u32 own = W.vc[W.id];
  int nw = B.nw;
  for (u32 g = g0; g <= g1; g++) {
    u32* rc = &B.rclk[(u64)g * nw];
    u32 wc = B.wclk[g], ww = B.wwarp[g] & 0x1f;
    bool wasAtomic = B.wwarp[g] & 0x80, benign = false;
    if (X.opt.races) {
      bool unord = wc != PEND && ww != (u32)W.id && wc > W.vc[ww];
      if (unord && c && B.wpc[g] == X.curPc) {
        const u8* nv = stVal(c, lane);
        u32 lo = std::max(g * G, a), hi = std::min(g * G + G, a + sz);
        benign = !memcmp(B.sh.data() + lo, nv + (lo - a), hi - lo);
      }
      if (benign) {
        X.shBenign++;
        auto& mv = B.multi[g];
        if (!(B.wwarp[g] & 0x40)) {
          mv.clear();
          mv.push_back({ww, wc});
        }
        mv.push_back({(u32)W.id, own});
        B.wclk[g] = own;
        B.wwarp[g] = W.id | 0x40;
        continue;
      }
      if (wc == PEND)
        raceReport(X, W, "write to pending cp.async destination", B.wpc[g], X.curPc, a, ww, W.id);
      else if (unord && !(atomic && wasAtomic))
        raceReport(X, W, "write->write", B.wpc[g], X.curPc, a, ww, W.id);
      for (int v = 0; v < nw; v++)
        if (rc[v] > W.vc[v] && v != W.id) {
          if (atomic && wasAtomic) continue;
          raceReport(X, W, "read->write", B.rpc[g], X.curPc, a, v, W.id);
          break;
        }
    }
    if (async) rc[W.id] = 0;
    B.wclk[g] = async ? PEND : own;
    B.wwarp[g] = W.id | (atomic ? 0x80 : 0);
    B.wpc[g] = X.curPc;
  }
}
static inline void shRange(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz,
                           const char* what) {
  u64 lim = X.shTotal;
  FORM(m, i)
  if (ad[i] + sz > lim || ad[i] > lim)
    fault(X, W, I, i, "shared_oob",
          "out-of-bounds shared %s of %u bytes at shared offset %lld (block has %u bytes)", what,
          sz, (long long)ad[i], X.shTotal);
}
