// The kernels for x86-64-v4: AVX-512.
#include "problem.h"

#ifdef SALKERNELS_X86_LEVELS
#include "kernel_includes.h"

// Only what follows is compiled for the newer processor: library headers above must not be, since
// the linker could then take their inline functions for everyone.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif

#define SALKERNELS_ISA avx512
#define SALKERNELS_VECTOR_BYTES 64
#include "kernels-inl.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
