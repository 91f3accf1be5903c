// PTX text to tokens, and the symbols of a file.
#pragma once
#include "async_atomic.h"

struct Tok {
  string s;
  u32 line;
  char k;
};  // k: i ident, n number, p punct, s string
static vector<Tok> tokenize(const string& t) {
  vector<Tok> v;
  size_t i = 0, n = t.size();
  u32 line = 1;
  auto idc = [](char c) { return isalnum((u8)c) || c == '_' || c == '$' || c == '%' || c == '.'; };
  while (i < n) {
    char c = t[i];
    if (c == '\n') {
      line++;
      i++;
      continue;
    }
    if (isspace((u8)c)) {
      i++;
      continue;
    }
    if (c == '/' && i + 1 < n && t[i + 1] == '/') {
      while (i < n && t[i] != '\n') i++;
      continue;
    }
    if (c == '/' && i + 1 < n && t[i + 1] == '*') {
      i += 2;
      while (i + 1 < n && !(t[i] == '*' && t[i + 1] == '/')) {
        if (t[i] == '\n') line++;
        i++;
      }
      i += 2;
      continue;
    }
    if (c == '"') {
      size_t j = i + 1;
      string s;
      while (j < n && t[j] != '"') {
        if (t[j] == '\\') j++;
        s += t[j++];
      }
      v.push_back({s, line, 's'});
      i = j + 1;
      continue;
    }
    if (isdigit((u8)c)) {
      size_t j = i;
      while (j < n && (isalnum((u8)t[j]) || t[j] == '.')) {
        if ((t[j] == 'e' || t[j] == 'E') &&
            !(t[i] == '0' && i + 1 < n && strchr("xXdDfF", t[i + 1])) && j + 1 < n &&
            (t[j + 1] == '-' || t[j + 1] == '+'))
          j++;
        j++;
      }
      v.push_back({t.substr(i, j - i), line, 'n'});
      i = j;
      continue;
    }
    if (idc(c)) {
      size_t j = i;
      while (j < n && (idc(t[j]) || (t[j] == ':' && j + 1 < n && t[j + 1] == ':') ||
                       (t[j] == ':' && j > i && t[j - 1] == ':')))
        j++;
      if (c == '.') {
        size_t q = i;
        while (q < j) {
          size_t e = t.find('.', q + 1);
          if (e == string::npos || e > j) e = j;
          v.push_back({t.substr(q, e - q), line, 'i'});
          q = e;
        }
      } else
        v.push_back({t.substr(i, j - i), line, 'i'});
      i = j;
      continue;
    }
    v.push_back({string(1, c), line, 'p'});
    i++;
  }
  return v;
}

static Ty parseTy(const string& s) {
  static const std::map<string, Ty> M = {
      {"pred", T_PRED}, {"b8", T_B8},       {"u8", T_U8},       {"s8", T_S8},
      {"b16", T_B16},   {"u16", T_U16},     {"s16", T_S16},     {"f16", T_F16},
      {"bf16", T_BF16}, {"b32", T_B32},     {"u32", T_U32},     {"s32", T_S32},
      {"f32", T_F32},   {"tf32", T_TF32},   {"f16x2", T_F16X2}, {"bf16x2", T_BF16X2},
      {"b64", T_B64},   {"u64", T_U64},     {"s64", T_S64},     {"f64", T_F64},
      {"b128", T_B128}, {"u16x2", T_U16X2}, {"s16x2", T_S16X2}};
  auto it = M.find(s);
  return it == M.end() ? T_NONE : it->second;
}
static int regW(Ty t) {
  if (t == T_PRED) return 0;
  int s = tsize(t);
  return s < 2 ? 2 : s;
}

struct Opnd {
  enum K { REG, IMM, FLT, SYM, ADDR, VEC, SINK, SREG, NAME } k = SINK;
  bool neg = false;
  int w = -1;
  u32 off = 0;
  u64 u = 0;
  double d = 0;
  string name;
  s64 add = 0;
  int sreg = 0;
  vector<Opnd> v;
  int symspace = 0;
  u64 symaddr = 0;
  bool symdyn = false;
  bool hexf = false;
};
struct VarSym {
  int space;
  u64 addr;
  u32 size;
  bool dyn = false;
};
struct RegSym {
  int w;
  u32 off;
};
struct RegRange {
  int w;
  u32 base;
  u32 count, stride;
};
struct Scope {
  int id;
  std::unordered_map<string, RegSym> regs;
  std::unordered_map<string, RegRange> ranges;
  std::unordered_map<string, VarSym> vars;
};
struct GVar {
  string name;
  u32 size, align;
  int space;
  bool isExtern;
  size_t initTok;
  u64 va = 0;
  int es = 1;
  bool fl = false;
};
struct PDecl {
  string name, type;
  u32 size, align;
  bool isptr, isarr;
};
struct Func {
  string name;
  bool entry = false, ext = false;
  vector<PDecl> params, rets;
  size_t b = 0, e = 0;
  int reqntid[3] = {0, 0, 0};
  int maxntid = 0;
  u32 line = 0;
};

struct Module {
  string text;
  vector<string> lines;
  vector<Tok> T;
  std::map<string, Func> funcs;
  vector<string> entries;
  std::map<string, GVar> gvars;
  vector<string> files;
  vector<std::unique_ptr<Region>> regions;
  vector<vector<u8>> storage;
  std::map<string, std::unique_ptr<Kernel>> kernels;
  string target, version;
  u64 nextSlot = 1200;
};
