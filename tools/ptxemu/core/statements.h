// Compiles the statements of a function: declarations, calls, instructions.
#pragma once
#include "decode.h"

inline void Compiler::varDecl(size_t& p,
                              int space) {  // T[p] is the first token after the space directive
  u32 align = 0;
  int es = 1;
  Ty t = T_NONE;
  while (T[p].s[0] == '.') {
    if (T[p].s == ".align") {
      align = atoi(T[p + 1].s.c_str());
      p += 2;
      continue;
    }
    string s = T[p].s.substr(1);
    Ty q = parseTy(s);
    if (q != T_NONE) {
      t = q;
      es = tsize(q);
    } else if (s == "v2")
      es *= 2;
    else if (s == "v4")
      es *= 4;
    p++;
  }
  for (;;) {
    string name = T[p].s;
    p++;
    u64 n = 1;
    bool arr = false;
    while (T[p].s == "[") {
      arr = true;
      n *= T[p + 1].s == "]" ? 0 : parseInt(T[p + 1].s);
      p += T[p + 1].s == "]" ? 2 : 3;
    }
    (void)arr;
    (void)t;
    u32 size = n * es;
    u32 al = std::max<u32>(align, es);
    VarSym v{space, 0, size};
    if (space == SP_SHARED) {
      v = allocShared(name + "#" + std::to_string(sc.back().id), size, al);
    } else if (space == SP_LOCAL || space == SP_FRAME) {
      u32 o = (K.localBytes + al - 1) / al * al;
      o = (o + 15) & ~15u;
      K.localBytes = o + size;
      v.addr = o;
    } else
      unsupp("variable space in function body");
    sc.back().vars[name] = v;
    if (T[p].s == "=") {
      while (T[p].s != ";") p++;
    }
    if (T[p].s == ",") {
      p++;
      continue;
    }
    break;
  }
  if (T[p].s == ";") p++;
}
inline void Compiler::doCall(size_t& p, u32 pred, u8 pneg, vector<int>& chain, const string& op) {
  vector<Opnd> rets, args;
  string fn;
  auto list = [&](vector<Opnd>& v) {
    p++;
    while (T[p].s != ")") {
      v.push_back(operand(p));
      if (T[p].s == ",") p++;
    }
    p++;
  };
  if (T[p].s == "(") {
    list(rets);
    if (T[p].s == ",") p++;
  }
  fn = T[p].s;
  p++;
  if (T[p].s == ",") {
    p++;
    if (T[p].s == "(") list(args);
    if (T[p].s == ",") {
      p += 2;
    }
  }
  if (T[p].s != ";") unsupp("call syntax");
  RegSym rr;
  if (findReg(fn, rr)) unsupp("indirect call");
  auto it = M.funcs.find(fn);
  if (it == M.funcs.end()) unsupp("call of unknown function %s", fn.c_str());
  Func& f = it->second;
  for (auto& v : {&rets, &args})
    for (auto& a : *v)
      if (a.k != Opnd::SYM || a.symspace != SP_FRAME)
        unsupp("call argument is not a .param variable");
  if (f.ext) {
    Insn I;
    I.line = curLine;
    I.locf = locf;
    I.locl = locl;
    I.pred = pred;
    I.pneg = pneg;
    vector<u32> ex;
    ex.push_back(rets.empty() ? NOP_ : (u32)rets[0].symaddr);
    for (auto& a : args) ex.push_back(a.symaddr);
    I.x = addExt(ex);
    I.vn = ex.size();
    I.cls = C_OTHER;
    if (fn == "vprintf")
      I.fn = h_vprintf;
    else if (fn == "__assertfail")
      I.fn = h_assertfail;
    else
      unsupp("call of extern function %s", fn.c_str());
    K.code.push_back(I);
    return;
  }
  if (++depth > 12) unsupp("call depth > 12 (recursion?)");
  int myid = scopeCtr++;
  string after = "$aftercall" + std::to_string(myid);
  if (pred != NOP_) {
    Insn I;
    I.kind = K_BRA;
    I.cls = C_HIDDEN;
    I.line = curLine;
    I.pred = pred;
    I.pneg = !pneg;
    refs.push_back({K.code.size(), after, chain, 0});
    K.code.push_back(I);
  }
  std::map<string, VarSym> bind;
  for (size_t i = 0; i < f.params.size() && i < args.size(); i++)
    bind[f.params[i].name] = {SP_FRAME, args[i].symaddr, args[i].symspace ? f.params[i].size : 0};
  for (size_t i = 0; i < f.rets.size() && i < rets.size(); i++)
    bind[f.rets[i].name] = {SP_FRAME, rets[i].symaddr, f.rets[i].size};
  vector<Scope> saved;
  saved.swap(sc);
  u32 sl = curLine, lf = locf, ll = locl;
  parseBody(f, bind, 1);
  saved.swap(sc);
  curLine = sl;
  locf = lf;
  locl = ll;
  depth--;
  labels[{chain.back(), after}] = K.code.size();
}
inline void Compiler::parseBody(const Func& F, std::map<string, VarSym>& bind, int inl) {
  sc.push_back(Scope());
  sc.back().id = scopeCtr++;
  int root = sc.back().id;
  for (auto& kv : bind) sc.back().vars[kv.first] = kv.second;
  size_t p = F.b;
  while (p < F.e) {
    Tok& t = T[p];
    curLine = t.line;
    if (t.k == 'p' && t.s == "{") {
      sc.push_back(Scope());
      sc.back().id = scopeCtr++;
      p++;
      continue;
    }
    if (t.k == 'p' && t.s == "}") {
      if (sc.size() > 1) sc.pop_back();
      p++;
      continue;
    }
    if (t.k == 'p' && t.s == ";") {
      p++;
      continue;
    }
    if (t.k == 'i' && t.s[0] == '.') {
      if (t.s == ".reg") {
        p++;
        Ty ty = T_NONE;
        while (T[p].s[0] == '.') {
          ty = parseTy(T[p].s.substr(1));
          p++;
        }
        int w = regW(ty);
        if (ty == T_PRED) w = 0;
        for (;;) {
          string n = T[p].s;
          p++;
          if (T[p].s == "<") {
            u32 c = atoi(T[p + 1].s.c_str());
            p += 3;
            RegRange r;
            r.w = w;
            r.count = c;
            r.stride = w ? 32 * w : 4;
            r.base = alloc(w, c);
            sc.back().ranges[n] = r;
          } else
            sc.back().regs[n] = {w, alloc(w)};
          if (T[p].s == ",") {
            p++;
            continue;
          }
          break;
        }
        if (T[p].s == ";") p++;
        continue;
      }
      if (t.s == ".loc") {
        locf = atoi(T[p + 1].s.c_str());
        locl = atoi(T[p + 2].s.c_str());
        u32 l = t.line;
        while (p < F.e && T[p].line == l) p++;
        continue;
      }
      if (t.s == ".file") {
        u32 l = t.line;
        while (p < F.e && T[p].line == l) p++;
        continue;
      }
      if (t.s == ".pragma" || t.s == ".callprototype" || t.s == ".calltargets" ||
          t.s == ".attribute") {
        while (p < F.e && T[p].s != ";") p++;
        continue;
      }
      try {
        p++;
        if (t.s == ".local")
          varDecl(p, SP_LOCAL);
        else if (t.s == ".shared")
          varDecl(p, SP_SHARED);
        else if (t.s == ".param")
          varDecl(p, SP_FRAME);
        else
          unsupp("directive %s in body", t.s.c_str());
      } catch (Unsupp& u) {
        K.unsupported.push_back({curLine, t.s + ": " + u.why});
        while (p < F.e && T[p].s != ";") p++;
      }
      continue;
    }
    if (t.k == 'i' && p + 1 < F.e && T[p + 1].k == 'p' && T[p + 1].s == ":") {
      string n = t.s;
      p += 2;
      if (T[p].s == ".branchtargets") {
        p++;
        vector<string> v;
        while (T[p].s != ";") {
          if (T[p].s != ",") v.push_back(T[p].s);
          p++;
        }
        btargets[{sc.back().id, n}] = v;
        continue;
      }
      if (T[p].s == ".callprototype" || T[p].s == ".calltargets") {
        while (T[p].s != ";") p++;
        continue;
      }
      labels[{sc.back().id, n}] = K.code.size();
      continue;
    }
    // instruction
    Insn I;
    I.line = curLine;
    I.locf = locf;
    I.locl = locl;
    string op = "?";
    vector<int> chain;
    for (auto& s : sc) chain.push_back(s.id);
    try {
      if (t.s == "@") {
        p++;
        bool ng = false;
        if (T[p].s == "!") {
          ng = true;
          p++;
        }
        RegSym r;
        if (!findReg(T[p].s, r) || r.w != 0) unsupp("guard predicate %s", T[p].s.c_str());
        I.pred = r.off;
        I.pneg = ng;
        p++;
      }
      op = T[p].s;
      I.line = T[p].line;
      curLine = I.line;
      p++;
      auto ip = opIds.find(op);
      if (ip == opIds.end()) {
        opIds[op] = K.ops.size();
        I.opid = K.ops.size();
        K.ops.push_back(op);
      } else
        I.opid = ip->second;
      string b0 = op.substr(0, op.find('.'));
      if (b0 == "bra") {
        I.kind = I.pred == NOP_ ? K_JMP : K_BRA;
        I.cls = C_BRANCH;
        refs.push_back({K.code.size(), T[p].s, chain, 0});
        p++;
        K.code.push_back(I);
      } else if (b0 == "brx") {
        I.kind = K_BRX;
        I.cls = C_BRANCH;
        if (op.compare(0, 7, "brx.idx")) unsupp("brx");
        Opnd o = operand(p);
        if (o.k != Opnd::REG || o.w != 4) unsupp("brx index");
        I.o[0] = o.off;
        if (T[p].s != ",") unsupp("brx");
        p++;
        refs.push_back({K.code.size(), T[p].s, chain, 1});
        p++;
        K.code.push_back(I);
      } else if (b0 == "ret" || b0 == "exit") {
        if (b0 == "ret" && inl) {
          I.kind = I.pred == NOP_ ? K_JMP : K_BRA;
          I.cls = C_BRANCH;
          refs.push_back({K.code.size(), "$ret", {root}, 0});
        } else {
          I.kind = K_EXIT;
          I.cls = C_BRANCH;
        }
        K.code.push_back(I);
      } else if (b0 == "trap" || b0 == "brkpt") {
        I.fn = b0 == "trap" ? h_trap : h_nop;
        K.code.push_back(I);
      } else if (b0 == "call")
        doCall(p, I.pred, I.pneg, chain, op);
      else {
        vector<Opnd> o, pq;
        while (T[p].s != ";") {
          o.push_back(operand(p));
          if (T[p].s == "|") {
            p++;
            pq.push_back(operand(p));
          }
          if (T[p].s == ",")
            p++;
          else if (T[p].s != ";")
            unsupp("syntax near '%s'", T[p].s.c_str());
        }
        decode(op, o, I, pq);
        if (!I.fn) unsupp("no handler");
        K.code.push_back(I);
      }
      if (T[p].s != ";") unsupp("syntax near '%s'", T[p].s.c_str());
      p++;
    } catch (Unsupp& u) {
      K.unsupported.push_back({I.line, op + ": " + u.why});
      I.kind = K_NORMAL;
      I.fn = h_unsupp;
      I.cls = C_OTHER;
      K.code.push_back(I);
      while (p < F.e && T[p].s != ";") p++;
    }
  }
  if (inl)
    labels[{root, "$ret"}] = K.code.size();
  else {
    Insn I;
    I.kind = K_EXIT;
    I.cls = C_HIDDEN;
    I.line = curLine;
    K.code.push_back(I);
  }
  sc.clear();
}
