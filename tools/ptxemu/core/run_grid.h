// Starts blocks, runs their warps in turn, releases barriers.
#pragma once
#include "run_warp.h"

static void releaseBars(Exec& X, Block& B) {
  u32 aliveW = 0;
  for (auto& w : B.w)
    if (w.state != WS_DONE) aliveW |= 1u << w.id;
  for (int id = 0; id < 16; id++) {
    Bar& b = B.bars[id];
    if (!b.arrived) continue;
    bool rel;
    if (b.nthreads == 0)
      rel = (aliveW & ~b.arrived) == 0;
    else
      rel = b.expect >= b.nthreads;
    if (!rel) continue;
    // vector clocks: an arrival releases (done at arrival), a waiting warp acquires everything
    // released at this barrier
    FORM(b.arrived, i) {
      Warp& w = B.w[i];
      if (w.state == WS_BAR && w.barid == id)
        for (int k = 0; k < B.nw; k++) w.vc[k] = std::max(w.vc[k], b.nv[k]);
    }
    if ((aliveW & ~b.arrived) == 0) B.epoch++;
    FORM(b.arrived, i) {
      Warp& w = B.w[i];
      if (w.state == WS_BAR && w.barid == id) {
        const Insn& I = X.K->code[w.pc];
        if (I.sub >= 2) {
          if (I.sub == 2) {
            FORM(w.mask, l)((u32*)(w.r + I.o[0]))[l] = b.cnt;
          } else
            putP(w, I.o[0], (I.sub == 3 ? b.andv : b.orv) ? ~0u : 0, w.mask);
        }
        w.pc++;
        w.state = WS_RUN;
      }
    }
    b = Bar();
  }
}
static void startBlock(Exec& X, Block& B, u64 lin) {
  Kernel& K = *X.K;
  B.lin = lin;
  B.bx = lin % X.grid[0];
  B.by = (lin / X.grid[0]) % X.grid[1];
  B.bz = lin / ((u64)X.grid[0] * X.grid[1]);
  int nw = (X.nthreads + 31) / 32;
  B.nw = nw;
  B.active = true;
  B.stamp = ++X.stampCtr;
  B.epoch = 0;
  u64 rfA = (K.rfBytes + 63) & ~63u;
  if ((int)B.w.size() != nw) {
    B.w.resize(nw);
    B.rf.resize(rfA * nw + 64);
    B.sh.resize(X.shTotal + 64);
    B.loc.resize((u64)K.localBytes * 32 * nw + 64);
    B.linit.resize((u64)K.localBytes * 32 * nw + 64);
    u64 g = X.shTotal / K.granule + 8;
    B.wclk.assign(g, 0);
    B.wpc.assign(g, 0);
    B.rpc.assign(g, 0);
    B.wwarp.assign(g, 0);
    B.rclk.assign(g * nw, 0);
    B.base = 1;
  } else {
    u32 mx = B.base;
    for (auto& w : B.w) mx = std::max(mx, w.vc[w.id]);
    B.base = mx + 1;
  }
  if (B.base > 0xF0000000u) {
    std::fill(B.wclk.begin(), B.wclk.end(), 0);
    std::fill(B.rclk.begin(), B.rclk.end(), 0);
    B.base = 1;
  }
  for (auto& c : B.wclk)
    if (c == PEND) c = 0;
  B.multi.clear();
  for (auto& b : B.bars) b = Bar();
  if (X.opt.poison) memset(B.sh.data(), 0xff, B.sh.size());
  if (K.localBytes) {
    memset(B.linit.data(), 0, B.linit.size());
    if (X.opt.poison) memset(B.loc.data(), 0xff, B.loc.size());
  }
  u8* rf = (u8*)(((u64)B.rf.data() + 63) & ~63ull);
  for (int k = 0; k < nw; k++) {
    Warp& W = B.w[k];
    W.id = k;
    W.blk = &B;
    W.r = rf + rfA * k;
    W.state = WS_RUN;
    W.pc = 0;
    W.np = 0;
    W.next = 0x7fffffff;
    W.changed = false;
    W.cp.clear();
    memset(W.cpcnt, 0, sizeof W.cpcnt);
    W.icount = 0;
    W.cc = 0;
    u32 left = X.nthreads - 32 * k;
    W.mask = left >= 32 ? ~0u : (1u << left) - 1;
    W.alive = W.full = W.mask;
    W.local = B.loc.data() + (u64)K.localBytes * 32 * k;
    W.linit = B.linit.data() + (u64)K.localBytes * 32 * k;
    for (int v = 0; v < 32; v++) W.vc[v] = B.base;
    W.vc[k] = B.base + 1;
    if (X.opt.poison) {
      u32* q = (u32*)W.r;
      for (u64 i = 0; i < rfA / 4; i++) q[i] = 0x7fc0dead;
    }
    for (auto& c : K.consts) {
      u64 v = c.bits + (c.dyn ? K.dynBase : 0);
      u8* d = W.r + c.off;
      if (c.width == 0)
        *(u32*)d = v ? ~0u : 0;
      else if (c.width == 16) {
        for (int i = 0; i < 32; i++) {
          memcpy(d + 16 * i, &v, 8);
          memset(d + 16 * i + 8, 0, 8);
        }
      } else
        for (int i = 0; i < 32; i++) wrReg(d, c.width, i, v);
    }
    for (auto& s : K.sregs)
      for (int i = 0; i < 32; i++) {
        u32 t = k * 32 + i, v = 0;
        u32 *bd = X.block, *gd = X.grid;
        switch (s.id) {
          case 0:
            v = t % bd[0];
            break;
          case 1:
            v = (t / bd[0]) % bd[1];
            break;
          case 2:
            v = t / (bd[0] * bd[1]);
            break;
          case 3:
          case 4:
          case 5:
            v = bd[s.id - 3];
            break;
          case 6:
            v = B.bx;
            break;
          case 7:
            v = B.by;
            break;
          case 8:
            v = B.bz;
            break;
          case 9:
          case 10:
          case 11:
            v = gd[s.id - 9];
            break;
          case 12:
            v = i;
            break;
          case 13:
            v = k;
            break;
          case 14:
            v = nw;
            break;
          case 15:
            v = 1u << i;
            break;
          case 16:
            v = (2u << i) - 1;
            break;
          case 17:
            v = (1u << i) - 1;
            break;
          case 18:
            v = ~((1u << i) - 1);
            break;
          case 19:
            v = ~((2u << i) - 1);
            break;
          case 20:
            v = lin % 108;
            break;
          case 21:
            v = 108;
            break;
          case 22:
            v = 0;
            break;
          case 23:
            v = X.dynShared;
            break;
          case 24:
            v = X.shTotal;
            break;
          case 28:
          case 29:
          case 30:
          case 32:
            v = 1;
            break;
          case 33:
            v = B.bx;
            break;
          case 34:
            v = B.by;
            break;
          case 35:
            v = B.bz;
            break;
          case 36:
          case 37:
          case 38:
            v = gd[s.id - 36];
            break;
          default:
            v = 0;
        }
        wrReg(W.r + s.off, s.width, i, v);
      }
  }
}
static void runGrid(Exec& X) {
  u64 nb = (u64)X.grid[0] * X.grid[1] * X.grid[2];
  u64 next = 0;
  int conc = std::min<u64>(std::max(1, X.opt.conc), nb);
  vector<std::unique_ptr<Block>> slots;
  for (int i = 0; i < conc; i++) slots.push_back(std::make_unique<Block>());
  vector<u32> perm;
  if (X.opt.order == 2) {
    perm.resize(nb);
    for (u64 i = 0; i < nb; i++) perm[i] = i;
    for (u64 i = nb - 1; i > 0; i--) std::swap(perm[i], perm[X.rnd() % (i + 1)]);
  }
  u32 q = X.opt.quantum;
  int active = 0;
  for (;;) {
    for (auto& s : slots) {
      Block& B = *s;
      if (!B.active) {
        if (next >= nb) continue;
        u64 lin = X.opt.order == 1 ? nb - 1 - next : X.opt.order == 2 ? perm[next] : next;
        next++;
        startBlock(X, B, lin);
        active++;
      }
      bool spin = conc > 1;
      do {
        bool prog = false;
        int done = 0;
        int nw = B.nw;
        int st = X.opt.sched ? X.rnd() % nw : 0;
        bool rev = X.opt.sched && (X.rnd() & 1);
        for (int j = 0; j < nw; j++) {
          int k = rev ? (st + nw - j) % nw : (st + j) % nw;
          Warp& W = B.w[k];
          if (W.state == WS_RUN) {
            runWarp(X, W, X.opt.sched ? 1 + X.rnd() % 64 : q);
            prog = true;
          }
          if (W.state == WS_DONE) done++;
        }
        if (done == nw) {
          bool bad = false;
          for (auto& b : B.bars)
            if (b.arrived && b.nthreads) bad = true;
          (void)bad;
          B.active = false;
          active--;
          X.blocksRun++;
          break;
        }
        releaseBars(X, B);
        bool can = false;
        for (auto& w : B.w)
          if (w.state == WS_RUN) can = true;
        if (!can) {
          int d = 0;
          for (auto& w : B.w)
            if (w.state == WS_DONE) d++;
          if (d == nw) continue;
          for (auto& w : B.w)
            if (w.state == WS_BAR) {
              const Insn& I = X.K->code[w.pc];
              fault(X, w, I, -1, "deadlock",
                    "barrier %d never completes: waits for %u threads, %d of %d warps have exited",
                    w.barid, B.bars[w.barid].nthreads, d, nw);
            }
        }
        (void)prog;
      } while (!spin);
    }
    if (!active && next >= nb) break;
  }
}
