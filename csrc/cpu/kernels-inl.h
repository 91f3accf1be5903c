// The kernels of one instruction set: included by each isa_*.cpp, which names the set and its
// register width. No guard: it is meant to be read once per set, in a namespace of its own.
//
//      isa_baseline.cpp   16 bytes --+
//      isa_avx2.cpp       32 bytes --+--> kernels-inl.h --> kernels_<set>, a table of functions
//      isa_avx512.cpp     64 bytes --+    (*-inl.h)
//
// register_cpu.cpp takes one of the tables when the library is first used. Nothing here may be an
// inline function of a header that others include: the linker would keep one copy of it, perhaps
// that of a set which the machine does not have.

namespace salkernels {
namespace SALKERNELS_ISA {

#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "match-inl.h"
#include "terms-inl.h"
#include "gradient-inl.h"
#include "streamed-inl.h"
#include "lse-inl.h"
#include "lse-weights-inl.h"
#include "lse-gradient-inl.h"
#include "lse-pieces-inl.h"

// Runs Function<accumulation dtype, storage dtype>(arguments...). Half precision is a storage dtype
// alone: products and sums are fp32.
#define SALKERNELS_BY_DTYPE(FUNCTION, ...)                                \
  switch (problem.dtype) {                                                \
    case DType::f64: return FUNCTION<double, double>(__VA_ARGS__);        \
    case DType::bf16: return FUNCTION<float, BFloat16>(__VA_ARGS__);      \
    case DType::f16: return FUNCTION<float, Half>(__VA_ARGS__);           \
    default: return FUNCTION<float, float>(__VA_ARGS__);                  \
  }

static int64_t row_bytes_any(DType dtype, int64_t channels) {
  return dtype == DType::f64 ? packed_stride<double>(channels) * 8
                             : packed_stride<float>(channels) * 4;
}
static int64_t match_tile_any(const Problem& problem, const Tile* tile, char* scratch) {
  SALKERNELS_BY_DTYPE(match_tile, problem, tile, scratch)
}
static int64_t gradient_tile_any(const Problem& problem, const Tile* tile, char* scratch) {
  SALKERNELS_BY_DTYPE(gradient_tile, problem, tile, scratch)
}
static int64_t match_streamed_any(const Problem& problem, const StreamedMatch* item,
                                  char* scratch) {
  SALKERNELS_BY_DTYPE(match_streamed, problem, item, scratch)
}
static int64_t norms_streamed_any(const Problem& problem, const StreamedNorms* item,
                                  char* scratch) {
  SALKERNELS_BY_DTYPE(norms_streamed, problem, item, scratch)
}
static int64_t gradient_streamed_any(const Problem& problem, const StreamedGradient* item,
                                     char* scratch) {
  SALKERNELS_BY_DTYPE(gradient_streamed, problem, item, scratch)
}
static void pair_loss_any(const Problem& problem, int64_t pair) {
  problem.dtype == DType::f64 ? pair_loss<double>(problem, pair) : pair_loss<float>(problem, pair);
}

static int64_t lse_tile_any(const LseProblem& problem, const Tile* tile, char* scratch) {
  SALKERNELS_BY_DTYPE(lse_tile, problem, tile, scratch)
}
static int64_t lse_piece_any(const LseProblem& problem, const LsePiece* piece, char* scratch) {
  SALKERNELS_BY_DTYPE(lse_piece, problem, piece, scratch)
}
static int64_t lse_gradient_tile_any(const LseProblem& problem, const Tile* tile, char* scratch) {
  SALKERNELS_BY_DTYPE(lse_gradient_tile, problem, tile, scratch)
}
static int64_t lse_gradient_piece_any(const LseProblem& problem, const LsePiece* piece,
                                      char* scratch) {
  SALKERNELS_BY_DTYPE(lse_gradient_piece, problem, piece, scratch)
}

#undef SALKERNELS_BY_DTYPE
#undef SALKERNELS_UNROLL
}  // namespace SALKERNELS_ISA

#define SALKERNELS_JOIN_(a, b) a##b
#define SALKERNELS_JOIN(a, b) SALKERNELS_JOIN_(a, b)
#define SALKERNELS_NAME_(isa) #isa
#define SALKERNELS_NAME(isa) SALKERNELS_NAME_(isa)

const Kernels SALKERNELS_JOIN(kernels_, SALKERNELS_ISA) = {
    SALKERNELS_NAME(SALKERNELS_ISA),
    SALKERNELS_ISA::row_bytes_any,
    SALKERNELS_ISA::match_tile_any,
    SALKERNELS_ISA::gradient_tile_any,
    SALKERNELS_ISA::match_streamed_any,
    SALKERNELS_ISA::norms_streamed_any,
    SALKERNELS_ISA::gradient_streamed_any,
    SALKERNELS_ISA::pair_loss_any,
    SALKERNELS_ISA::lse_tile_any,
    SALKERNELS_ISA::lse_piece_any,
    SALKERNELS_ISA::lse_gradient_tile_any,
    SALKERNELS_ISA::lse_gradient_piece_any,
};

}  // namespace salkernels
