// What all parts share: types, decoded instructions, kernels, warps, blocks, counters.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cstdarg>
#include <cmath>
#include <string>
#include <vector>
#include <map>
#include <unordered_map>
#include <set>
#include <memory>
#include <algorithm>
#include <functional>
#include <immintrin.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;
typedef __int128 s128;
using std::string;
using std::vector;

static const u64 SH_BASE = 0x7E0000000000ull, LO_BASE = 0x7D0000000000ull,
                 PA_BASE = 0x7C0000000000ull;
static const int REG_SHIFT = 36;  // every global buffer lives in its own 2^36 VA slot
static const u32 NOP_ = 0xFFFFFFFFu;

enum Space : u8 { SP_GEN, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_CONST, SP_PARAM, SP_FRAME };
enum Ty : u8 {
  T_NONE,
  T_PRED,
  T_B8,
  T_U8,
  T_S8,
  T_B16,
  T_U16,
  T_S16,
  T_F16,
  T_BF16,
  T_B32,
  T_U32,
  T_S32,
  T_F32,
  T_TF32,
  T_F16X2,
  T_BF16X2,
  T_B64,
  T_U64,
  T_S64,
  T_F64,
  T_B128,
  T_U16X2,
  T_S16X2,
  T_E4M3X2,
  T_E5M2X2
};
enum Kind : u8 { K_NORMAL, K_BRA, K_JMP, K_BRX, K_EXIT, K_SYNC, K_ALIGNED, K_BAR, K_TRAP };
enum Cls : u8 {
  C_FMA32,
  C_ADD32,
  C_MUL32,
  C_FP32X,
  C_FP64,
  C_FP16,
  C_MMA,
  C_LDG,
  C_STG,
  C_LDS,
  C_STS,
  C_LDGEN,
  C_STGEN,
  C_LDL,
  C_STL,
  C_LDPARAM,
  C_LDC,
  C_CPASYNC,
  C_LDMATRIX,
  C_ATOM,
  C_BAR,
  C_BRANCH,
  C_SFU,
  C_INT,
  C_CVT,
  C_MOV,
  C_PRED,
  C_WARP,
  C_FENCE,
  C_OTHER,
  C_HIDDEN,
  C_N
};
static const char* const CLS_NAME[C_N] = {
    "fp32_fma",   "fp32_add",  "fp32_mul",  "fp32_other",     "fp64",      "fp16",
    "mma",        "ld_global", "st_global", "ld_shared",      "st_shared", "ld_generic",
    "st_generic", "ld_local",  "st_local",  "ld_param",       "ld_const",  "cp_async",
    "ldmatrix",   "atom",      "barrier",   "branch",         "sfu",       "int",
    "cvt",        "mov",       "setp_selp", "warp_shfl_vote", "fence",     "other",
    "hidden"};

struct EmuError {
  string kind, msg;
};
struct Unsupp {
  string why;
};
[[noreturn]] static void unsupp(const char* f, ...) {
  char b[512];
  va_list a;
  va_start(a, f);
  vsnprintf(b, 512, f, a);
  va_end(a);
  throw Unsupp{b};
}

struct Exec;
struct Warp;
struct Insn;
typedef void (*Fn)(Exec&, Warp&, const Insn&, u32);
struct Insn {
  Fn fn = nullptr, fn2 = nullptr;
  u32 o[6] = {0, 0, 0, 0, 0, 0};
  s64 imm = 0;
  u32 x = 0;
  u16 nx = 0;  // extra operands in Kernel::ext
  u32 pred = NOP_;
  u8 pneg = 0;
  u8 kind = K_NORMAL, cls = C_OTHER;
  u8 sz = 0, dw = 0, sgn = 0, vn = 1, aw = 8, space = 0, sub = 0, sub2 = 0, ty = 0, ty2 = 0,
     flags = 0, eff = 0;
  u32 csr = 0;
  u8 sat = 0;
  s32 target = -1;
  u32 line = 0;
  u32 locf = 0, locl = 0;
  u32 opid = 0;
};
struct ParamDecl {
  string name, type;
  u32 size, align, off;
  bool isptr, isarray;
};
struct ConstInit {
  u32 off;
  u8 width;
  u64 bits;
  bool dyn;
};  // dyn: add dynamic shared base
struct SregInit {
  u32 off;
  u8 width;
  int id;
};
struct Kernel {
  string name;
  vector<ParamDecl> params;
  u32 paramBytes = 0;
  vector<Insn> code;
  vector<u32> ext;
  u32 rfBytes = 0;
  vector<ConstInit> consts;
  vector<SregInit> sregs;
  u32 staticShared = 0, dynBase = 0, localBytes = 0;
  int reqntid[3] = {0, 0, 0}, maxntid = 0;
  bool usesDyn = false;
  vector<std::pair<u32, string>> unsupported;
  string fatal;
  u32 granule = 4;
  vector<string> ops;
  vector<u64> hist;
};
struct Interval {
  u64 lo, hi;
};
struct Region {
  u64 va = 0, size = 0;
  u8* host = nullptr;
  string name;
  bool ro = false, module = false;
  vector<Interval> iv;
  u64 ilo = 0, ihi = 0;  // offsets, single-interval fast path
  vector<u64> rd, wr;
  vector<u32> strd, stwr;  // sector bitmaps + per-block stamps
  u64* shadow = nullptr;
  u64 shadowN = 0;
  int gran = 4;  // (thread+1)<<32 | epoch
  vector<u64> init;
  bool trackInit = false;
};
struct Group {
  s32 pc;
  u32 mask;
  bool wait;
};
struct CpEnt {
  u32 dst;
  u8 size, lane;
  u32 grp;
  u32 pc;
  u8 data[16];
};
enum { WS_RUN, WS_BAR, WS_DONE };
struct Block;
struct Warp {
  u8* r = nullptr;
  u32 alive = 0, full = 0, exited = 0;
  int state = WS_RUN;
  s32 pc = 0;
  u32 mask = 0;
  Group pend[34];
  int np = 0;
  s32 next = 0x7fffffff;
  int id = 0;
  u8* local = nullptr;
  u8* linit = nullptr;
  u32 vc[32];
  Block* blk = nullptr;
  bool changed = false;
  u32 cpcnt[32];
  vector<CpEnt> cp;
  u64 icount = 0;
  int barid = 0;
  u32 cc = 0;  // carry flags
  u32 redp = 0;
};
struct Bar {
  u32 arrived = 0;
  u32 nthreads = 0, expect = 0;
  s32 line = 0;
  u32 cnt = 0;
  bool andv = true, orv = false;
  u32 nv[32] = {0};
};
struct Block {
  u32 bx = 0, by = 0, bz = 0;
  u64 lin = 0;
  vector<Warp> w;
  vector<u8> rf;
  vector<u8> sh;
  vector<u8> loc, linit;
  vector<u32> wclk, rclk, wpc, rpc;
  vector<u8> wwarp;
  u32 base = 0;
  std::unordered_map<u32, vector<std::pair<u32, u32>>> multi;
  Bar bars[16];
  u32 epoch = 0;
  int nw = 0;
  bool active = false;
  u32 stamp = 0;
};
struct PcStat {
  u64 nw = 0, nt = 0;
};
struct MemStat {
  u64 req = 0, lanes = 0, bytes = 0, ubytes = 0, sectors = 0, blk_sectors = 0;
};
struct ShStat {
  u64 req = 0, lanes = 0, bytes = 0, wave = 0, ideal = 0;
};
struct RaceRep {
  string kind, space;
  u32 line1, line2;
  u64 addr;
  u64 block;
  u32 w1, w2;
  u64 count;
};
struct Options {
  int races = 1, uninit_shared = 1, uninit_local = 1, poison = 1, stats = 1, gl_ww = 1, order = 0,
      conc = 1, sched = 0, uninit_global = 1;
  u64 max_warp_insns = 400000000ull;
  u64 seed = 1;
  u32 quantum = 20000;
  int fail_fast = 1;
};
