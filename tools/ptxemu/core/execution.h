// A launch in progress, error messages, writes to registers under a mask, addresses.
#pragma once
#include "core.h"

struct Exec {
  Kernel* K = nullptr;
  Options opt;
  u32 grid[3], block[3];
  u32 nthreads = 0;
  u32 dynShared = 0, shTotal = 0;
  const u8* params = nullptr;
  u32 paramBytes = 0;
  vector<Region*> regions;  // indexed by slot (va >> REG_SHIFT)
  vector<std::unique_ptr<Region>> own;
  vector<PcStat> ps;
  MemStat gl, gs, ga;
  ShStat sl, ss;
  u64 llBytes = 0, lsBytes = 0;
  u64 cpasyncBytes = 0, cpPendingAtExit = 0;
  u64 shflInactive = 0, glWW = 0, glWWsame = 0, glRW = 0;
  u64 divergent = 0;
  vector<RaceRep> races;
  u64 raceCount = 0, shBenign = 0;
  u64 uninitLocal = 0;
  std::unordered_map<u64, size_t> raceKey;
  vector<string> warnings;
  string printed;
  u32 curPc = 0;
  u64 blocksRun = 0;
  u32 stampCtr = 0;
  u64 totalInsns = 0;
  vector<string>* srcLines = nullptr;
  vector<string>* files = nullptr;
  u64 rng = 1;
  u32 rnd() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (u32)(rng >> 16);
  }
};

static string where(Exec& X, Warp& W, const Insn& I, int lane) {
  char b[600];
  u32 t = W.id * 32 + (lane < 0 ? 0 : lane);
  u32 bx = X.block[0], by = X.block[1];
  string text =
      (X.srcLines && I.line >= 1 && I.line <= X.srcLines->size()) ? (*X.srcLines)[I.line - 1] : "";
  size_t p = text.find_first_not_of(" \t");
  if (p != string::npos) text = text.substr(p);
  string src;
  if (I.locf && X.files && I.locf < X.files->size() && !(*X.files)[I.locf].empty())
    src = " [src " + (*X.files)[I.locf] + ":" + std::to_string(I.locl) + "]";
  snprintf(b, 600, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u)%s, PTX line %u: '%s'%s",
           X.K->name.c_str(), W.blk->bx, W.blk->by, W.blk->bz, t % bx, (t / bx) % by, t / (bx * by),
           lane < 0 ? " (whole warp)" : "", I.line, text.substr(0, 160).c_str(), src.c_str());
  return b;
}
[[noreturn]] static void fault(Exec& X, Warp& W, const Insn& I, int lane, const char* kind,
                               const char* f, ...) {
  char b[700];
  va_list a;
  va_start(a, f);
  vsnprintf(b, 700, f, a);
  va_end(a);
  throw EmuError{kind, string(b) + " -- " + where(X, W, I, lane)};
}

// ---------------------------------------------------------------- masked register writes
// Lanes outside the mask keep their value. The loop becomes a blend at any vector width.
template <class T>
static inline void put(T* d, const T* t, u32 m) {
  if (m == ~0u) {
    memcpy(d, t, 32 * sizeof(T));
    return;
  }
  for (int i = 0; i < 32; i++) d[i] = m >> i & 1 ? t[i] : d[i];
}
static inline void putw(void* d, const void* t, u32 m, int w) {
  if (w == 4)
    put<u32>((u32*)d, (const u32*)t, m);
  else if (w == 8)
    put<u64>((u64*)d, (const u64*)t, m);
  else
    put<u16>((u16*)d, (const u16*)t, m);
}
template <class T>
static inline void putT(T* d, const T* t, u32 m) {
  if (sizeof(T) == 4)
    put<u32>((u32*)d, (const u32*)t, m);
  else if (sizeof(T) == 8)
    put<u64>((u64*)d, (const u64*)t, m);
  else
    put<u16>((u16*)d, (const u16*)t, m);
}
#define REGP(T, k) ((T*)(W.r + I.o[k]))
#define FORM(m, i) for (u32 _mm = (m), i; _mm && ((i = __builtin_ctz(_mm)), true); _mm &= _mm - 1)

// ---------------------------------------------------------------- addresses
static inline void getaddr(Warp& W, const Insn& I, u32 off, u8 aw, s64 imm, u64* ad) {
  if (aw == 8) {
    const u64* b = (const u64*)(W.r + off);
    for (int i = 0; i < 32; i++) ad[i] = b[i] + imm;
  } else {
    const u32* b = (const u32*)(W.r + off);
    for (int i = 0; i < 32; i++) ad[i] = (u32)(b[i] + (u32)imm);
  }
}
static string descAddr(Exec& X, u64 a) {
  char b[300];
  u64 slot = a >> REG_SHIFT;
  if ((a >> 40) == (SH_BASE >> 40)) {
    snprintf(b, 300, "shared offset %llu of %u", (unsigned long long)(a - SH_BASE), X.shTotal);
    return b;
  }
  if ((a >> 40) == (LO_BASE >> 40)) {
    snprintf(b, 300, "local offset %llu of %u", (unsigned long long)(a - LO_BASE), X.K->localBytes);
    return b;
  }
  // nearest buffer
  for (int d = 0; d < 2; d++) {
    u64 s = slot + d;
    if (s < X.regions.size() && X.regions[s]) {
      Region* r = X.regions[s];
      s64 off = (s64)(a - r->va);
      snprintf(b, 300,
               "address 0x%llx is at byte offset %lld of buffer '%s' (valid bytes [%llu,%llu)%s)",
               (unsigned long long)a, (long long)off, r->name.c_str(),
               (unsigned long long)(r->iv.empty() ? 0 : r->iv[0].lo),
               (unsigned long long)(r->iv.empty() ? 0 : r->iv.back().hi),
               r->iv.size() > 1 ? ", several views" : "");
      return b;
    }
  }
  snprintf(b, 300, "address 0x%llx belongs to no buffer%s", (unsigned long long)a,
           a < (1ull << REG_SHIFT) ? " (null-ish pointer)" : "");
  return b;
}
static Region* findRegion(Exec& X, Warp& W, const Insn& I, int lane, u64 a, u32 sz, bool wr) {
  u64 slot = a >> REG_SHIFT;
  Region* r = slot < X.regions.size() ? X.regions[slot] : nullptr;
  if (r) {
    u64 off = a - r->va;
    if (r->iv.size() == 1) {
      if (off >= r->ilo && off + sz <= r->ihi) goto ok;
    } else
      for (auto& v : r->iv)
        if (off >= v.lo && off + sz <= v.hi) goto ok;
  }
  fault(X, W, I, lane, "oob", "out-of-bounds global %s of %u bytes: %s", wr ? "write" : "read", sz,
        descAddr(X, a).c_str());
ok:
  if (wr && r->ro)
    fault(X, W, I, lane, "readonly", "write to read-only buffer: %s", descAddr(X, a).c_str());
  return r;
}
static inline void chkAlign(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz,
                            const char* what) {
  u64 o = 0;
  FORM(m, i) o |= ad[i];
  if (o & (sz - 1)) FORM(m, i)
  if (ad[i] & (sz - 1))
    fault(X, W, I, i, "misaligned", "misaligned %s access of %u bytes at address 0x%llx (%s)", what,
          sz, (unsigned long long)ad[i], descAddr(X, ad[i]).c_str());
}
// translate: fills host pointers; returns common region or null when lanes hit different regions
static Region* xlate(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, bool wr,
                     u8** hp) {
  u64 mn = ~0ull, mx = 0;
  if (m == ~0u) {
    for (int i = 0; i < 32; i++) {
      mn = ad[i] < mn ? ad[i] : mn;
      mx = ad[i] > mx ? ad[i] : mx;
    }
  } else
    FORM(m, i) {
      mn = ad[i] < mn ? ad[i] : mn;
      mx = ad[i] > mx ? ad[i] : mx;
    }
  u64 slot = mn >> REG_SHIFT;
  if (slot == (mx >> REG_SHIFT) && slot < X.regions.size() && X.regions[slot]) {
    Region* r = X.regions[slot];
    if (r->iv.size() == 1 && mn - r->va >= r->ilo && mx - r->va + sz <= r->ihi && !(wr && r->ro)) {
      s64 d = (s64)((u64)r->host - r->va);
      FORM(m, i) hp[i] = (u8*)(ad[i] + d);
      return r;
    }
  }
  Region* c = nullptr;
  bool same = true;
  FORM(m, i) {
    Region* r = findRegion(X, W, I, i, ad[i], sz, wr);
    hp[i] = r->host + (ad[i] - r->va);
    if (c && c != r) same = false;
    c = r;
  }
  return same ? c : nullptr;
}
