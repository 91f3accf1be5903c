// ptxemu: execution context, memory system, checks
#pragma once
#include "core.h"

struct Exec {
  Kernel* K = nullptr; Options opt; u32 grid[3], block[3]; u32 nthreads = 0; u32 dynShared = 0, shTotal = 0;
  const u8* params = nullptr; u32 paramBytes = 0;
  vector<Region*> regions;                   // indexed by slot (va >> REG_SHIFT)
  vector<std::unique_ptr<Region>> own;
  vector<PcStat> ps;
  MemStat gl, gs, ga; ShStat sl, ss; u64 llBytes = 0, lsBytes = 0; u64 cpasyncBytes = 0, cpPendingAtExit = 0;
  u64 shflInactive = 0, glWW = 0, glWWsame = 0, glRW = 0; u64 divergent = 0; vector<RaceRep> races; u64 raceCount = 0, shBenign = 0; u64 uninitLocal = 0;
  std::unordered_map<u64, size_t> raceKey; vector<string> warnings; string printed;
  u32 curPc = 0; u64 blocksRun = 0; u32 stampCtr = 0; u64 totalInsns = 0;
  vector<string>* srcLines = nullptr; vector<string>* files = nullptr;
  u64 rng = 1;
  u32 rnd() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return (u32)(rng >> 16); }
};

static string where(Exec& X, Warp& W, const Insn& I, int lane) {
  char b[600]; u32 t = W.id * 32 + (lane < 0 ? 0 : lane); u32 bx = X.block[0], by = X.block[1];
  string text = (X.srcLines && I.line >= 1 && I.line <= X.srcLines->size()) ? (*X.srcLines)[I.line - 1] : "";
  size_t p = text.find_first_not_of(" \t"); if (p != string::npos) text = text.substr(p);
  string src; if (I.locf && X.files && I.locf < X.files->size() && !(*X.files)[I.locf].empty()) src = " [src " + (*X.files)[I.locf] + ":" + std::to_string(I.locl) + "]";
  snprintf(b, 600, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u)%s, PTX line %u: '%s'%s", X.K->name.c_str(), W.blk->bx, W.blk->by, W.blk->bz,
           t % bx, (t / bx) % by, t / (bx * by), lane < 0 ? " (whole warp)" : "", I.line, text.substr(0, 160).c_str(), src.c_str());
  return b;
}
[[noreturn]] static void fault(Exec& X, Warp& W, const Insn& I, int lane, const char* kind, const char* f, ...) {
  char b[700]; va_list a; va_start(a, f); vsnprintf(b, 700, f, a); va_end(a);
  throw EmuError{kind, string(b) + " -- " + where(X, W, I, lane)};
}

// ---------------------------------------------------------------- masked register writes
// Lanes outside the mask keep their value. The loop becomes a blend at any vector width.
template <class T> static inline void put(T* d, const T* t, u32 m) {
  if (m == ~0u) { memcpy(d, t, 32 * sizeof(T)); return; }
  for (int i = 0; i < 32; i++) d[i] = m >> i & 1 ? t[i] : d[i];
}
static inline void putw(void* d, const void* t, u32 m, int w) {
  if (w == 4) put<u32>((u32*)d, (const u32*)t, m); else if (w == 8) put<u64>((u64*)d, (const u64*)t, m); else put<u16>((u16*)d, (const u16*)t, m); }
template <class T> static inline void putT(T* d, const T* t, u32 m) {
  if (sizeof(T) == 4) put<u32>((u32*)d, (const u32*)t, m); else if (sizeof(T) == 8) put<u64>((u64*)d, (const u64*)t, m); else put<u16>((u16*)d, (const u16*)t, m); }
#define REGP(T, k) ((T*)(W.r + I.o[k]))
#define FORM(m, i) for (u32 _mm = (m), i; _mm && ((i = __builtin_ctz(_mm)), true); _mm &= _mm - 1)

// ---------------------------------------------------------------- addresses
static inline void getaddr(Warp& W, const Insn& I, u32 off, u8 aw, s64 imm, u64* ad) {
  if (aw == 8) { const u64* b = (const u64*)(W.r + off); for (int i = 0; i < 32; i++) ad[i] = b[i] + imm; }
  else { const u32* b = (const u32*)(W.r + off); for (int i = 0; i < 32; i++) ad[i] = (u32)(b[i] + (u32)imm); }
}
static string descAddr(Exec& X, u64 a) {
  char b[300]; u64 slot = a >> REG_SHIFT;
  if ((a >> 40) == (SH_BASE >> 40)) { snprintf(b, 300, "shared offset %llu of %u", (unsigned long long)(a - SH_BASE), X.shTotal); return b; }
  if ((a >> 40) == (LO_BASE >> 40)) { snprintf(b, 300, "local offset %llu of %u", (unsigned long long)(a - LO_BASE), X.K->localBytes); return b; }
  // nearest buffer
  for (int d = 0; d < 2; d++) { u64 s = slot + d; if (s < X.regions.size() && X.regions[s]) { Region* r = X.regions[s]; s64 off = (s64)(a - r->va);
    snprintf(b, 300, "address 0x%llx is at byte offset %lld of buffer '%s' (valid bytes [%llu,%llu)%s)", (unsigned long long)a, (long long)off, r->name.c_str(),
             (unsigned long long)(r->iv.empty() ? 0 : r->iv[0].lo), (unsigned long long)(r->iv.empty() ? 0 : r->iv.back().hi), r->iv.size() > 1 ? ", several views" : ""); return b; } }
  snprintf(b, 300, "address 0x%llx belongs to no buffer%s", (unsigned long long)a, a < (1ull << REG_SHIFT) ? " (null-ish pointer)" : ""); return b;
}
static Region* findRegion(Exec& X, Warp& W, const Insn& I, int lane, u64 a, u32 sz, bool wr) {
  u64 slot = a >> REG_SHIFT; Region* r = slot < X.regions.size() ? X.regions[slot] : nullptr;
  if (r) { u64 off = a - r->va; if (r->iv.size() == 1) { if (off >= r->ilo && off + sz <= r->ihi) goto ok; }
    else for (auto& v : r->iv) if (off >= v.lo && off + sz <= v.hi) goto ok; }
  fault(X, W, I, lane, "oob", "out-of-bounds global %s of %u bytes: %s", wr ? "write" : "read", sz, descAddr(X, a).c_str());
ok:
  if (wr && r->ro) fault(X, W, I, lane, "readonly", "write to read-only buffer: %s", descAddr(X, a).c_str());
  return r;
}
static inline void chkAlign(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, const char* what) {
  u64 o = 0; FORM(m, i) o |= ad[i];
  if (o & (sz - 1)) FORM(m, i) if (ad[i] & (sz - 1)) fault(X, W, I, i, "misaligned", "misaligned %s access of %u bytes at address 0x%llx (%s)", what, sz, (unsigned long long)ad[i], descAddr(X, ad[i]).c_str());
}
// translate: fills host pointers; returns common region or null when lanes hit different regions
static Region* xlate(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, bool wr, u8** hp) {
  u64 mn = ~0ull, mx = 0; if (m == ~0u) { for (int i = 0; i < 32; i++) { mn = ad[i] < mn ? ad[i] : mn; mx = ad[i] > mx ? ad[i] : mx; } }
  else FORM(m, i) { mn = ad[i] < mn ? ad[i] : mn; mx = ad[i] > mx ? ad[i] : mx; }
  u64 slot = mn >> REG_SHIFT;
  if (slot == (mx >> REG_SHIFT) && slot < X.regions.size() && X.regions[slot]) {
    Region* r = X.regions[slot];
    if (r->iv.size() == 1 && mn - r->va >= r->ilo && mx - r->va + sz <= r->ihi && !(wr && r->ro)) { s64 d = (s64)((u64)r->host - r->va); FORM(m, i) hp[i] = (u8*)(ad[i] + d); return r; }
  }
  Region* c = nullptr; bool same = true;
  FORM(m, i) { Region* r = findRegion(X, W, I, i, ad[i], sz, wr); hp[i] = r->host + (ad[i] - r->va); if (c && c != r) same = false; c = r; }
  return same ? c : nullptr;
}
static inline bool setbit(vector<u64>& v, u64 i) { u64& w = v[i >> 6]; u64 b = 1ull << (i & 63); bool old = w & b; w |= b; return !old; }
static void markSector(Exec& X, Warp& W, u64 sec, bool wr, MemStat& S) {
  u64 a = sec << 5; Region* r = X.regions[a >> REG_SHIFT]; u64 k = (a - (r->va & ~31ull)) >> 5;
  if (r->module) return;
  auto& bm = wr ? r->wr : r->rd; auto& st = wr ? r->stwr : r->strd;
  if (bm.empty()) { u64 n = (r->size + 95) / 32 + 2; bm.assign((n + 63) / 64, 0); st.assign(n, 0); }
  bm[k >> 6] |= 1ull << (k & 63); if (st[k] != W.blk->stamp) { st[k] = W.blk->stamp; S.blk_sectors++; }
}
static void countSectors(Exec& X, Warp& W, u32 m, const u64* ad, u32 sz, bool wr, MemStat& S, bool rdwr = false) {
  S.req++; u32 n = __builtin_popcount(m); S.lanes += n; S.bytes += (u64)n * sz;
  if (!X.opt.stats) return;
  u64 sec[64]; u32 bm[64]; int ns = 0; u32 szm = sz >= 32 ? ~0u : ((1u << sz) - 1);
  FORM(m, i) { u64 s = ad[i] >> 5; u32 b = szm << (ad[i] & 31);
    if (ns && sec[ns - 1] == s) { bm[ns - 1] |= b; continue; }
    int k = ns - 1; while (k >= 0 && sec[k] != s) k--;
    if (k < 0) { k = ns++; sec[k] = s; bm[k] = 0; } bm[k] |= b; }
  S.sectors += ns; for (int k = 0; k < ns; k++) { S.ubytes += __builtin_popcount(bm[k]); markSector(X, W, sec[k], wr, S); if (rdwr) { MemStat d; markSector(X, W, sec[k], false, d); } }
}
static void shadowGran(Region* r, int g) {  // make shadow granularity <= g
  if (r->shadow && r->gran <= g) return;
  u64 n = r->size / g + 8; u64* ns = (u64*)calloc(n, 8);
  if (r->shadow) { int f = r->gran / g; for (u64 i = 0; i < r->shadowN; i++) if (r->shadow[i]) for (int j = 0; j < f; j++) if (i * f + j < n) ns[i * f + j] = r->shadow[i]; free(r->shadow); }
  r->shadow = ns; r->shadowN = n; r->gran = g;
}
static inline void initRange(Region* r, u64 off, u32 sz) { for (u32 b = 0; b < sz; b++) { u64 k = off + b; r->init[k >> 6] |= 1ull << (k & 63); } }
// called before the data is stored.  val(lane) points at the bytes to be stored.
static void noteGlobalWrite(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, const u8* (*val)(void*, u32), void* ctx, bool atomic) {
  FORM(m, i) {
    Region* r = X.regions[ad[i] >> REG_SHIFT]; u64 off = ad[i] - r->va;
    if (r->trackInit) initRange(r, off, sz);
    if (!X.opt.gl_ww || atomic) continue;
    int g = sz < 4 ? sz : 4; if (!r->shadow || r->gran > g) shadowGran(r, g);
    u64 me = ((W.blk->lin * X.nthreads + W.id * 32 + i + 1) << 24) | (W.blk->epoch & 0xFFFFFF);
    u64 thr0 = W.blk->lin * X.nthreads + 1, thr1 = thr0 + X.nthreads; const u8* nv = val(ctx, i); const u8* hp = r->host + off;
    for (u64 k = off / r->gran; k < (off + sz) / r->gran; k++) {
      u64 o = r->shadow[k];
      if (o && (o >> 24) != (me >> 24)) { u64 ot = o >> 24; bool sameblk = ot >= thr0 && ot < thr1; bool ordered = sameblk && (o & 0xFFFFFF) != (me & 0xFFFFFF);
        if (!ordered) { u64 bo = k * r->gran - off; if (memcmp(hp + bo, nv + bo, r->gran)) { if (!X.glWW) X.warnings.push_back("global write-write race (different values) at " + descAddr(X, r->va + k * r->gran) + " -- " + where(X, W, I, i)); X.glWW++; } else X.glWWsame++; } }
      r->shadow[k] = me; }
    memcpy(r->host + off, nv, sz);   // keep memory current so that later lanes compare against it
  }
}
static void chkInitGlobal(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz) {
  FORM(m, i) { Region* r = X.regions[ad[i] >> REG_SHIFT]; if (!r->trackInit) continue; u64 off = ad[i] - r->va;
    for (u32 b = 0; b < sz; b++) { u64 k = off + b; if (!(r->init[k >> 6] >> (k & 63) & 1)) fault(X, W, I, i, "uninit_global", "read of global bytes never written in buffer declared uninitialised: %s", descAddr(X, ad[i]).c_str()); } }
}
// read of a location that an unordered thread wrote in this launch (other block, or other warp of this block since the last block barrier)
static void chkGlobalRW(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz) {
  u64 thr0 = W.blk->lin * X.nthreads + 1, thr1 = thr0 + X.nthreads, w0 = thr0 + W.id * 32;
  FORM(m, i) { Region* r = X.regions[ad[i] >> REG_SHIFT]; if (!r->shadow) continue; u64 off = ad[i] - r->va;
    for (u64 k = off / r->gran; k <= (off + sz - 1) / r->gran; k++) { u64 o = r->shadow[k]; if (!o) continue; u64 t = o >> 24; if (t >= w0 && t < w0 + 32) continue; if (t >= thr0 && t < thr1 && (o & 0xFFFFFF) != (W.blk->epoch & 0xFFFFFF)) continue;
      if (!X.glRW) X.warnings.push_back("global read of data written by an unordered thread in the same launch: " + descAddr(X, r->va + k * r->gran) + " -- " + where(X, W, I, i)); X.glRW++; break; } }
}
static inline bool anyTrack(Exec& X, u32 m, const u64* ad) { FORM(m, i) if (X.regions[ad[i] >> REG_SHIFT]->trackInit) return true; return false; }

// ---------------------------------------------------------------- shared memory
static void bankStats(Exec& X, u32 m, const u64* ad, u32 sz, ShStat& S) {
  S.req++; u32 n = __builtin_popcount(m); S.lanes += n; S.bytes += (u64)n * sz; if (!X.opt.stats) return;
  int grp = sz <= 4 ? 32 : sz == 8 ? 16 : 8;
  for (int g = 0; g < 32; g += grp) {
    u32 gm = grp == 32 ? m : (m >> g) & ((1u << grp) - 1); if (!gm) continue; gm <<= (grp == 32 ? 0 : g);
    S.ideal++; u32 words[32][8]; u8 cnt[32]; memset(cnt, 0, 32); int mx = 1; u32 nw = sz <= 4 ? 1 : sz / 4; u32 over[32]; bool ov = false;
    FORM(gm, i) for (u32 k = 0; k < nw; k++) { u32 w = (u32)(ad[i] >> 2) + k, b = w & 31; int c = cnt[b] > 8 ? 8 : cnt[b], j = 0; for (; j < c; j++) if (words[b][j] == w) break;
        if (j == c) { if (c < 8) { words[b][c] = w; cnt[b]++; if (cnt[b] > mx) mx = cnt[b]; } else { ov = true; } } }
    if (ov) { // exact slow path
      std::set<u32> sb[32]; FORM(gm, i) for (u32 k = 0; k < nw; k++) { u32 w = (u32)(ad[i] >> 2) + k; sb[w & 31].insert(w); } mx = 1; for (auto& s : sb) mx = std::max<int>(mx, s.size()); }
    (void)over; S.wave += mx;
  }
}
static void raceReport(Exec& X, Warp& W, const char* kind, u32 pc1, u32 pc2, u64 addr, u32 w1, u32 w2) {
  X.raceCount++; u64 key = ((u64)pc1 << 32) | pc2; auto it = X.raceKey.find(key); if (it != X.raceKey.end()) { X.races[it->second].count++; return; }
  if (X.races.size() >= 50) return; X.raceKey[key] = X.races.size();
  auto& c = X.K->code; X.races.push_back({kind, "shared", pc1 < c.size() ? c[pc1].line : 0, pc2 < c.size() ? c[pc2].line : 0, addr, W.blk->lin, w1, w2, 1});
}
static const u32 PEND = 0xFFFFFFFFu;
struct StCtx { Warp* W; const u32* ex; const Insn* I; u8 buf[64]; };
static const u8* stVal(void* c, u32 lane);
static inline void shRead(Exec& X, Warp& W, const Insn& I, u32 lane, u32 a, u32 sz) {
  Block& B = *W.blk; u32 G = X.K->granule; u32 g0 = a / G, g1 = (a + sz - 1) / G; u32 own = W.vc[W.id]; int nw = B.nw;
  for (u32 g = g0; g <= g1; g++) {
    u32* rc = &B.rclk[(u64)g * nw]; if (rc[W.id] == own) continue;
    u32 wc = B.wclk[g]; u32 ww = B.wwarp[g] & 0x1f;
    if (wc <= B.base) { if (X.opt.uninit_shared) fault(X, W, I, lane, "uninit_shared", "read of shared memory never written by this block: shared offset %u (access at %u, %u bytes)", g * G, a, sz); }
    else if (wc == PEND) { if (X.opt.races) raceReport(X, W, "read of cp.async destination before wait_group", B.wpc[g], X.curPc, a, ww, W.id); }
    else if (ww != (u32)W.id && wc > W.vc[ww] && X.opt.races) {
      bool ok = false; if (B.wwarp[g] & 0x40) for (auto& p : B.multi[g]) if (p.first == (u32)W.id || p.second <= W.vc[p.first]) ok = true;   // ordered after one of several same-value writers
      if (!ok) raceReport(X, W, "write->read", B.wpc[g], X.curPc, a, ww, W.id); }
    rc[W.id] = own; B.rpc[g] = X.curPc;
  }
}
// A store is benign when another warp wrote the same bytes from the same instruction without ordering (Triton stores
// replicated layouts that way); counted in shBenign instead of being reported.
static inline void shWrite(Exec& X, Warp& W, const Insn& I, u32 lane, u32 a, u32 sz, bool atomic = false, bool async = false, StCtx* c = nullptr) {
  Block& B = *W.blk; u32 G = X.K->granule; u32 g0 = a / G, g1 = (a + sz - 1) / G; u32 own = W.vc[W.id]; int nw = B.nw;
  for (u32 g = g0; g <= g1; g++) {
    u32* rc = &B.rclk[(u64)g * nw]; u32 wc = B.wclk[g], ww = B.wwarp[g] & 0x1f; bool wasAtomic = B.wwarp[g] & 0x80, benign = false;
    if (X.opt.races) {
      bool unord = wc != PEND && ww != (u32)W.id && wc > W.vc[ww];
      if (unord && c && B.wpc[g] == X.curPc) { const u8* nv = stVal(c, lane); u32 lo = std::max(g * G, a), hi = std::min(g * G + G, a + sz); benign = !memcmp(B.sh.data() + lo, nv + (lo - a), hi - lo); }
      if (benign) { X.shBenign++; auto& mv = B.multi[g]; if (!(B.wwarp[g] & 0x40)) { mv.clear(); mv.push_back({ww, wc}); } mv.push_back({(u32)W.id, own}); B.wclk[g] = own; B.wwarp[g] = W.id | 0x40; continue; }
      if (wc == PEND) raceReport(X, W, "write to pending cp.async destination", B.wpc[g], X.curPc, a, ww, W.id);
      else if (unord && !(atomic && wasAtomic)) raceReport(X, W, "write->write", B.wpc[g], X.curPc, a, ww, W.id);
      for (int v = 0; v < nw; v++) if (rc[v] > W.vc[v] && v != W.id) { if (atomic && wasAtomic) continue; raceReport(X, W, "read->write", B.rpc[g], X.curPc, a, v, W.id); break; }
    }
    if (async) rc[W.id] = 0;
    B.wclk[g] = async ? PEND : own; B.wwarp[g] = W.id | (atomic ? 0x80 : 0); B.wpc[g] = X.curPc;
  }
}
static inline void shRange(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, const char* what) {
  u64 lim = X.shTotal;
  FORM(m, i) if (ad[i] + sz > lim || ad[i] > lim) fault(X, W, I, i, "shared_oob", "out-of-bounds shared %s of %u bytes at shared offset %lld (block has %u bytes)", what, sz, (long long)ad[i], X.shTotal);
}

// ---------------------------------------------------------------- loads
static inline u64 rdN(const u8* p, int es) { u64 v = 0; memcpy(&v, p, es); return v; }
static inline void wrReg(u8* base, int w, u32 lane, u64 v) { if (w == 4) ((u32*)base)[lane] = (u32)v; else if (w == 8) ((u64*)base)[lane] = v; else ((u16*)base)[lane] = (u16)v; }
static inline u64 rdReg(const u8* base, int w, u32 lane) { return w == 4 ? ((const u32*)base)[lane] : w == 8 ? ((const u64*)base)[lane] : ((const u16*)base)[lane]; }
static inline u64 sext(u64 v, int es) { int s = 64 - 8 * es; return (u64)((s64)(v << s) >> s); }
static void loadRegs(Exec& X, Warp& W, const Insn& I, u32 m, u8** hp) {
  const u32* ex = &X.K->ext[I.x]; int es = I.sz, dw = I.dw;
  for (int j = 0; j < I.vn; j++) {
    if (ex[j] == NOP_) continue; u8* d = W.r + ex[j];
    if (es == 16) { FORM(m, i) memcpy(d + 16 * i, hp[i] + 16 * j, 16); }
    else if (es == 4 && dw == 4) { FORM(m, i) ((u32*)d)[i] = *(u32*)(hp[i] + 4 * j); }
    else if (es == 8 && dw == 8) { FORM(m, i) ((u64*)d)[i] = *(u64*)(hp[i] + 8 * j); }
    else if (es == 2 && dw == 2) { FORM(m, i) ((u16*)d)[i] = *(u16*)(hp[i] + 2 * j); }
    else { FORM(m, i) { u64 v = rdN(hp[i] + es * j, es); if (I.sgn) v = sext(v, es); wrReg(d, dw, i, v); } }
  }
}
static void storeRegs(Exec& X, Warp& W, const Insn& I, u32 m, u8** hp) {
  const u32* ex = &X.K->ext[I.x]; int es = I.sz, sw = I.dw;
  for (int j = 0; j < I.vn; j++) {
    u8* s = W.r + ex[j];
    if (es == 16) { FORM(m, i) memcpy(hp[i] + 16 * j, s + 16 * i, 16); }
    else if (es == 4 && sw == 4) { FORM(m, i) *(u32*)(hp[i] + 4 * j) = ((u32*)s)[i]; }
    else FORM(m, i) { u64 v = rdReg(s, sw, i); memcpy(hp[i] + es * j, &v, es); }
  }
}
static const u8* stVal(void* c, u32 lane) { StCtx* S = (StCtx*)c; int es = S->I->sz; for (int j = 0; j < S->I->vn; j++) { if (es == 16) memcpy(S->buf + 16 * j, S->W->r + S->ex[j] + 16 * lane, 16); else { u64 v = rdReg(S->W->r + S->ex[j], S->I->dw, lane); memcpy(S->buf + es * j, &v, es); } } return S->buf; }

static void ldGlobalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn; u8* hp[32]; chkAlign(X, W, I, m, ad, sz, "global"); Region* r = xlate(X, W, I, m, ad, sz, false, hp);
  if (X.opt.uninit_global && (!r || r->trackInit)) chkInitGlobal(X, W, I, m, ad, sz);
  if (!(r && r->module)) countSectors(X, W, m, ad, sz, false, X.gl);
  if (X.opt.gl_ww && (!r || r->shadow)) chkGlobalRW(X, W, I, m, ad, sz);
  loadRegs(X, W, I, m, hp);
}
static void stGlobalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn; u8* hp[32]; chkAlign(X, W, I, m, ad, sz, "global"); Region* r = xlate(X, W, I, m, ad, sz, true, hp);
  if (!(r && r->module)) countSectors(X, W, m, ad, sz, true, X.gs);
  StCtx c; c.W = &W; c.ex = &X.K->ext[I.x]; c.I = &I; noteGlobalWrite(X, W, I, m, ad, sz, stVal, &c, false);
  storeRegs(X, W, I, m, hp);
}
static void ldSharedA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn; shRange(X, W, I, m, ad, sz, "read"); chkAlign(X, W, I, m, ad, sz, "shared"); bankStats(X, m, ad, sz, X.sl);
  u8* hp[32]; u8* b = W.blk->sh.data(); FORM(m, i) hp[i] = b + ad[i];
  if (X.opt.races | X.opt.uninit_shared) FORM(m, i) shRead(X, W, I, i, (u32)ad[i], sz);
  loadRegs(X, W, I, m, hp);
}
static void stSharedA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u32 sz = I.sz * I.vn; shRange(X, W, I, m, ad, sz, "write"); chkAlign(X, W, I, m, ad, sz, "shared"); bankStats(X, m, ad, sz, X.ss);
  u8* hp[32]; u8* b = W.blk->sh.data(); FORM(m, i) hp[i] = b + ad[i];
  if (X.opt.races | X.opt.uninit_shared) { StCtx c; c.W = &W; c.ex = &X.K->ext[I.x]; c.I = &I; FORM(m, i) shWrite(X, W, I, i, (u32)ad[i], sz, false, false, &c); }
  storeRegs(X, W, I, m, hp);
}
static void localPtr(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad, u32 sz, u8** hp, bool wr, bool chk) {
  u32 L = X.K->localBytes; if (sz > 1) chkAlign(X, W, I, m, ad, I.sz, "local");
  FORM(m, i) { if (ad[i] + sz > L || ad[i] > L) fault(X, W, I, i, "local_oob", "out-of-bounds local-memory %s of %u bytes at offset %lld (frame %u bytes)", wr ? "write" : "read", sz, (long long)ad[i], L);
    hp[i] = W.local + (u64)i * L + ad[i]; u8* in = W.linit + (u64)i * L + ad[i];
    if (wr) memset(in, 1, sz); else if (chk && X.opt.uninit_local) for (u32 b = 0; b < sz; b++) if (!in[b]) { if (X.opt.uninit_local == 1) fault(X, W, I, i, "uninit_local", "read of local (stack) memory never written by this thread: local offset %lld, %u bytes", (long long)ad[i], sz); X.uninitLocal++; break; } }
}
static void ldLocalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) { u8* hp[32]; u32 sz = I.sz * I.vn; localPtr(X, W, I, m, ad, sz, hp, false, I.space != SP_FRAME); if (I.space != SP_FRAME) X.llBytes += (u64)sz * __builtin_popcount(m); loadRegs(X, W, I, m, hp); }
static void stLocalA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) { u8* hp[32]; u32 sz = I.sz * I.vn; localPtr(X, W, I, m, ad, sz, hp, true, true); if (I.space != SP_FRAME) X.lsBytes += (u64)sz * __builtin_popcount(m); storeRegs(X, W, I, m, hp); }
static void ldParamA(Exec& X, Warp& W, const Insn& I, u32 m, const u64* ad) {
  u8* hp[32]; u32 sz = I.sz * I.vn; FORM(m, i) { if (ad[i] + sz > X.paramBytes) fault(X, W, I, i, "param_oob", "kernel-parameter read of %u bytes at offset %lld (params are %u bytes)", sz, (long long)ad[i], X.paramBytes); hp[i] = (u8*)X.params + ad[i]; }
  loadRegs(X, W, I, m, hp); }
static inline int spaceOf(u64 a) { u64 t = a >> 40; return t == (SH_BASE >> 40) ? SP_SHARED : t == (LO_BASE >> 40) ? SP_LOCAL : t == (PA_BASE >> 40) ? SP_PARAM : SP_GLOBAL; }
template <int ST> static void h_ldst(Exec& X, Warp& W, const Insn& I, u32 m) {
  u64 ad[32]; getaddr(W, I, I.o[0], I.aw, I.imm, ad);
  switch (I.space) {
    case SP_GLOBAL: case SP_CONST: ST ? stGlobalA(X, W, I, m, ad) : ldGlobalA(X, W, I, m, ad); return;
    case SP_SHARED: ST ? stSharedA(X, W, I, m, ad) : ldSharedA(X, W, I, m, ad); return;
    case SP_LOCAL: case SP_FRAME: ST ? stLocalA(X, W, I, m, ad) : ldLocalA(X, W, I, m, ad); return;
    case SP_PARAM: ldParamA(X, W, I, m, ad); return;
    default: {
      u32 ms[8] = {0}; FORM(m, i) ms[spaceOf(ad[i])] |= 1u << i; u64 a2[32];
      if (ms[SP_GLOBAL]) ST ? stGlobalA(X, W, I, ms[SP_GLOBAL], ad) : ldGlobalA(X, W, I, ms[SP_GLOBAL], ad);
      if (ms[SP_SHARED]) { for (int i = 0; i < 32; i++) a2[i] = ad[i] - SH_BASE; ST ? stSharedA(X, W, I, ms[SP_SHARED], a2) : ldSharedA(X, W, I, ms[SP_SHARED], a2); }
      if (ms[SP_LOCAL]) { for (int i = 0; i < 32; i++) a2[i] = ad[i] - LO_BASE; ST ? stLocalA(X, W, I, ms[SP_LOCAL], a2) : ldLocalA(X, W, I, ms[SP_LOCAL], a2); }
      if (ms[SP_PARAM]) { if (ST) fault(X, W, I, -1, "oob", "store to kernel parameter space"); for (int i = 0; i < 32; i++) a2[i] = ad[i] - PA_BASE; ldParamA(X, W, I, ms[SP_PARAM], a2); }
    }
  }
}
