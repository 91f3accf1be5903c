// The CUDA library as its host side sees it: no CUDA header is needed to call it.
#pragma once

#include "problem.h"

namespace salkernels {
namespace cuda {

// Launch on the current device. The text of the first error, or null.
const char* launch_forward(Problem problem, void* stream);
const char* launch_backward(Problem problem, void* stream);

// The norms alone, for a backward that follows a forward which kept none.
const char* launch_norms(Problem problem, void* stream);

// Whether the backward needs term_end, along and terms on the current device.
bool backward_needs_terms(const Problem& problem);

// The latest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.
int driver_version();

}  // namespace cuda
}  // namespace salkernels
