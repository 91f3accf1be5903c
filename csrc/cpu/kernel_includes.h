// Every library header that the kernels need, to be read before the instruction set is raised.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "lse.h"
#include "problem.h"
