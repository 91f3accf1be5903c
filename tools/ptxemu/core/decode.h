// Opcodes and the functions that decode them.
#pragma once
#include "decode_arithmetic.h"
#include "decode_logic.h"
#include "decode_memory.h"
#include "decode_warp.h"

inline void Decoder::run() {
  using Method = void (Decoder::*)();
  static const std::unordered_map<string, Method> methods = {
      {"mov", &Decoder::decodeMov},
      {"cvta", &Decoder::decodeCvta},
      {"isspacep", &Decoder::decodeIsspacep},
      {"prefetch", &Decoder::decodePrefetch},
      {"prefetchu", &Decoder::decodePrefetch},
      {"discard", &Decoder::decodePrefetch},
      {"applypriority", &Decoder::decodePrefetch},
      {"createpolicy", &Decoder::decodeCreatepolicy},
      {"membar", &Decoder::decodeMembar},
      {"fence", &Decoder::decodeMembar},
      {"griddepcontrol", &Decoder::decodeMembar},
      {"nanosleep", &Decoder::decodeNanosleep},
      {"pmevent", &Decoder::decodeNanosleep},
      {"setmaxnreg", &Decoder::decodeNanosleep},
      {"add", &Decoder::decodeAdd},
      {"sub", &Decoder::decodeAdd},
      {"mul", &Decoder::decodeAdd},
      {"fma", &Decoder::decodeAdd},
      {"mad", &Decoder::decodeAdd},
      {"addc", &Decoder::decodeAdd},
      {"subc", &Decoder::decodeAdd},
      {"madc", &Decoder::decodeAdd},
      {"mul24", &Decoder::decodeMul24},
      {"mad24", &Decoder::decodeMul24},
      {"sad", &Decoder::decodeSad},
      {"div", &Decoder::decodeDiv},
      {"rem", &Decoder::decodeDiv},
      {"rcp", &Decoder::decodeRcp},
      {"sqrt", &Decoder::decodeRcp},
      {"rsqrt", &Decoder::decodeRcp},
      {"sin", &Decoder::decodeRcp},
      {"cos", &Decoder::decodeRcp},
      {"lg2", &Decoder::decodeRcp},
      {"ex2", &Decoder::decodeRcp},
      {"tanh", &Decoder::decodeRcp},
      {"min", &Decoder::decodeMin},
      {"max", &Decoder::decodeMin},
      {"abs", &Decoder::decodeAbs},
      {"neg", &Decoder::decodeAbs},
      {"copysign", &Decoder::decodeCopysign},
      {"testp", &Decoder::decodeTestp},
      {"and", &Decoder::decodeAnd},
      {"or", &Decoder::decodeAnd},
      {"xor", &Decoder::decodeAnd},
      {"not", &Decoder::decodeAnd},
      {"cnot", &Decoder::decodeCnot},
      {"lop3", &Decoder::decodeLop3},
      {"shl", &Decoder::decodeShl},
      {"shr", &Decoder::decodeShl},
      {"shf", &Decoder::decodeShf},
      {"popc", &Decoder::decodePopc},
      {"clz", &Decoder::decodePopc},
      {"brev", &Decoder::decodeBrev},
      {"bfind", &Decoder::decodeBfind},
      {"bfe", &Decoder::decodeBfe},
      {"bfi", &Decoder::decodeBfi},
      {"prmt", &Decoder::decodePrmt},
      {"dp4a", &Decoder::decodeDp4a},
      {"dp2a", &Decoder::decodeDp4a},
      {"setp", &Decoder::decodeSetp},
      {"set", &Decoder::decodeSetp},
      {"selp", &Decoder::decodeSelp},
      {"slct", &Decoder::decodeSlct},
      {"cvt", &Decoder::decodeCvt},
      {"shfl", &Decoder::decodeShfl},
      {"vote", &Decoder::decodeVote},
      {"match", &Decoder::decodeMatch},
      {"redux", &Decoder::decodeRedux},
      {"elect", &Decoder::decodeElect},
      {"activemask", &Decoder::decodeActivemask},
      {"bar", &Decoder::decodeBar},
      {"barrier", &Decoder::decodeBar},
      {"ldmatrix", &Decoder::decodeLdmatrix},
      {"stmatrix", &Decoder::decodeLdmatrix},
      {"mma", &Decoder::decodeMma},
      {"cp", &Decoder::decodeCp},
      {"atom", &Decoder::decodeAtom},
      {"red", &Decoder::decodeAtom},
  };
  if (b == "ld" || b == "ldu") return memOp(false);
  if (b == "st") return memOp(true);
  const auto method = methods.find(b);
  if (method == methods.end()) unsupp("opcode %s", b.c_str());
  (this->*method->second)();
}

inline void Compiler::decode(const string& op, vector<Opnd>& o, Insn& I, vector<Opnd>& pq) {
  Decoder(*this, op, o, I, pq).run();
}
