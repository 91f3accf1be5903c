// The library: modules and launches, whose results are JSON. See ../library.py.
#include "run_grid.h"

static void histo(Exec& X, string& js) {
  Kernel& K = *X.K;
  u64 w[C_N] = {0}, t[C_N] = {0};
  std::map<string, std::pair<u64, u64>> ops;
  std::map<string, std::array<u64, 2>> mma;
  u64 tw = 0, tt = 0;
  u64 flop32 = 0, flop64 = 0;
  for (size_t i = 0; i < K.code.size(); i++) {
    auto& I = K.code[i];
    if (I.cls == C_HIDDEN || !X.ps[i].nw) continue;
    w[I.cls] += X.ps[i].nw;
    t[I.cls] += X.ps[i].nt;
    tw += X.ps[i].nw;
    tt += X.ps[i].nt;
    auto& o = ops[K.ops[I.opid]];
    o.first += X.ps[i].nw;
    o.second += X.ps[i].nt;
    if (I.cls == C_MMA) {
      auto& q = mma[K.ops[I.opid]];
      u64 M = I.imm & 255, N = (I.imm >> 8) & 255, KK = (I.imm >> 16) & 255;
      q[0] += X.ps[i].nw;
      q[1] += X.ps[i].nw * 2 * M * N * KK;
    }
    flop32 += I.cls == C_FMA32                         ? 2 * X.ps[i].nt
              : (I.cls == C_ADD32 || I.cls == C_MUL32) ? X.ps[i].nt
                                                       : 0;
  }
  (void)flop64;
  char b[400];
  snprintf(b, 400,
           "\"warp_insns\":%llu,\"thread_insns\":%llu,\"fp32_flops\":%llu,\"divergent_branches\":%"
           "llu,\"blocks\":%llu,",
           (unsigned long long)tw, (unsigned long long)tt, (unsigned long long)flop32,
           (unsigned long long)X.divergent, (unsigned long long)X.blocksRun);
  js += b;
  js += "\"classes\":{";
  bool f = true;
  for (int c = 0; c < C_N; c++)
    if (w[c]) {
      snprintf(b, 400, "%s\"%s\":[%llu,%llu]", f ? "" : ",", CLS_NAME[c], (unsigned long long)w[c],
               (unsigned long long)t[c]);
      js += b;
      f = false;
    }
  js += "},\"opcodes\":{";
  f = true;
  for (auto& o : ops) {
    snprintf(b, 400, "%s\"%s\":[%llu,%llu]", f ? "" : ",", o.first.c_str(),
             (unsigned long long)o.second.first, (unsigned long long)o.second.second);
    js += b;
    f = false;
  }
  js += "},\"mma\":{";
  f = true;
  for (auto& o : mma) {
    snprintf(b, 400, "%s\"%s\":[%llu,%llu]", f ? "" : ",", o.first.c_str(),
             (unsigned long long)o.second[0], (unsigned long long)o.second[1]);
    js += b;
    f = false;
  }
  js += "},";
}
static char* dup(const string& s) {
  char* p = (char*)malloc(s.size() + 1);
  memcpy(p, s.c_str(), s.size() + 1);
  return p;
}
extern "C" {
struct CRegion {
  u64 va;
  u64 size;
  void* host;
  const char* name;
  u64 niv;
  const u64* iv;
  u64 flags;
};
void* pe_create(const char* text, char** err) {
  auto* M = new Module;
  M->text = text;
  try {
    loadModule(*M);
    *err = nullptr;
    return M;
  } catch (EmuError& e) {
    *err = dup(e.msg);
  } catch (Unsupp& e) {
    *err = dup(e.why);
  } catch (std::exception& e) {
    *err = dup(string("parser exception: ") + e.what());
  }
  delete M;
  return nullptr;
}
void pe_destroy(void* m) { delete (Module*)m; }
void pe_free(char* p) { free(p); }
char* pe_info(void* mm) {
  Module& M = *(Module*)mm;
  string j = "{\"target\":\"" + M.target + "\",\"version\":\"" + M.version + "\",\"kernels\":[";
  bool f = true;
  for (auto& e : M.entries) {
    Kernel& K = *M.kernels[e];
    j += f ? "" : ",";
    f = false;
    j += "{\"name\":\"" + K.name + "\",\"static_shared\":" + std::to_string(K.staticShared) +
         ",\"uses_dynamic_shared\":" + (K.usesDyn ? "true" : "false") +
         ",\"local_bytes\":" + std::to_string(K.localBytes) +
         ",\"regfile_bytes\":" + std::to_string(K.rfBytes) +
         ",\"n_insns\":" + std::to_string(K.code.size()) +
         ",\"maxntid\":" + std::to_string(K.maxntid) + ",\"granule\":" + std::to_string(K.granule) +
         ",\"fatal\":\"" + jesc(K.fatal) + "\",\"param_bytes\":" + std::to_string(K.paramBytes);
    char b[200];
    snprintf(b, 200, ",\"reqntid\":[%d,%d,%d],\"params\":[", K.reqntid[0], K.reqntid[1],
             K.reqntid[2]);
    j += b;
    bool g = true;
    for (auto& p : K.params) {
      j += g ? "" : ",";
      g = false;
      j += "{\"name\":\"" + p.name + "\",\"type\":\"" + p.type +
           "\",\"size\":" + std::to_string(p.size) + ",\"offset\":" + std::to_string(p.off) +
           ",\"ptr\":" + (p.isptr ? "true" : "false") +
           ",\"array\":" + (p.isarray ? "true" : "false") + "}";
    }
    j += "],\"unsupported\":[";
    g = true;
    for (auto& u : K.unsupported) {
      j += g ? "" : ",";
      g = false;
      string tx = u.first && u.first <= M.lines.size() ? M.lines[u.first - 1] : "";
      j += "[" + std::to_string(u.first) + ",\"" + jesc(u.second) + "\",\"" + jesc(tx) + "\"]";
    }
    j += "],\"opcodes\":[";
    g = true;
    for (auto& o : K.ops) {
      j += g ? "" : ",";
      g = false;
      j += "\"" + jesc(o) + "\"";
    }
    j += "]}";
  }
  j += "],\"globals\":[";
  f = true;
  for (auto& kv : M.gvars) {
    auto& v = kv.second;
    if (v.space == SP_SHARED || v.isExtern) continue;
    j += f ? "" : ",";
    f = false;
    j += "{\"name\":\"" + jesc(v.name) + "\",\"size\":" + std::to_string(v.size) +
         ",\"va\":" + std::to_string(v.va) +
         ",\"const\":" + (v.space == SP_CONST ? "true" : "false") + "}";
  }
  j += "]}";
  return dup(j);
}
void* pe_global_host(void* mm, u64 va) {
  Module& M = *(Module*)mm;
  for (auto& r : M.regions)
    if (r->va == va) return r->host;
  return nullptr;
}
// opts: array of s64 in the order of struct below
char* pe_launch(void* mm, const char* kernel, const u32* grid, const u32* block, u32 dyn,
                const u8* params, u32 pbytes, const CRegion* rg, u32 nrg, const s64* op, u32 nop) {
  Module& M = *(Module*)mm;
  Exec X;
  string err, kind;
  auto it = M.kernels.find(kernel);
  if (it == M.kernels.end()) return dup("{\"error\":\"no such kernel\",\"kind\":\"launch\"}");
  Kernel& K = *it->second;
  X.K = &K;
  u32 oldcsr = _mm_getcsr();
  setCsr(0);
  Options& o = X.opt;
  auto g = [&](u32 i, s64 d) { return i < nop ? op[i] : d; };
  o.races = g(0, 1);
  o.uninit_shared = g(1, 1);
  o.uninit_local = g(2, 1);
  o.poison = g(3, 1);
  o.stats = g(4, 1);
  o.gl_ww = g(5, 1);
  o.order = g(6, 0);
  o.conc = g(7, 1);
  o.sched = g(8, 0);
  o.max_warp_insns = g(9, 400000000);
  o.seed = g(10, 1);
  o.uninit_global = 1;
  X.rng = o.seed * 2654435761ull + 88172645463325252ull;
  u32 perline = g(11, 0);
  for (int i = 0; i < 3; i++) {
    X.grid[i] = grid[i];
    X.block[i] = block[i];
  }
  X.nthreads = block[0] * block[1] * block[2];
  X.dynShared = dyn;
  X.shTotal = (K.usesDyn || dyn) ? K.dynBase + dyn : K.staticShared;
  X.params = params;
  X.paramBytes = pbytes;
  X.ps.resize(K.code.size());
  X.srcLines = &M.lines;
  X.files = &M.files;
  for (u32 i = 0; i < nrg; i++) {
    auto r = std::make_unique<Region>();
    r->va = rg[i].va;
    r->size = rg[i].size;
    r->host = (u8*)rg[i].host;
    r->name = rg[i].name;
    r->ro = rg[i].flags & 1;
    r->trackInit = rg[i].flags & 2;
    if (r->trackInit) r->init.assign((r->size + 63) / 64 + 1, 0);
    for (u64 k = 0; k < rg[i].niv; k++) r->iv.push_back({rg[i].iv[2 * k], rg[i].iv[2 * k + 1]});
    if (!r->iv.empty()) {
      r->ilo = r->iv[0].lo;
      r->ihi = r->iv[0].hi;
    }
    u64 slot = r->va >> REG_SHIFT;
    if (X.regions.size() <= slot) X.regions.resize(slot + 1, nullptr);
    X.regions[slot] = r.get();
    X.own.push_back(std::move(r));
  }
  for (auto& r : M.regions) {
    u64 slot = r->va >> REG_SHIFT;
    if (X.regions.size() <= slot) X.regions.resize(slot + 1, nullptr);
    X.regions[slot] = r.get();
  }
  try {
    if (!K.fatal.empty()) throw EmuError{"unsupported", "kernel could not be decoded: " + K.fatal};
    if (X.nthreads == 0 || X.nthreads > 1024) throw EmuError{"launch", "bad block size"};
    if (pbytes < K.paramBytes) throw EmuError{"launch", "too few parameter bytes"};
    runGrid(X);
  } catch (EmuError& e) {
    err = e.msg;
    kind = e.kind;
  } catch (std::exception& e) {
    err = e.what();
    kind = "internal";
  }
  _mm_setcsr(oldcsr);
  string j = "{";
  if (!err.empty()) j += "\"error\":\"" + jesc(err) + "\",\"kind\":\"" + kind + "\",";
  histo(X, j);
  char b[600];
  u64 rs = 0, ws = 0;
  string pb;
  for (auto& r : X.own) {
    u64 a = 0, c = 0;
    for (u64 w : r->rd) a += __builtin_popcountll(w);
    for (u64 w : r->wr) c += __builtin_popcountll(w);
    rs += a;
    ws += c;
    snprintf(b, 600, "%s\"%s\":[%llu,%llu]", pb.empty() ? "" : ",", jesc(r->name).c_str(),
             (unsigned long long)a, (unsigned long long)c);
    pb += b;
    free(r->shadow);
    r->shadow = nullptr;
  }
  for (auto& r : M.regions)
    if (r->shadow) {
      free(r->shadow);
      r->shadow = nullptr;
      r->shadowN = 0;
    }
  auto ms = [&](const char* n, MemStat& s) {
    snprintf(b, 600,
             "\"%s\":{\"requests\":%llu,\"lanes\":%llu,\"bytes\":%llu,\"unique_bytes\":%llu,"
             "\"sectors\":%llu,\"block_unique_sectors\":%llu},",
             n, (unsigned long long)s.req, (unsigned long long)s.lanes, (unsigned long long)s.bytes,
             (unsigned long long)s.ubytes, (unsigned long long)s.sectors,
             (unsigned long long)s.blk_sectors);
    j += b;
  };
  ms("global_ld", X.gl);
  ms("global_st", X.gs);
  ms("global_atom", X.ga);
  auto sh = [&](const char* n, ShStat& s) {
    snprintf(b, 600,
             "\"%s\":{\"requests\":%llu,\"lanes\":%llu,\"bytes\":%llu,\"wavefronts\":%llu,"
             "\"ideal\":%llu,\"conflicts\":%llu},",
             n, (unsigned long long)s.req, (unsigned long long)s.lanes, (unsigned long long)s.bytes,
             (unsigned long long)s.wave, (unsigned long long)s.ideal,
             (unsigned long long)(s.wave - s.ideal));
    j += b;
  };
  sh("shared_ld", X.sl);
  sh("shared_st", X.ss);
  snprintf(b, 600,
           "\"unique_read_sectors\":%llu,\"unique_write_sectors\":%llu,\"cp_async_bytes\":%llu,"
           "\"cp_async_pending_at_exit\":%llu,\"local_ld_bytes\":%llu,\"local_st_bytes\":%llu,"
           "\"uninit_local_reads\":%llu,\"shfl_inactive_reads\":%llu,\"global_ww_conflicts\":%llu,"
           "\"global_ww_same_value\":%llu,\"global_rw_unordered\":%llu,\"race_count\":%llu,"
           "\"shared_same_value_writes\":%llu,\"shared_bytes\":%u,",
           (unsigned long long)rs, (unsigned long long)ws, (unsigned long long)X.cpasyncBytes,
           (unsigned long long)X.cpPendingAtExit, (unsigned long long)X.llBytes,
           (unsigned long long)X.lsBytes, (unsigned long long)X.uninitLocal,
           (unsigned long long)X.shflInactive, (unsigned long long)X.glWW,
           (unsigned long long)X.glWWsame, (unsigned long long)X.glRW,
           (unsigned long long)X.raceCount, (unsigned long long)X.shBenign, X.shTotal);
  j += b;
  j += "\"per_buffer\":{" + pb + "},\"races\":[";
  bool f = true;
  for (auto& r : X.races) {
    auto tx = [&](u32 l) { return l && l <= M.lines.size() ? jesc(M.lines[l - 1]) : string(); };
    snprintf(b, 600,
             "%s{\"kind\":\"%s\",\"line1\":%u,\"line2\":%u,\"shared_offset\":%llu,\"block\":%llu,"
             "\"warp1\":%u,\"warp2\":%u,\"count\":%llu,",
             f ? "" : ",", r.kind.c_str(), r.line1, r.line2, (unsigned long long)r.addr,
             (unsigned long long)r.block, r.w1, r.w2, (unsigned long long)r.count);
    j += b;
    j += "\"text1\":\"" + tx(r.line1) + "\",\"text2\":\"" + tx(r.line2) + "\"}";
    f = false;
  }
  j += "],\"warnings\":[";
  f = true;
  for (auto& w : X.warnings) {
    j += f ? "" : ",";
    j += "\"" + jesc(w) + "\"";
    f = false;
  }
  j += "],\"printed\":\"" + jesc(X.printed) + "\"";
  if (perline) {
    std::map<u32, std::pair<u64, u64>> L;
    for (size_t i = 0; i < K.code.size(); i++)
      if (X.ps[i].nw && K.code[i].cls != C_HIDDEN) {
        L[K.code[i].line].first += X.ps[i].nw;
        L[K.code[i].line].second += X.ps[i].nt;
      }
    j += ",\"lines\":{";
    f = true;
    for (auto& l : L) {
      snprintf(b, 600, "%s\"%u\":[%llu,%llu]", f ? "" : ",", l.first,
               (unsigned long long)l.second.first, (unsigned long long)l.second.second);
      j += b;
      f = false;
    }
    j += "}";
  }
  j += "}";
  return dup(j);
}
}
