// Runs the instructions of one warp.
#pragma once
#include "load_module.h"

static string jesc(const string& s) {
  string o;
  for (char c : s) {
    if (c == '"' || c == '\\') {
      o += '\\';
      o += c;
    } else if (c == '\n')
      o += "\\n";
    else if (c == '\t')
      o += "\\t";
    else if ((u8)c < 32)
      o += ' ';
    else
      o += c;
  }
  return o;
}

// Re-insert current group, merge equal PCs, choose the lowest runnable PC.
static bool resched(Exec& X, Warp& W, s32& pc, u32& mask, bool waiting) {
  if (mask) {
    bool merged = false;
    for (int i = 0; i < W.np; i++)
      if (W.pend[i].pc == pc) {
        W.pend[i].mask |= mask;
        W.pend[i].wait = false;
        merged = true;
        break;
      }
    if (!merged) W.pend[W.np++] = {pc, mask, waiting};
  }
  if (!W.np) {
    mask = 0;
    return false;
  }
  for (int pass = 0; pass < 2; pass++) {
    int best = -1;
    for (int i = 0; i < W.np; i++)
      if (!W.pend[i].wait && (best < 0 || W.pend[i].pc < W.pend[best].pc)) best = i;
    if (best >= 0) {
      pc = W.pend[best].pc;
      mask = W.pend[best].mask;
      W.pend[best] = W.pend[--W.np];
      W.next = 0x7fffffff;
      for (int i = 0; i < W.np; i++)
        if (W.pend[i].pc > pc && W.pend[i].pc < W.next) W.next = W.pend[i].pc;
      return true;
    }
    if (!W.changed) break;
    W.changed = false;
    for (int i = 0; i < W.np; i++) W.pend[i].wait = false;
  }
  const Insn& I = X.K->code[W.pend[0].pc];
  string d;
  for (int i = 0; i < W.np; i++) {
    char b[80];
    snprintf(b, 80, " [lanes 0x%08x at PTX line %u]", W.pend[i].mask, X.K->code[W.pend[i].pc].line);
    d += b;
  }
  fault(X, W, I, __builtin_ctz(W.pend[0].mask), I.kind == K_BAR ? "divergent_barrier" : "deadlock",
        "lanes of one warp wait at different synchronising instructions (or lanes named in a "
        "membermask never arrive):%s",
        d.c_str());
}
static void retireLanes(Exec& X, Warp& W, u32 m) {
  W.alive &= ~m;
  W.changed = true;
  if (!W.cp.empty()) {
    for (auto& e : W.cp)
      if (m >> e.lane & 1) X.cpPendingAtExit++;
  }
}

static void runWarp(Exec& X, Warp& W, u32 quantum) {
  Kernel& K = *X.K;
  const Insn* code = K.code.data();
  PcStat* ps = X.ps.data();
  s32 pc = W.pc;
  u32 mask = W.mask;
  u8* r = W.r;
  u64 n = 0;
  for (;;) {
    if (pc == W.next) {
      if (!resched(X, W, pc, mask, false)) break;
    }
    const Insn& I = code[pc];
    u32 m = mask;
    if (I.pred != NOP_) {
      u32 p = *(u32*)(r + I.pred);
      m &= I.pneg ? ~p : p;
    }
    if (I.cls != C_HIDDEN) {
      ps[pc].nw++;
      ps[pc].nt += __builtin_popcount(m);
    }
    X.curPc = pc;
    n++;
    switch (I.kind) {
      case K_NORMAL:
        if (m) I.fn(X, W, I, m);
        pc++;
        break;
      case K_JMP:
        pc = I.target;
        if (W.np) resched(X, W, pc, mask, false);
        break;
      case K_BRA: {
        u32 nt = mask & ~m;
        if (!m) {
          pc++;
          break;
        }
        if (!nt) {
          pc = I.target;
          if (W.np) resched(X, W, pc, mask, false);
          break;
        }
        X.divergent++;
        if (I.target == pc + 1) {
          pc++;
          break;
        }
        {
          s32 tp = I.target;
          u32 tm = m;
          s32 fp = pc + 1;
          W.next = -1;
          bool mg = false;
          for (int i = 0; i < W.np; i++)
            if (W.pend[i].pc == tp) {
              W.pend[i].mask |= tm;
              W.pend[i].wait = false;
              mg = true;
            }
          if (!mg) W.pend[W.np++] = {tp, tm, false};
          pc = fp;
          mask = nt;
          resched(X, W, pc, mask, false);
        }
        break;
      }
      case K_BRX: {
        const u32* ix = (u32*)(r + I.o[0]);
        u32 nt = mask & ~m;
        u32 rest = m;
        bool first = true;
        s32 npc = 0;
        u32 nm = 0;
        if (!m) {
          pc++;
          break;
        }
        while (rest) {
          int l = __builtin_ctz(rest);
          u32 v = ix[l], s = 0;
          FORM(rest, i) if (ix[i] == v) s |= 1u << i;
          rest &= ~s;
          if (v >= I.nx) fault(X, W, I, l, "brx", "brx.idx index %u out of range %u", v, I.nx);
          s32 t = K.ext[I.x + v];
          if (first) {
            npc = t;
            nm = s;
            first = false;
          } else if (t == npc)
            nm |= s;
          else {
            bool mg = false;
            for (int i = 0; i < W.np; i++)
              if (W.pend[i].pc == t) {
                W.pend[i].mask |= s;
                W.pend[i].wait = false;
                mg = true;
              }
            if (!mg) W.pend[W.np++] = {t, s, false};
          }
        }
        if (nt) {
          bool mg = false;
          for (int i = 0; i < W.np; i++)
            if (W.pend[i].pc == pc + 1) {
              W.pend[i].mask |= nt;
              W.pend[i].wait = false;
              mg = true;
            }
          if (!mg) W.pend[W.np++] = {pc + 1, nt, false};
        }
        if (W.np) X.divergent++;
        pc = npc;
        mask = nm;
        if (W.np) resched(X, W, pc, mask, false);
        break;
      }
      case K_EXIT: {
        if (!m) {
          pc++;
          break;
        }
        retireLanes(X, W, m);
        mask &= ~m;
        if (mask) {
          pc++;
          break;
        }
        if (!resched(X, W, pc, mask, false)) goto done;
        break;
      }
      case K_SYNC: {
        if (!m) {
          pc++;
          break;
        }
        u32 miss = 0;
        if (I.o[5] != NOP_) {
          const u32* mm = (u32*)(r + I.o[5]);
          FORM(m, i) {
            if (!(mm[i] >> i & 1))
              fault(X, W, I, i, "membermask", "executing lane is not in its own membermask 0x%08x",
                    mm[i]);
            miss |= mm[i];
          }
          miss &= W.alive & ~m;
          if (miss & mask)
            fault(X, W, I, __builtin_ctz(miss & mask), "membermask",
                  "lane named in membermask is predicated off at this instruction");
        }
        if (miss) {
          resched(X, W, pc, mask, true);
          break;
        }
        I.fn(X, W, I, m);
        pc++;
        break;
      }
      case K_ALIGNED: {
        if (!m) {
          pc++;
          break;
        }
        if (mask != W.alive) {
          resched(X, W, pc, mask, true);
          break;
        }
        if (m != ~0u)
          fault(X, W, I, __builtin_ctz(~m), "partial_warp",
                "warp-collective (.aligned) instruction executed by a partial warp (mask 0x%08x)",
                m);
        I.fn(X, W, I, m);
        pc++;
        break;
      }
      case K_BAR: {
        if (!m) {
          pc++;
          break;
        }
        if (m != mask)
          fault(X, W, I, __builtin_ctz(m), "divergent_barrier",
                "barrier under a predicate that is not uniform in the warp");
        if (mask != W.alive) {
          resched(X, W, pc, mask, true);
          break;
        }
        int l = __builtin_ctz(m);
        u32 id = ((u32*)(r + I.o[1]))[l];
        if (id > 15) fault(X, W, I, l, "barrier", "barrier id %u", id);
        Bar& b = W.blk->bars[id];
        u32 nt = I.o[2] == NOP_ ? 0 : ((u32*)(r + I.o[2]))[l];
        if (nt % 32)
          fault(X, W, I, l, "barrier", "barrier thread count %u is not a multiple of 32", nt);
        if (b.arrived && (b.nthreads != nt))
          fault(X, W, I, l, "barrier", "warps give different thread counts for barrier %u", id);
        b.nthreads = nt;
        b.line = I.line;
        if (b.arrived >> W.id & 1)
          fault(X, W, I, l, "barrier", "warp arrives twice at barrier %u", id);
        b.arrived |= 1u << W.id;
        b.expect += 32;
        for (int k = 0; k < W.blk->nw; k++) b.nv[k] = std::max(b.nv[k], W.vc[k]);
        W.vc[W.id]++;
        if (I.sub >= 2) {
          u32 p = *(u32*)(r + I.o[3]);
          if (I.sub2) p = ~p;
          p &= m;
          b.cnt += __builtin_popcount(p);
          b.andv = b.andv && p == m;
          b.orv = b.orv || p;
          W.redp = m;
        }
        if (I.sub == 1) {
          pc++;
          break;
        }
        W.state = WS_BAR;
        W.barid = id;
        W.pc = pc;
        W.mask = mask;
        W.icount += n;
        X.totalInsns += n;
        return;
      }
      default:
        fault(X, W, I, 0, "internal", "bad kind");
    }
    if (n >= quantum) {
      W.pc = pc;
      W.mask = mask;
      W.icount += n;
      X.totalInsns += n;
      if (W.icount > X.opt.max_warp_insns)
        fault(X, W, I, mask ? __builtin_ctz(mask) : 0, "instruction_limit",
              "warp executed more than %llu instructions (infinite loop or inter-block wait?)",
              (unsigned long long)X.opt.max_warp_insns);
      return;
    }
  }
done:
  W.state = WS_DONE;
  W.icount += n;
  X.totalInsns += n;
  W.mask = 0;
}
