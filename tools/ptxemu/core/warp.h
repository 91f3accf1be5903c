// Handlers of shuffles, votes and matches between the lanes of a warp, and of ldmatrix.
#pragma once
#include "conversions.h"

template <class F>
static inline void bySubset(Warp& W, const Insn& I, u32 m, F fn) {
  if (I.o[5] == NOP_) {
    fn(m);
    return;
  }
  const u32* mm = (const u32*)(W.r + I.o[5]);
  u32 rest = m;
  while (rest) {
    int l = __builtin_ctz(rest);
    u32 v = mm[l], sub = 0;
    FORM(rest, i) if (mm[i] == v) sub |= 1u << i;
    rest &= ~sub;
    fn(sub);
  }
}
// o0 d, o1 a, o2 b, o3 c, o4 pred out or NOP_ ; sub: 0 up 1 down 2 bfly 3 idx
static void h_shfl(Exec& X, Warp& W, const Insn& I, u32 m) {
  alignas(64) u32 t[32];
  u32 pm = 0;
  const u32 *a = REGP(u32, 1), *b = REGP(u32, 2), *c = REGP(u32, 3);
  FORM(m, i) {
    u32 bv = b[i] & 31, cv = c[i] & 31, mk = (c[i] >> 8) & 31;
    s32 lane = i, j;
    s32 mxl = (lane & mk) | (cv & ~mk), mnl = lane & mk;
    bool p;
    switch (I.sub) {
      case 0:
        j = lane - (s32)bv;
        p = j >= mxl;
        break;
      case 1:
        j = lane + (s32)bv;
        p = j <= mxl;
        break;
      case 2:
        j = lane ^ (s32)bv;
        p = j <= mxl;
        break;
      default:
        j = mnl | (bv & ~mk);
        p = j <= mxl;
    }
    if (!p) j = lane;
    if (p) pm |= 1u << i;
    if (!(m >> j & 1)) {
      X.shflInactive++;
      t[i] = 0x7fdeadbe;
    } else
      t[i] = a[j];
  }
  if (I.o[0] != NOP_) put<u32>(REGP(u32, 0), t, m);
  if (I.o[4] != NOP_) putP(W, I.o[4], pm, m);
}
// vote: sub 0 all 1 any 2 uni 3 ballot ; o1 = pred, sub2 = neg
static void h_vote(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 p = *(u32*)(W.r + I.o[1]);
  if (I.sub2) p = ~p;
  bySubset(W, I, m, [&](u32 s) {
    u32 v = p & s;
    if (I.sub == 3) {
      FORM(s, i) REGP(u32, 0)[i] = v;
    } else {
      bool r = I.sub == 0 ? v == s : I.sub == 1 ? v != 0 : (v == 0 || v == s);
      putP(W, I.o[0], r ? ~0u : 0, s);
    }
  });
}
// match: sub 0 any 1 all ; sz 4/8 ; o4 pred for all
static void h_match(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 res[32];
  u32 pm = 0;
  bySubset(W, I, m, [&](u32 s) {
    FORM(s, i) {
      u64 v = rdReg(W.r + I.o[1], I.sz, i);
      u32 eq = 0;
      FORM(s, j) if (rdReg(W.r + I.o[1], I.sz, j) == v) eq |= 1u << j;
      if (I.sub == 1) {
        res[i] = eq == s ? s : 0;
        if (eq == s) pm |= 1u << i;
      } else
        res[i] = eq;
    }
  });
  FORM(m, i) if (I.o[0] != NOP_) REGP(u32, 0)[i] = res[i];
  if (I.sub == 1 && I.o[4] != NOP_) putP(W, I.o[4], pm, m);
}
// redux: sub 0 add 1 min 2 max 3 and 4 or 5 xor ; sgn
static void h_redux(Exec&, Warp& W, const Insn& I, u32 m) {
  u32 res[32];
  bySubset(W, I, m, [&](u32 s) {
    const u32* a = REGP(u32, 1);
    bool first = true;
    u32 r = 0;
    FORM(s, i) {
      u32 v = a[i];
      if (first) {
        r = v;
        first = false;
        continue;
      }
      switch (I.sub) {
        case 0:
          r += v;
          break;
        case 1:
          r = I.sgn ? (u32)std::min((s32)r, (s32)v) : std::min(r, v);
          break;
        case 2:
          r = I.sgn ? (u32)std::max((s32)r, (s32)v) : std::max(r, v);
          break;
        case 3:
          r &= v;
          break;
        case 4:
          r |= v;
          break;
        case 5:
          r ^= v;
          break;
      }
    }
    FORM(s, i) res[i] = r;
  });
  FORM(m, i) REGP(u32, 0)[i] = res[i];
}
static void h_elect(Exec&, Warp& W, const Insn& I, u32 m) {
  bySubset(W, I, m, [&](u32 s) {
    u32 l = __builtin_ctz(s);
    FORM(s, i) if (I.o[0] != NOP_) REGP(u32, 0)[i] = l;
    if (I.o[4] != NOP_) putP(W, I.o[4], 1u << l, s);
  });
}
static void h_activemask(Exec&, Warp& W, const Insn& I, u32 m) { FORM(m, i) REGP(u32, 0)[i] = m; }

// ---------------------------------------------------------------- ldmatrix / stmatrix
static void h_ldmatrix(Exec& X, Warp& W, const Insn& I, u32 m) {
  u64 ad[32];
  getaddr(W, I, I.o[0], I.aw, I.imm, ad);
  int n = I.vn;
  u32 lm = n == 4 ? ~0u : (1u << (8 * n)) - 1;
  if (I.space == SP_GEN) FORM(lm, i) {
      if (spaceOf(ad[i]) != SP_SHARED)
        fault(X, W, I, i, "oob", "ldmatrix address is not in shared memory");
      ad[i] -= SH_BASE;
    }
  ShStat& S = I.sub2 ? X.ss : X.sl;
  shRange(X, W, I, lm, ad, 16, I.sub2 ? "stmatrix" : "ldmatrix");
  chkAlign(X, W, I, lm, ad, 16, "shared (matrix row)");
  bankStats(X, lm, ad, 16, S);
  u8* b = W.blk->sh.data();
  const u32* ex = &X.K->ext[I.x];
  if (X.opt.races | X.opt.uninit_shared) FORM(lm, i) {
      if (I.sub2)
        shWrite(X, W, I, i, (u32)ad[i], 16);
      else
        shRead(X, W, I, i, (u32)ad[i], 16);
    }
  for (int q = 0; q < n; q++) {
    u32* d = (u32*)(W.r + ex[q]);
    if (!I.sub2) {
      u32 t[32];
      for (int l = 0; l < 32; l++) {
        if (!I.sub)
          memcpy(&t[l], b + ad[8 * q + l / 4] + 4 * (l % 4), 4);
        else {
          u16 lo, hi;
          memcpy(&lo, b + ad[8 * q + 2 * (l % 4)] + 2 * (l / 4), 2);
          memcpy(&hi, b + ad[8 * q + 2 * (l % 4) + 1] + 2 * (l / 4), 2);
          t[l] = lo | ((u32)hi << 16);
        }
      }
      memcpy(d, t, 128);
    } else
      for (int l = 0; l < 32; l++) {
        if (!I.sub)
          memcpy(b + ad[8 * q + l / 4] + 4 * (l % 4), &d[l], 4);
        else {
          u16 lo = d[l], hi = d[l] >> 16;
          memcpy(b + ad[8 * q + 2 * (l % 4)] + 2 * (l / 4), &lo, 2);
          memcpy(b + ad[8 * q + 2 * (l % 4) + 1] + 2 * (l / 4), &hi, 2);
        }
      }
  }
}
