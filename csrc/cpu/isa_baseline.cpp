// The kernels for any processor that the compiler's default flags allow.
#include "kernel_includes.h"

#define SALKERNELS_ISA baseline
#define SALKERNELS_VECTOR_BYTES 16
#include "kernels-inl.h"
