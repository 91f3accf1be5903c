// What lets an editor, or `g++ -fsyntax-only`, read a file of the kernels by itself. They are
// fragments otherwise: each isa_*.cpp includes all of them once, inside the namespace of its
// instruction set.
#include "kernel_includes.h"

#define SALKERNELS_ISA editor
#define SALKERNELS_VECTOR_BYTES 16

using namespace salkernels;
