// Lays out the code of a kernel, so that lanes meet again as early as they can.
#pragma once
#include "statements.h"

inline void Compiler::resolve() {
  Insn e;
  e.kind = K_EXIT;
  e.cls = C_HIDDEN;
  e.line = curLine;
  K.code.push_back(e);
  auto find = [&](const string& n, const vector<int>& ch) {
    for (int i = (int)ch.size() - 1; i >= 0; i--) {
      auto it = labels.find({ch[i], n});
      if (it != labels.end()) return it->second;
    }
    return -1;
  };
  for (auto& r : refs) {
    Insn& I = K.code[r.insn];
    if (r.kind == 0) {
      I.target = find(r.name, r.chain);
      if (I.target < 0) {
        K.unsupported.push_back({I.line, "bra: unknown label " + r.name});
        I.kind = K_NORMAL;
        I.fn = h_unsupp;
      }
    } else {
      bool ok = false;
      for (int i = (int)r.chain.size() - 1; i >= 0 && !ok; i--) {
        auto it = btargets.find({r.chain[i], r.name});
        if (it == btargets.end()) continue;
        vector<int> v;
        for (auto& l : it->second) v.push_back(find(l, r.chain));
        I.x = brx.size();
        I.nx = v.size();
        brx.push_back(v);
        ok = true;
      }
      if (!ok) {
        K.unsupported.push_back({I.line, "brx: unknown target list " + r.name});
        I.kind = K_NORMAL;
        I.fn = h_unsupp;
      }
    }
  }
}
inline void Compiler::layout() {
  vector<Insn>& C = K.code;
  int n = C.size();
  vector<char> lead(n + 1, 0);
  lead[0] = 1;
  for (int i = 0; i < n; i++) {
    Insn& I = C[i];
    if (I.kind == K_BRA || I.kind == K_JMP) {
      lead[I.target] = 1;
      lead[i + 1] = 1;
    } else if (I.kind == K_BRX) {
      for (int t : brx[I.x]) lead[t] = 1;
      lead[i + 1] = 1;
    } else if (I.kind == K_EXIT)
      lead[i + 1] = 1;
  }
  struct BB {
    int b, e, ft = -1, tk = -1;
    vector<int> mt;
    bool latch = false;
  };
  vector<BB> B;
  vector<int> bbOf(n + 1, -1);
  for (int i = 0; i < n;) {
    int j = i + 1;
    while (j < n && !lead[j]) j++;
    for (int k = i; k < j; k++) bbOf[k] = B.size();
    BB b;
    b.b = i;
    b.e = j;
    B.push_back(b);
    i = j;
  }
  for (auto& b : B) {
    Insn& I = C[b.e - 1];
    int nx = b.e < n ? bbOf[b.e] : -1;
    if (I.kind == K_JMP)
      b.tk = bbOf[I.target];
    else if (I.kind == K_BRA) {
      b.tk = bbOf[I.target];
      b.ft = nx;
    } else if (I.kind == K_BRX) {
      for (int t : brx[I.x]) b.mt.push_back(bbOf[t]);
      if (I.pred != NOP_) b.ft = nx;
    } else if (I.kind == K_EXIT) {
      if (I.pred != NOP_) b.ft = nx;
    } else
      b.ft = nx;
  }
  auto succ = [&](int v) {
    vector<int> s;
    if (B[v].ft >= 0) s.push_back(B[v].ft);
    if (B[v].tk >= 0) s.push_back(B[v].tk);
    for (int t : B[v].mt) s.push_back(t);
    return s;
  };
  vector<int> out;
  vector<char> reach(B.size(), 0);
  {
    vector<int> st{0};
    reach[0] = 1;
    while (!st.empty()) {
      int v = st.back();
      st.pop_back();
      for (int s : succ(v))
        if (!reach[s]) {
          reach[s] = 1;
          st.push_back(s);
        }
    }
  }
  std::function<void(vector<int>, int)> order = [&](vector<int> nodes, int entry) {
    std::unordered_map<int, int> idx;
    for (size_t i = 0; i < nodes.size(); i++) idx[nodes[i]] = i;
    int N = nodes.size();
    vector<vector<int>> S(N);
    for (int i = 0; i < N; i++)
      for (int s : succ(nodes[i])) {
        auto it = idx.find(s);
        if (it != idx.end() && s != entry) S[i].push_back(it->second);
      }
    // iterative Tarjan
    vector<int> dfn(N, -1), low(N, 0), comp(N, -1), stk, itp(N, 0);
    vector<char> on(N, 0);
    int ctr = 0, nc = 0;
    for (int r = 0; r < N; r++)
      if (dfn[r] < 0) {
        vector<int> cs{r};
        while (!cs.empty()) {
          int v = cs.back();
          if (dfn[v] < 0) {
            dfn[v] = low[v] = ctr++;
            stk.push_back(v);
            on[v] = 1;
          }
          if (itp[v] < (int)S[v].size()) {
            int w = S[v][itp[v]++];
            if (dfn[w] < 0)
              cs.push_back(w);
            else if (on[w])
              low[v] = std::min(low[v], dfn[w]);
          } else {
            cs.pop_back();
            if (!cs.empty()) low[cs.back()] = std::min(low[cs.back()], low[v]);
            if (low[v] == dfn[v]) {
              for (;;) {
                int w = stk.back();
                stk.pop_back();
                on[w] = 0;
                comp[w] = nc;
                if (w == v) break;
              }
              nc++;
            }
          }
        }
      }
    vector<vector<int>> mem(nc);
    for (int i = 0; i < N; i++) mem[comp[i]].push_back(nodes[i]);
    vector<int> indeg(nc, 0), mn(nc);
    for (int c = 0; c < nc; c++) mn[c] = *std::min_element(mem[c].begin(), mem[c].end());
    for (int i = 0; i < N; i++)
      for (int s : S[i])
        if (comp[s] != comp[i]) indeg[comp[s]]++;
    std::set<std::pair<int, int>> ready;
    for (int c = 0; c < nc; c++)
      if (!indeg[c]) ready.insert({c == comp[idx[entry]] ? -1 : mn[c], c});
    while (!ready.empty()) {
      int c = ready.begin()->second;
      ready.erase(ready.begin());
      vector<int> members = mem[c];
      if (members.size() == 1)
        out.push_back(members[0]);
      else {
        std::set<int> ms(members.begin(), members.end());
        int header = -1;
        if (ms.count(entry))
          header = entry;
        else {
          for (int v : nodes)
            if (!ms.count(v))
              for (int s : succ(v))
                if (ms.count(s) && (header < 0 || s < header)) header = s;
          if (header < 0) header = mn[c];
        }
        vector<int> back;
        for (int v : members)
          for (int s : succ(v))
            if (s == header) {
              back.push_back(v);
              break;
            }
        int latch = -1;
        if (back.size() > 1) {
          latch = B.size();
          BB l;
          l.b = l.e = 0;
          l.latch = true;
          l.tk = header;
          B.push_back(l);
          for (int v : back) {
            if (B[v].ft == header) B[v].ft = latch;
            if (B[v].tk == header) B[v].tk = latch;
            for (int& t : B[v].mt)
              if (t == header) t = latch;
          }
        }
        order(members, header);
        if (latch >= 0) out.push_back(latch);
      }
      for (int v : mem[c])
        for (int s : S[idx[v]])
          if (comp[s] != c && --indeg[comp[s]] == 0) ready.insert({mn[comp[s]], comp[s]});
    }
  };
  vector<int> all;
  for (size_t i = 0; i < reach.size(); i++)
    if (reach[i]) all.push_back(i);
  order(all, 0);
  vector<Insn> R;
  vector<int> start(B.size(), -1);
  for (size_t q = 0; q < out.size(); q++) {
    BB& b = B[out[q]];
    start[out[q]] = R.size();
    int nx = q + 1 < out.size() ? out[q + 1] : -1;
    auto jmp = [&](int to) {
      Insn J;
      J.kind = K_JMP;
      J.cls = C_HIDDEN;
      J.target = to;
      J.line = R.empty() ? 0 : R.back().line;
      R.push_back(J);
    };
    if (b.latch) {
      jmp(b.tk);
      continue;
    }
    for (int i = b.b; i < b.e; i++) R.push_back(C[i]);
    Insn& L = R.back();
    if (L.kind == K_BRA || L.kind == K_JMP) L.target = b.tk;
    if (L.kind == K_BRX) {
      brx.push_back(b.mt);
      L.x = brx.size() - 1;
    }
    if (b.ft >= 0 && b.ft != nx) jmp(b.ft);
  }
  for (auto& I : R) {
    if (I.kind == K_BRA || I.kind == K_JMP)
      I.target = start[I.target];
    else if (I.kind == K_BRX) {
      vector<u32> v;
      for (int t : brx[I.x]) v.push_back(start[t]);
      I.x = addExt(v);
      I.nx = v.size();
    }
  }
  C.swap(R);
}
inline void Compiler::compile(const Func& F) {
  K.name = F.name;
  for (int i = 0; i < 3; i++) K.reqntid[i] = F.reqntid[i];
  K.maxntid = F.maxntid;
  std::map<string, VarSym> bind;
  u32 off = 0;
  for (auto& d : F.params) {
    off = (off + d.align - 1) / d.align * d.align;
    K.params.push_back({d.name, d.type, d.size, d.align, off, d.isptr, d.isarr});
    bind[d.name] = {SP_PARAM, off, d.size};
    off += d.size;
  }
  K.paramBytes = off;
  cst(8, 0);
  parseBody(F, bind, 0);
  resolve();
  if (K.unsupported.empty() || true) layout();
  K.granule = std::max<u32>(1, std::min<u32>(4, minSh));
  K.localBytes = (K.localBytes + 15) & ~15u;
  K.dynBase = (K.staticShared + 15) & ~15u;
  K.rfBytes = (K.rfBytes + 127) & ~63u;
}
