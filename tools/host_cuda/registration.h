// In place of what only a GPU has, for the host build of register_cuda.cpp: the same registration,
// as another library, for tensors of the CPU. There is one device, whose only stream is the caller.
#pragma once

#include "register.h"

#define SALKERNELS_LIBRARY salkernels_emulator
#define SALKERNELS_KEY CPU

namespace {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

void* current_stream(const salkernels::Tensor&) { return nullptr; }

}  // namespace
