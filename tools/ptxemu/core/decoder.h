// The decoder of instructions: what its parts share.
#pragma once
#include "compiler.h"

#include <initializer_list>
#include <limits>

static vector<string> splitDots(const string& s) {
  vector<string> v;
  size_t i = 0;
  while (i <= s.size()) {
    size_t j = s.find('.', i);
    if (j == string::npos) j = s.size();
    v.push_back(s.substr(i, j - i));
    i = j + 1;
  }
  return v;
}
static int cmpCode(const string& s) {
  static const std::map<string, int> M = {
      {"eq", CMP_EQ},   {"ne", CMP_NE},   {"lt", CMP_LT},   {"le", CMP_LE},   {"gt", CMP_GT},
      {"ge", CMP_GE},   {"lo", CMP_LT},   {"ls", CMP_LE},   {"hi", CMP_GT},   {"hs", CMP_GE},
      {"equ", CMP_EQU}, {"neu", CMP_NEU}, {"ltu", CMP_LTU}, {"leu", CMP_LEU}, {"gtu", CMP_GTU},
      {"geu", CMP_GEU}, {"num", CMP_NUM}, {"nan", CMP_NAN}};
  auto it = M.find(s);
  return it == M.end() ? -1 : it->second;
}
#define SELI(F, ...)                               \
  (W_ == 2   ? (Fn)H##F<u16, 32, __VA_ARGS__<u16>> \
   : W_ == 4 ? (Fn)H##F<u32, 32, __VA_ARGS__<u32>> \
             : (Fn)H##F<u64, 32, __VA_ARGS__<u64>>)
#define SELT(F, N)                                        \
  (t == T_U16                 ? (Fn)H##F<u16, 32, N<u16>> \
   : t == T_S16               ? (Fn)H##F<s16, 32, N<s16>> \
   : t == T_U32 || t == T_B32 ? (Fn)H##F<u32, 32, N<u32>> \
   : t == T_S32               ? (Fn)H##F<s32, 32, N<s32>> \
   : t == T_U64 || t == T_B64 ? (Fn)H##F<u64, 32, N<u64>> \
   : t == T_S64               ? (Fn)H##F<s64, 32, N<s64>> \
                              : (Fn) nullptr)
static bool isHalf(Ty t) { return t == T_F16 || t == T_BF16 || t == T_F16X2 || t == T_BF16X2; }
static bool isX2(Ty t) { return t == T_F16X2 || t == T_BF16X2; }
static bool isB(Ty t) { return t == T_BF16 || t == T_BF16X2; }
template <template <class> class F>
static Fn halfBin(Ty t) {
  return t == T_F16     ? (Fn)H2<u16, 32, HB<HF, F>>
         : t == T_F16X2 ? (Fn)H2<u16, 64, HB<HF, F>>
         : t == T_BF16  ? (Fn)H2<u16, 32, HB<BF, F>>
                        : (Fn)H2<u16, 64, HB<BF, F>>;
}
template <class F>
static Fn halfUn(Ty t) {
  return t == T_F16     ? (Fn)H1<u16, 32, HU<HF, F>>
         : t == T_F16X2 ? (Fn)H1<u16, 64, HU<HF, F>>
         : t == T_BF16  ? (Fn)H1<u16, 32, HU<BF, F>>
                        : (Fn)H1<u16, 64, HU<BF, F>>;
}

// Decodes one instruction: `op` with its modifiers in `m`, its operands in `o`.
struct Decoder {
  Compiler& C;
  vector<Opnd>& o;
  Insn& I;
  vector<Opnd>& pq;
  Compiler::Mods m;
  string b;  // the opcode without modifiers
  Ty t;
  int W_ = 4;

  Decoder(Compiler& compiler, const string& op, vector<Opnd>& operands, Insn& insn,
          vector<Opnd>& predicates)
      : C(compiler), o(operands), I(insn), pq(predicates) {
    m.m = splitDots(op);
    m.used.assign(m.m.size(), 0);
    b = m.m[0];
  }

  void run();
  void memOp(bool store);
  void decodeMov();
  void decodeCvta();
  void decodeIsspacep();
  void decodePrefetch();
  void decodeCreatepolicy();
  void decodeMembar();
  void decodeNanosleep();
  void decodeAdd();
  void decodeMul24();
  void decodeSad();
  void decodeDiv();
  void decodeRcp();
  void decodeMin();
  void decodeAbs();
  void decodeCopysign();
  void decodeTestp();
  void decodeAnd();
  void decodeCnot();
  void decodeLop3();
  void decodeShl();
  void decodeShf();
  void decodePopc();
  void decodeBrev();
  void decodeBfind();
  void decodeBfe();
  void decodeBfi();
  void decodePrmt();
  void decodeDp4a();
  void decodeSetp();
  void decodeSelp();
  void decodeSlct();
  void decodeCvt();
  void decodeShfl();
  void decodeVote();
  void decodeMatch();
  void decodeRedux();
  void decodeElect();
  void decodeActivemask();
  void decodeBar();
  void decodeLdmatrix();
  void decodeMma();
  void decodeCp();
  void decodeAtom();

  template <class... A>
  auto round(A&&... a) {
    return C.round(std::forward<A>(a)...);
  }
  template <class... A>
  auto dstP(A&&... a) {
    return C.dstP(std::forward<A>(a)...);
  }
  template <class... A>
  auto srcAny(A&&... a) {
    return C.srcAny(std::forward<A>(a)...);
  }
  template <class... A>
  auto addr(A&&... a) {
    return C.addr(std::forward<A>(a)...);
  }
  template <class... A>
  auto cst(A&&... a) {
    return C.cst(std::forward<A>(a)...);
  }
  template <class... A>
  u32 dst(A&&... a) {
    return C.dst(std::forward<A>(a)...);
  }
  template <class... A>
  u32 src(A&&... a) {
    return C.src(std::forward<A>(a)...);
  }
  template <class... A>
  void finishF(A&&... a) {
    C.finishF(std::forward<A>(a)...);
  }
  template <class... A>
  u32 addExt(A&&... a) {
    return C.addExt(std::forward<A>(a)...);
  }
  void need(size_t n) {
    if (o.size() != n) unsupp("%zu operands where %zu expected", o.size(), n);
  }
  // One destination and then sources, of these widths in bytes.
  void take(std::initializer_list<int> widths) {
    need(widths.size());
    size_t i = 0;
    for (int w : widths) {
      I.o[i] = i ? src(o[i], w) : dst(o[0], w);
      i++;
    }
  }
  // A destination and one, two or three sources, all of one width.
  void operands(size_t sources, int w, Ty type) {
    need(sources + 1);
    I.o[0] = dst(o[0], w);
    for (size_t i = 1; i <= sources; i++) I.o[i] = src(o[i], w, type);
  }
  void std1(int w, Ty type = T_NONE) { operands(1, w, type); }
  void std2(int w, Ty type = T_NONE) { operands(2, w, type); }
  void std3(int w, Ty type = T_NONE) { operands(3, w, type); }
  void fcls(Ty type, int c32) { I.cls = type == T_F64 ? C_FP64 : isHalf(type) ? C_FP16 : c32; }
};
