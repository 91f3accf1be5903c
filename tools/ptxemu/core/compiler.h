// The compiler of a function: registers, operands, constants, scopes.
#pragma once
#include "parse.h"

static const char* SREG_NAMES[] = {"%tid.x",
                                   "%tid.y",
                                   "%tid.z",
                                   "%ntid.x",
                                   "%ntid.y",
                                   "%ntid.z",
                                   "%ctaid.x",
                                   "%ctaid.y",
                                   "%ctaid.z",
                                   "%nctaid.x",
                                   "%nctaid.y",
                                   "%nctaid.z",
                                   "%laneid",
                                   "%warpid",
                                   "%nwarpid",
                                   "%lanemask_eq",
                                   "%lanemask_le",
                                   "%lanemask_lt",
                                   "%lanemask_ge",
                                   "%lanemask_gt",
                                   "%smid",
                                   "%nsmid",
                                   "%gridid",
                                   "%dynamic_smem_size",
                                   "%total_smem_size",
                                   "%cluster_ctaid.x",
                                   "%cluster_ctaid.y",
                                   "%cluster_ctaid.z",
                                   "%cluster_nctaid.x",
                                   "%cluster_nctaid.y",
                                   "%cluster_nctaid.z",
                                   "%cluster_ctarank",
                                   "%cluster_nctarank",
                                   "%clusterid.x",
                                   "%clusterid.y",
                                   "%clusterid.z",
                                   "%nclusterid.x",
                                   "%nclusterid.y",
                                   "%nclusterid.z",
                                   "%clock",
                                   "%clock64",
                                   "%globaltimer",
                                   "%globaltimer_lo",
                                   "%clock_hi",
                                   "WARP_SZ"};
enum { SR_CLOCK = 39, SR_WARPSZ = 44, SR_N = 45 };

struct Compiler {
  Module& M;
  Kernel& K;
  vector<Tok>& T;
  vector<Scope> sc;
  int scopeCtr = 0;
  u32 curLine = 0, locf = 0, locl = 0;
  int depth = 0;
  struct LabelRef {
    size_t insn;
    string name;
    vector<int> chain;
    int kind;
  };  // kind 0 bra, 1 brx
  std::map<std::pair<int, string>, int> labels;
  std::map<std::pair<int, string>, vector<string>> btargets;
  vector<LabelRef> refs;
  vector<vector<int>> brx;
  std::map<std::pair<int, u64>, u32> cpool;
  std::map<std::pair<int, u64>, u32> dynpool;
  std::map<std::pair<int, int>, u32> srpool;
  std::map<string, VarSym> sharedVars;
  std::map<string, u32> opIds;
  u32 minSh = 4;
  Compiler(Module& m, Kernel& k) : M(m), K(k), T(m.T) {}
  u32 alloc(int w, u32 n = 1) {
    if (w == 0) {
      u32 o = (K.rfBytes + 3) & ~3u;
      K.rfBytes = o + 4 * n;
      return o;
    }
    u32 o = (K.rfBytes + 63) & ~63u;
    K.rfBytes = o + 32 * w * n;
    return o;
  }
  u32 cst(int w, u64 bits) {
    if (w == 0)
      bits = bits ? 1 : 0;
    else if (w < 8)
      bits &= (1ull << 8 * w) - 1;
    auto key = std::make_pair(w, bits);
    auto it = cpool.find(key);
    if (it != cpool.end()) return it->second;
    u32 o = alloc(w);
    cpool[key] = o;
    K.consts.push_back({o, (u8)w, bits, false});
    return o;
  }
  u32 cstDyn(int w, u64 add) {
    auto key = std::make_pair(w, add);
    auto it = dynpool.find(key);
    if (it != dynpool.end()) return it->second;
    u32 o = alloc(w);
    dynpool[key] = o;
    K.consts.push_back({o, (u8)w, add, true});
    K.usesDyn = true;
    return o;
  }
  u32 sregSlot(int w, int id) {
    if (id == SR_WARPSZ) return cst(w, 32);
    auto key = std::make_pair(w, id);
    auto it = srpool.find(key);
    if (it != srpool.end()) return it->second;
    u32 o = alloc(w);
    srpool[key] = o;
    K.sregs.push_back({o, (u8)w, id});
    return o;
  }
  bool findReg(const string& n, RegSym& r) {
    size_t p = n.size();
    while (p > 0 && isdigit((u8)n[p - 1])) p--;
    string pre = n.substr(0, p);
    u32 idx = 0;
    bool has = p < n.size() && n.size() - p < 9;
    if (has) idx = atoi(n.c_str() + p);
    for (int i = (int)sc.size() - 1; i >= 0; i--) {
      auto it = sc[i].regs.find(n);
      if (it != sc[i].regs.end()) {
        r = it->second;
        return true;
      }
      if (has) {
        auto jt = sc[i].ranges.find(pre);
        if (jt != sc[i].ranges.end() && idx < jt->second.count) {
          r = {jt->second.w, jt->second.base + idx * jt->second.stride};
          return true;
        }
      }
    }
    return false;
  }
  VarSym allocShared(const string& key, u32 size, u32 align) {
    auto it = sharedVars.find(key);
    if (it != sharedVars.end()) return it->second;
    u32 o = (K.staticShared + align - 1) / align * align;
    K.staticShared = o + size;
    VarSym v{SP_SHARED, o, size};
    sharedVars[key] = v;
    return v;
  }
  bool findVar(const string& n, VarSym& r) {
    for (int i = (int)sc.size() - 1; i >= 0; i--) {
      auto it = sc[i].vars.find(n);
      if (it != sc[i].vars.end()) {
        r = it->second;
        return true;
      }
    }
    auto g = M.gvars.find(n);
    if (g == M.gvars.end()) return false;
    GVar& v = g->second;
    if (v.space == SP_SHARED) {
      if (v.isExtern) {
        r = {SP_SHARED, 0, 0, true};
        return true;
      }
      r = allocShared(n, v.size, v.align);
      return true;
    }
    if (v.isExtern)
      unsupp("extern global variable '%s' has no definition in this module", n.c_str());
    r = {v.space, v.va, v.size};
    return true;
  }
  // ------------------------------------------------------------ operands
  static u64 parseInt(const string& s) {
    const char* p = s.c_str();
    string q;
    for (const char* c = p; *c; c++)
      if (*c != 'U' && *c != 'u') q += *c;
    if (q.size() > 1 && q[0] == '0' && (q[1] == 'b' || q[1] == 'B'))
      return strtoull(q.c_str() + 2, 0, 2);
    return strtoull(q.c_str(), 0, 0);
  }
  void number(const string& s, bool neg, Opnd& o) {
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      o.k = Opnd::FLT;
      o.hexf = true;
      o.u = strtoull(s.c_str() + 2, 0, 16);
      o.w = 4;
      o.d = bitsf((u32)o.u);
      if (neg) {
        o.u ^= 0x80000000u;
        o.d = -o.d;
      }
      return;
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      o.k = Opnd::FLT;
      o.hexf = true;
      o.u = strtoull(s.c_str() + 2, 0, 16);
      o.w = 8;
      o.d = bitsd(o.u);
      if (neg) {
        o.u ^= 1ull << 63;
        o.d = -o.d;
      }
      return;
    }
    bool hex = s.size() > 1 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X');
    if (!hex && s.find_first_of(".eE") != string::npos) {
      o.k = Opnd::FLT;
      o.d = strtod(s.c_str(), 0);
      if (neg) o.d = -o.d;
      o.w = 0;
      o.u = dbits(o.d);
      return;
    }
    o.k = Opnd::IMM;
    o.u = parseInt(s);
    if (neg) o.u = (u64)(-(s64)o.u);
  }
  Opnd operand(size_t& p) {
    Opnd o;
    Tok& t = T[p];
    if (t.k == 'p' && t.s == "[") {
      p++;
      o.k = Opnd::ADDR;
      Opnd b = operand(p);
      o.v.push_back(b);
      s64 add = 0;
      while (T[p].s == "+" || T[p].s == "-") {
        bool ng = T[p].s == "-";
        p++;
        if (T[p].s == "-") {
          ng = !ng;
          p++;
        }
        s64 v = (s64)parseInt(T[p].s);
        add += ng ? -v : v;
        p++;
      }
      if (T[p].s != "]") unsupp("address syntax near '%s'", T[p].s.c_str());
      p++;
      if (b.k == Opnd::IMM) {
      }
      o.add = add + b.add;
      o.v[0].add = 0;
      return o;
    }
    if (t.k == 'p' && t.s == "{") {
      p++;
      o.k = Opnd::VEC;
      while (T[p].s != "}") {
        o.v.push_back(operand(p));
        if (T[p].s == ",") p++;
      }
      p++;
      return o;
    }
    if (t.k == 'p' && t.s == "!") {
      p++;
      o = operand(p);
      o.neg = !o.neg;
      return o;
    }
    if (t.k == 'p' && t.s == "-") {
      p++;
      if (T[p].k == 'n') {
        number(T[p].s, true, o);
        p++;
        return o;
      }
      unsupp("'-' before non-number");
    }
    if (t.k == 'p' && t.s == "(") {
      p++;
      o = operand(p);
      if (T[p].s != ")") unsupp("constant expression");
      p++;
      return o;
    }
    if (t.k == 'n') {
      number(t.s, false, o);
      p++;
      return o;
    }
    if (t.k == 'i') {
      p++;
      if (t.s == "_") {
        o.k = Opnd::SINK;
        return o;
      }
      RegSym r;
      if (findReg(t.s, r)) {
        o.k = Opnd::REG;
        o.w = r.w;
        o.off = r.off;
        return o;
      }
      VarSym v;
      if (findVar(t.s, v)) {
        o.k = Opnd::SYM;
        o.symspace = v.space;
        o.symaddr = v.addr;
        o.symdyn = v.dyn;
        o.name = t.s;
        while (T[p].s == "+" && T[p + 1].k == 'n') {
          o.add += (s64)parseInt(T[p + 1].s);
          p += 2;
        }
        return o;
      }
      for (int i = 0; i < SR_N; i++)
        if (t.s == SREG_NAMES[i]) {
          o.k = Opnd::SREG;
          o.sreg = i;
          return o;
        }
      o.k = Opnd::NAME;
      o.name = t.s;
      return o;
    }
    unsupp("operand syntax near '%s'", t.s.c_str());
  }
  // source operand -> register-file offset of width w (0 = predicate)
  u32 src(const Opnd& o, int w, Ty ty = T_NONE) {
    switch (o.k) {
      case Opnd::REG:
        if (o.neg && w) unsupp("negated register");
        if (o.w != w) unsupp("register width %d where %d expected", o.w * 8, w * 8);
        return o.off;
      case Opnd::IMM:
        if (ty == T_F32) return cst(4, fbits((float)(s64)o.u));
        if (ty == T_F64) return cst(8, dbits((double)(s64)o.u));
        return cst(w, o.u);
      case Opnd::FLT:
        if (w == 4) return cst(4, o.hexf && o.w == 4 ? o.u : fbits((float)o.d));
        if (w == 8) return cst(8, o.hexf && o.w == 8 ? o.u : dbits(o.d));
        if (w == 2) return cst(2, ty == T_BF16 ? f2b((float)o.d) : f2h_rn((float)o.d));
        unsupp("float immediate of width %d", w);
      case Opnd::SREG:
        if (o.sreg >= SR_CLOCK && o.sreg < SR_WARPSZ) unsupp("%s only in mov", SREG_NAMES[o.sreg]);
        return sregSlot(w, o.sreg);
      case Opnd::SYM:
        if (o.symdyn) return cstDyn(w, o.add);
        return cst(w, o.symaddr + o.add);
      case Opnd::NAME:
        unsupp("unknown symbol '%s'", o.name.c_str());
      default:
        unsupp("operand kind");
    }
  }
  u32 srcAny(const Opnd& o, int& w, int defw) {
    if (o.k == Opnd::REG) {
      w = o.w;
      return o.off;
    }
    w = defw;
    return src(o, defw);
  }
  u32 dst(const Opnd& o, int w) {
    if (o.k == Opnd::SINK) {
      return alloc(w);
    }
    if (o.k != Opnd::REG) unsupp("destination is not a register");
    if (o.w != w) unsupp("destination width %d where %d expected", o.w * 8, w * 8);
    return o.off;
  }
  u32 dstP(const Opnd& o) {
    if (o.k == Opnd::SINK) return NOP_;
    if (o.k != Opnd::REG || o.w != 0) unsupp("predicate destination expected");
    return o.off;
  }
  void addr(const Opnd& o, Insn& I, int k, u8& aw, s64& imm) {
    if (o.k != Opnd::ADDR) unsupp("address expected");
    const Opnd& b = o.v[0];
    imm = o.add;
    if (b.k == Opnd::REG) {
      if (b.w != 4 && b.w != 8) unsupp("address register width");
      I.o[k] = b.off;
      aw = b.w;
    } else if (b.k == Opnd::SYM || b.k == Opnd::IMM) {
      I.o[k] = src(b, 8);
      aw = 8;
    } else if (b.k == Opnd::NAME)
      unsupp("unknown symbol '%s'", b.name.c_str());
    else
      unsupp("address base");
  }
  u32 addExt(const vector<u32>& v) {
    u32 x = K.ext.size();
    K.ext.insert(K.ext.end(), v.begin(), v.end());
    return x;
  }

  struct Mods {
    vector<string> m;
    vector<char> used;
    bool has(const char* s) {
      for (size_t i = 1; i < m.size(); i++)
        if (!used[i] && m[i] == s) {
          used[i] = 1;
          return true;
        }
      return false;
    }
    Ty ty() {
      for (size_t i = 1; i < m.size(); i++)
        if (!used[i]) {
          Ty t = parseTy(m[i]);
          if (t != T_NONE) {
            used[i] = 1;
            return t;
          }
        }
      return T_NONE;
    }
    bool pre(const char* s) {
      bool r = false;
      size_t n = strlen(s);
      for (size_t i = 1; i < m.size(); i++)
        if (!used[i] && m[i].compare(0, n, s) == 0) {
          used[i] = 1;
          r = true;
        }
      return r;
    }
    void done() {
      for (size_t i = 1; i < m.size(); i++)
        if (!used[i]) unsupp("modifier .%s", m[i].c_str());
    }
  };
  void round(Mods& m, Insn& I) {
    if (m.has("rn")) {
    } else if (m.has("rz"))
      I.csr |= 0x6000;
    else if (m.has("rm"))
      I.csr |= 0x2000;
    else if (m.has("rp"))
      I.csr |= 0x4000;
    if (m.has("ftz")) I.csr |= 0x8040;
  }
  void finishF(Mods& m, Insn& I, Ty t) {
    if (m.has("sat"))
      I.sat = t == T_F32 ? 1 : t == T_F64 ? 2 : t == T_F16 ? 3 : t == T_F16X2 ? 4 : 0;
    m.done();
    if (I.csr || I.sat) {
      I.fn2 = I.fn;
      I.fn = h_csr;
    }
  }
  void decode(const string& op, vector<Opnd>& o, Insn& I, vector<Opnd>& pq);
  void parseBody(const Func& F, std::map<string, VarSym>& bind, int endLabelScope);
  void varDecl(size_t& p, int space);
  void doCall(size_t& p, u32 pred, u8 pneg, vector<int>& chain, const string& op);
  void compile(const Func& F);
  void resolve();
  void layout();
};
