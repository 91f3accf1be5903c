// A file of PTX: its variables, functions and kernels.
#pragma once
#include "layout.h"

// ---------------------------------------------------------------- module loading
static vector<PDecl> parseParams(vector<Tok>& T, size_t& p) {  // T[p]=="("
  vector<PDecl> v;
  p++;
  while (T[p].s != ")") {
    if (T[p].s == ",") {
      p++;
      continue;
    }
    PDecl d;
    d.align = 0;
    d.isptr = d.isarr = false;
    d.size = 0;
    int es = 1;
    while (T[p].s[0] == '.') {
      string s = T[p].s;
      if (s == ".align") {
        u32 a = atoi(T[p + 1].s.c_str());
        if (!d.isptr) d.align = a;
        p += 2;
        continue;
      }
      if (s == ".ptr") d.isptr = true;
      Ty q = parseTy(s.substr(1));
      if (q != T_NONE) {
        d.type = s.substr(1);
        es = std::max(1, tsize(q));
      }
      p++;
    }
    d.name = T[p].s;
    p++;
    d.size = es;
    if (T[p].s == "[") {
      d.isarr = true;
      u64 n = T[p + 1].s == "]" ? 0 : Compiler::parseInt(T[p + 1].s);
      p += T[p + 1].s == "]" ? 2 : 3;
      d.size = n * es;
    }
    if (d.align < (u32)es) d.align = es;
    v.push_back(d);
  }
  p++;
  return v;
}
static void loadModule(Module& M) {
  {
    size_t i = 0;
    while (i <= M.text.size()) {
      size_t j = M.text.find('\n', i);
      if (j == string::npos) j = M.text.size();
      M.lines.push_back(M.text.substr(i, j - i));
      i = j + 1;
    }
  }
  M.T = tokenize(M.text);
  auto& T = M.T;
  Tok eof{"<eof>", (u32)M.lines.size(), 'p'};
  size_t n = T.size();
  for (int i = 0; i < 8; i++) T.push_back(eof);
  size_t p = 0;
  auto skipLine = [&]() {
    u32 l = T[p].line;
    while (p < n && T[p].line == l) p++;
  };
  while (p < n) {
    const string& s = T[p].s;
    if (s == ".version") {
      M.version = T[p + 1].s;
      p += 2;
      continue;
    }
    if (s == ".target") {
      M.target = T[p + 1].s;
      skipLine();
      continue;
    }
    if (s == ".address_size") {
      p += 2;
      continue;
    }
    if (s == ".file") {
      u32 id = atoi(T[p + 1].s.c_str());
      if (M.files.size() <= id) M.files.resize(id + 1);
      M.files[id] = T[p + 2].s;
      skipLine();
      continue;
    }
    if (s == ".loc") {
      skipLine();
      continue;
    }
    if (s == ";") {
      p++;
      continue;
    }
    if (s == ".section") {
      while (p < n && T[p].s != "{") p++;
      int d = 0;
      do {
        if (T[p].s == "{") d++;
        if (T[p].s == "}") d--;
        p++;
      } while (p < n && d);
      continue;
    }
    if (s == ".pragma" || s == ".alias") {
      while (p < n && T[p].s != ";") p++;
      continue;
    }
    bool ext = false;
    while (T[p].s == ".visible" || T[p].s == ".extern" || T[p].s == ".weak" ||
           T[p].s == ".common") {
      if (T[p].s == ".extern") ext = true;
      p++;
    }
    if (T[p].s == ".entry" || T[p].s == ".func") {
      Func f;
      f.entry = T[p].s == ".entry";
      f.ext = ext;
      f.line = T[p].line;
      p++;
      while (T[p].s == ".noreturn" || T[p].s == ".attribute") {
        p++;
        if (T[p].s == "(") {
          while (T[p].s != ")") p++;
          p++;
        }
      }
      if (T[p].s == "(") f.rets = parseParams(T, p);
      f.name = T[p].s;
      p++;
      if (T[p].s == "(") f.params = parseParams(T, p);
      while (T[p].s != "{" && T[p].s != ";" && p < n) {
        if (T[p].s == ".reqntid" || T[p].s == ".maxntid") {
          bool rq = T[p].s == ".reqntid";
          p++;
          int v[3] = {1, 1, 1}, k = 0;
          while (T[p].k == 'n') {
            v[k++] = atoi(T[p].s.c_str());
            p++;
            if (T[p].s == "," && k < 3)
              p++;
            else
              break;
          }
          if (rq)
            for (int i = 0; i < 3; i++) f.reqntid[i] = v[i];
          else
            f.maxntid = v[0] * v[1] * v[2];
          continue;
        }
        p++;
      }
      if (T[p].s == ";") {
        p++;
        if (!M.funcs.count(f.name)) {
          f.ext = true;
          M.funcs[f.name] = f;
        }
        continue;
      }
      p++;
      f.b = p;
      int d = 1;
      while (p < n && d) {
        if (T[p].k == 'p' && T[p].s == "{")
          d++;
        else if (T[p].k == 'p' && T[p].s == "}")
          d--;
        p++;
      }
      f.e = p - 1;
      f.ext = false;
      if (f.entry) M.entries.push_back(f.name);
      M.funcs[f.name] = f;
      continue;
    }
    if (T[p].s == ".global" || T[p].s == ".const" || T[p].s == ".shared") {
      GVar v;
      v.isExtern = ext;
      v.space = T[p].s == ".shared" ? SP_SHARED : T[p].s == ".const" ? SP_CONST : SP_GLOBAL;
      p++;
      u32 align = 0;
      int es = 1;
      bool fl = false;
      while (T[p].s[0] == '.') {
        if (T[p].s == ".align") {
          align = atoi(T[p + 1].s.c_str());
          p += 2;
          continue;
        }
        if (T[p].s == ".attribute") {
          while (T[p].s != ")") p++;
          p++;
          continue;
        }
        string q = T[p].s.substr(1);
        Ty t = parseTy(q);
        if (t != T_NONE) {
          es = tsize(t);
          fl = t == T_F32 || t == T_F64;
        }
        p++;
      }
      v.name = T[p].s;
      p++;
      u64 cnt = 1;
      bool unk = false;
      while (T[p].s == "[") {
        if (T[p + 1].s == "]") {
          unk = true;
          p += 2;
        } else {
          cnt *= Compiler::parseInt(T[p + 1].s);
          p += 3;
        }
      }
      v.size = unk ? 0 : cnt * es;
      v.align = std::max<u32>(std::max<u32>(align, es), 1);
      v.es = es;
      v.fl = fl;
      v.initTok = 0;
      if (v.space == SP_SHARED) {
        if (unk)
          v.isExtern = true;
        else
          v.isExtern = false;
      }
      if (T[p].s == "=") {
        p++;
        v.initTok = p;
        while (p < n && T[p].s != ";") p++;
      }
      if (v.space != SP_SHARED && !v.isExtern) {
        auto r = std::make_unique<Region>();
        u64 slot = M.nextSlot++;
        r->va = slot << REG_SHIFT;
        r->size = v.size;
        M.storage.emplace_back((v.size + 63) & ~63ull, 0);
        r->host = M.storage.back().data();
        r->name = (v.space == SP_CONST ? "const " : "device variable ") + v.name;
        r->ro = v.space == SP_CONST;
        r->module = true;
        r->iv = {{0, v.size}};
        r->ilo = 0;
        r->ihi = v.size;
        v.va = r->va;
        M.regions.push_back(std::move(r));
      }
      M.gvars[v.name] = v;
      if (T[p].s == ";") p++;
      continue;
    }
    throw EmuError{"parse", "PTX line " + std::to_string(T[p].line) + ": unexpected '" + T[p].s +
                                "' at module level"};
  }
  for (auto& kv : M.gvars) {
    GVar& v = kv.second;
    if (!v.initTok) continue;
    size_t q = v.initTok;
    u8* d = nullptr;
    for (auto& r : M.regions)
      if (r->va == v.va) d = r->host;
    if (!d) continue;
    u64 off = 0;
    while (T[q].s != ";") {
      string s = T[q].s;
      if (s == "{" || s == "}" || s == ",") {
        q++;
        continue;
      }
      bool neg = false;
      if (s == "-") {
        neg = true;
        q++;
        s = T[q].s;
      }
      u64 bits = 0;
      if (T[q].k == 'n') {
        if (s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]) && (v.fl || strchr("fF", s[1])))
          bits = strtoull(s.c_str() + 2, 0, 16);
        else if (v.fl) {
          double x = strtod(s.c_str(), 0);
          bits = v.es == 4 ? fbits((float)x) : dbits(x);
        } else
          bits = Compiler::parseInt(s);
        if (neg) bits = v.fl ? bits ^ (1ull << (8 * v.es - 1)) : (u64)(-(s64)bits);
        q++;
      } else {
        bool paren = false;
        string nm = s;
        if (s == "generic") {
          q += 2;
          nm = T[q].s;
          paren = true;
        } else if (s.compare(0, 4, "mask") == 0)
          throw EmuError{"parse", "mask() initialiser unsupported for " + v.name};
        auto it = M.gvars.find(nm);
        if (it == M.gvars.end())
          throw EmuError{"parse", "unsupported initialiser '" + nm + "' for " + v.name};
        bits = it->second.va;
        q++;
        if (paren) q++;
        if (T[q].s == "+") {
          bits += Compiler::parseInt(T[q + 1].s);
          q += 2;
        }
      }
      if (off + v.es <= v.size) memcpy(d + off, &bits, v.es);
      off += v.es;
    }
  }
  for (auto& e : M.entries) {
    auto K = std::make_unique<Kernel>();
    Compiler C(M, *K);
    try {
      C.compile(M.funcs[e]);
    } catch (Unsupp& u) {
      K->fatal = u.why;
    }
    M.kernels[e] = std::move(K);
  }
}
