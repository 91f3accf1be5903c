// Handlers of cp.async, atomics, printf, assert and trap.
#pragma once
#include "products.h"

// ---------------------------------------------------------------- cp.async
// o0 dst (aw), o1 src (sub = width), imm dst off, o3.. src off in target(imm2) ; sz = cp size; o2 =
// src-size reg or NOP_; o4 = ignore-src pred
static void h_cpasync(Exec& X, Warp& W, const Insn& I, u32 m) {
  u64 da[32], sa[32];
  getaddr(W, I, I.o[0], I.aw, I.imm, da);
  getaddr(W, I, I.o[1], I.sub, (s64)(s32)I.target, sa);
  u32 sz = I.sz;
  if (I.aw == 8) FORM(m, i) if (spaceOf(da[i]) == SP_SHARED) da[i] -= SH_BASE;
  shRange(X, W, I, m, da, sz, "cp.async write");
  chkAlign(X, W, I, m, da, sz, "shared (cp.async destination)");
  chkAlign(X, W, I, m, sa, sz, "global (cp.async source)");
  bankStats(X, m, da, sz, X.ss);
  u32 n[32];
  u32 rm = 0;
  FORM(m, i) {
    n[i] = I.o[2] != NOP_ ? ((u32*)(W.r + I.o[2]))[i] : sz;
    if (I.o[4] != NOP_ && ((*(u32*)(W.r + I.o[4]) >> i & 1) != I.sub2)) n[i] = 0;
    if (n[i] > sz)
      fault(X, W, I, i, "cp_async", "cp.async src-size %u exceeds cp-size %u", n[i], sz);
    if (n[i]) rm |= 1u << i;
  }
  u8* hp[32];
  u32 full = 0;
  FORM(rm, i) if (n[i] == sz) full |= 1u << i;
  if (full) {
    Region* r = xlate(X, W, I, full, sa, sz, false, hp);
    (void)r;
    countSectors(X, W, full, sa, sz, false, X.gl);
    if (X.opt.uninit_global) chkInitGlobal(X, W, I, full, sa, sz);
  }
  FORM(rm & ~full, i) {
    xlate(X, W, I, 1u << i, sa, n[i], false, hp);
    countSectors(X, W, 1u << i, sa, n[i], false, X.gl);
  }
  X.cpasyncBytes += (u64)sz * __builtin_popcount(m);
  FORM(m, i) {
    if (X.opt.races | X.opt.uninit_shared) shWrite(X, W, I, i, (u32)da[i], sz, false, true);
    CpEnt e;
    e.dst = (u32)da[i];
    e.size = sz;
    e.lane = i;
    e.grp = W.cpcnt[i];
    e.pc = X.curPc;
    memset(e.data, 0, 16);
    if (n[i]) memcpy(e.data, hp[i], n[i]);
    W.cp.push_back(e);
  }
}
static void cpComplete(Exec& X, Warp& W, u32 m, u32 N, bool all) {
  if (W.cp.empty()) return;
  Block& B = *W.blk;
  u32 G = X.K->granule;
  size_t k = 0;
  for (size_t q = 0; q < W.cp.size(); q++) {
    CpEnt& e = W.cp[q];
    bool done = (m >> e.lane & 1) && (all || e.grp + N < W.cpcnt[e.lane]);
    if (done) {
      memcpy(B.sh.data() + e.dst, e.data, e.size);
      if (X.opt.races | X.opt.uninit_shared)
        for (u32 g = e.dst / G; g <= (e.dst + e.size - 1) / G; g++) {
          B.wclk[g] = W.vc[W.id];
          B.wwarp[g] = W.id;
          B.wpc[g] = e.pc;
        }
    } else {
      if (k != q) W.cp[k] = e;
      k++;
    }
  }
  W.cp.resize(k);
}
static void h_cpcommit(Exec&, Warp& W, const Insn& I, u32 m) { FORM(m, i) W.cpcnt[i]++; }
static void h_cpwait(Exec& X, Warp& W, const Insn& I, u32 m) {
  cpComplete(X, W, m, (u32)I.imm, I.sub);
}

// ---------------------------------------------------------------- atomics
enum { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
static u64 atomApply(int op, Ty t, u64 old, u64 b, u64 c) {
  switch (op) {
    case A_EXCH:
      return b;
    case A_CAS:
      return old == b ? c : old;
    case A_AND:
      return old & b;
    case A_OR:
      return old | b;
    case A_XOR:
      return old ^ b;
    case A_INC:
      return (u32)old >= (u32)b ? 0 : (u32)old + 1;
    case A_DEC:
      return ((u32)old == 0 || (u32)old > (u32)b) ? (u32)b : (u32)old - 1;
  }
  switch (t) {
    case T_U32:
    case T_B32:
      return op == A_ADD   ? (u32)(old + b)
             : op == A_MIN ? std::min((u32)old, (u32)b)
                           : std::max((u32)old, (u32)b);
    case T_S32:
      return op == A_ADD
                 ? (u32)(old + b)
                 : (u32)(op == A_MIN ? std::min((s32)old, (s32)b) : std::max((s32)old, (s32)b));
    case T_U64:
    case T_B64:
      return op == A_ADD ? old + b : op == A_MIN ? std::min(old, b) : std::max(old, b);
    case T_S64:
      return op == A_ADD
                 ? old + b
                 : (u64)(op == A_MIN ? std::min((s64)old, (s64)b) : std::max((s64)old, (s64)b));
    case T_F32: {
      float x = bitsf((u32)old), y = bitsf((u32)b);
      return fbits(op == A_ADD ? x + y : op == A_MIN ? FMin<float>::f(x, y) : FMax<float>::f(x, y));
    }
    case T_F64: {
      double x = bitsd(old), y = bitsd(b);
      return dbits(op == A_ADD   ? x + y
                   : op == A_MIN ? FMin<double>::f(x, y)
                                 : FMax<double>::f(x, y));
    }
    case T_F16: {
      double x = h2f((u16)old), y = h2f((u16)b);
      return d2h(op == A_ADD ? x + y : op == A_MIN ? FMin<double>::f(x, y) : FMax<double>::f(x, y));
    }
    case T_BF16: {
      double x = b2f((u16)old), y = b2f((u16)b);
      return d2b(op == A_ADD ? x + y : op == A_MIN ? FMin<double>::f(x, y) : FMax<double>::f(x, y));
    }
    case T_F16X2:
    case T_BF16X2: {
      Ty h = t == T_F16X2 ? T_F16 : T_BF16;
      return (atomApply(op, h, old & 0xffff, b & 0xffff, 0) & 0xffff) |
             (atomApply(op, h, (old >> 16) & 0xffff, (b >> 16) & 0xffff, 0) << 16);
    }
    default:
      return 0;
  }
}
// ext: d regs (vn, NOP_ for red), b regs (vn), [c reg]; o0 addr; sub = op; ty; sz elem size
static void h_atom(Exec& X, Warp& W, const Insn& I, u32 m) {
  u64 ad[32];
  getaddr(W, I, I.o[0], I.aw, I.imm, ad);
  const u32* ex = &X.K->ext[I.x];
  int vn = I.vn;
  u32 sz = I.sz * vn;
  u32 gm = 0, sm = 0;
  if (I.space == SP_GLOBAL)
    gm = m;
  else if (I.space == SP_SHARED)
    sm = m;
  else
    FORM(m, i) {
      int s = spaceOf(ad[i]);
      if (s == SP_SHARED) {
        sm |= 1u << i;
        ad[i] -= SH_BASE;
      } else if (s == SP_GLOBAL)
        gm |= 1u << i;
      else
        fault(X, W, I, i, "oob", "atomic on local/param address");
    }
  u8* hp[32];
  if (gm) {
    chkAlign(X, W, I, gm, ad, sz, "global atomic");
    Region* r = xlate(X, W, I, gm, ad, sz, true, hp);
    if (X.opt.uninit_global && (!r || r->trackInit)) chkInitGlobal(X, W, I, gm, ad, sz);
    if (!(r && r->module)) countSectors(X, W, gm, ad, sz, true, X.ga, true);
    if (!r || r->trackInit) noteGlobalWrite(X, W, I, gm, ad, sz, nullptr, nullptr, true);
  }
  if (sm) {
    shRange(X, W, I, sm, ad, sz, "atomic");
    chkAlign(X, W, I, sm, ad, sz, "shared atomic");
    u8* b = W.blk->sh.data();
    FORM(sm, i) hp[i] = b + ad[i];
    if (X.opt.races | X.opt.uninit_shared) FORM(sm, i) {
        Block& B = *W.blk;
        u32 G = X.K->granule;
        u32 a = (u32)ad[i];
        for (u32 g = a / G; g <= (a + sz - 1) / G; g++)
          if (B.wclk[g] <= B.base && X.opt.uninit_shared && I.sub != A_EXCH)
            fault(X, W, I, i, "uninit_shared",
                  "atomic on shared memory never written by this block: shared offset %u", a);
        shWrite(X, W, I, i, a, sz, true);
      }
  }
  FORM(m, i) for (int j = 0; j < vn; j++) {
    u8* p = hp[i] + j * I.sz;
    u64 old = rdN(p, I.sz);
    u64 b = rdReg(W.r + ex[vn + j], I.dw, i),
        c = I.sub == A_CAS ? rdReg(W.r + ex[2 * vn], I.dw, i) : 0;
    if (I.sz < 8) {
      u64 mk = (1ull << 8 * I.sz) - 1;
      b &= mk;
      c &= mk;
    }
    u64 v = atomApply(I.sub, (Ty)I.ty, old, b, c);
    memcpy(p, &v, I.sz);
    if (ex[j] != NOP_) wrReg(W.r + ex[j], I.dw, i, old);
  }
}
// ---------------------------------------------------------------- extern calls
static u8* anyPtr(Exec& X, Warp& W, const Insn& I, int lane, u64 a, u32 sz) {
  int s = spaceOf(a);
  if (s == SP_LOCAL) {
    u64 o = a - LO_BASE;
    if (o + sz > X.K->localBytes) fault(X, W, I, lane, "local_oob", "bad pointer");
    return W.local + (u64)lane * X.K->localBytes + o;
  }
  if (s == SP_SHARED) {
    u64 o = a - SH_BASE;
    if (o + sz > X.shTotal) fault(X, W, I, lane, "shared_oob", "bad pointer");
    return W.blk->sh.data() + o;
  }
  Region* r = findRegion(X, W, I, lane, a, sz, false);
  return r->host + (a - r->va);
}
static string cstrAt(Exec& X, Warp& W, const Insn& I, int lane, u64 a) {
  string s;
  for (int k = 0; k < 1000; k++) {
    char c = *(char*)anyPtr(X, W, I, lane, a + k, 1);
    if (!c) break;
    s += c;
  }
  return s;
}
// ext: local offsets of params: [retoff or NOP_, p0, p1,...]
static void h_vprintf(Exec& X, Warp& W, const Insn& I, u32 m) {
  const u32* ex = &X.K->ext[I.x];
  u32 L = X.K->localBytes;
  FORM(m, i) {
    u8* l = W.local + (u64)i * L;
    u64 f, a;
    memcpy(&f, l + ex[1], 8);
    memcpy(&a, l + ex[2], 8);
    string fmt = cstrAt(X, W, I, i, f), out;
    u64 off = 0;
    char b[256];
    for (size_t k = 0; k < fmt.size(); k++) {
      if (fmt[k] != '%') {
        out += fmt[k];
        continue;
      }
      if (k + 1 < fmt.size() && fmt[k + 1] == '%') {
        out += '%';
        k++;
        continue;
      }
      string sp = "%";
      k++;
      while (k < fmt.size() && !isalpha((u8)fmt[k])) sp += fmt[k++];
      bool ll = false;
      while (k < fmt.size() && (fmt[k] == 'l' || fmt[k] == 'h' || fmt[k] == 'z')) {
        if (fmt[k] != 'h') ll = true;
        k++;
      }
      if (k >= fmt.size()) break;
      char c = fmt[k];
      bool big = ll || strchr("feEgGaAps", c);
      if (big)
        off = (off + 7) & ~7ull;
      else
        off = (off + 3) & ~3ull;
      u8* p = anyPtr(X, W, I, i, a + off, big ? 8 : 4);
      off += big ? 8 : 4;
      u64 v = 0;
      memcpy(&v, p, big ? 8 : 4);
      if (strchr("feEgGaA", c)) {
        snprintf(b, 256, (sp + c).c_str(), bitsd(v));
        out += b;
      } else if (c == 's')
        out += cstrAt(X, W, I, i, v);
      else if (c == 'p') {
        snprintf(b, 256, "0x%llx", (unsigned long long)v);
        out += b;
      } else if (c == 'c')
        out += (char)v;
      else {
        sp += ll ? "ll" : "";
        sp += c;
        if (ll)
          snprintf(b, 256, sp.c_str(), (long long)v);
        else if (c == 'd' || c == 'i')
          snprintf(b, 256, sp.c_str(), (int)v);
        else
          snprintf(b, 256, sp.c_str(), (unsigned)v);
        out += b;
      }
    }
    if (X.printed.size() < 1000000) X.printed += out;
    if (ex[0] != NOP_) {
      u32 n = 1;
      memcpy(l + ex[0], &n, 4);
      memset(W.linit + (u64)i * L + ex[0], 1, 4);
    }
  }
}
static void h_assertfail(Exec& X, Warp& W, const Insn& I, u32 m) {
  const u32* ex = &X.K->ext[I.x];
  u32 L = X.K->localBytes;
  int i = __builtin_ctz(m);
  u8* l = W.local + (u64)i * L;
  u64 msg = 0, file = 0;
  u32 line = 0;
  if (I.vn > 1) memcpy(&msg, l + ex[1], 8);
  if (I.vn > 2) memcpy(&file, l + ex[2], 8);
  if (I.vn > 3) memcpy(&line, l + ex[3], 4);
  fault(X, W, I, i, "device_assert", "device assertion failed: %s (%s:%u)",
        cstrAt(X, W, I, i, msg).c_str(), cstrAt(X, W, I, i, file).c_str(), line);
}
static void h_trap(Exec& X, Warp& W, const Insn& I, u32 m) {
  fault(X, W, I, __builtin_ctz(m), "trap", "trap executed");
}
static void h_unsupp(Exec& X, Warp& W, const Insn& I, u32 m) {
  fault(X, W, I, __builtin_ctz(m), "unsupported", "unsupported instruction executed (%s)",
        X.K->ops[I.opid].c_str());
}
