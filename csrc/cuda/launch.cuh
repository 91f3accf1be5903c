// Launches a plan.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"
#include "plan.h"

namespace salkernels {
namespace cuda {

constexpr int kDevices = 64;  // whose limits are remembered

// Shared memory that a block may ask for on a device; asked once.
inline int64_t shared_limit_of(int device) {
  static std::atomic<int> known[kDevices];
  int bytes = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (bytes == 0) {
    bytes = 48 * 1024;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (device < kDevices) known[device].store(bytes, std::memory_order_relaxed);
  }
  return bytes;
}

inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : 0;
}

inline int64_t shared_limit() { return shared_limit_of(current_device()); }

// Lets a kernel ask for as much shared memory as there is on the current device, once for each of
// them. Always the limit of the device, never what one launch needs: threads that launch at the
// same time would take it from each other.
inline cudaError_t allow_shared_memory(const void* kernel) {
  constexpr int kKernels = 64;
  static std::atomic<const void*> allowed[kDevices][kKernels];
  const int device = current_device();
  auto* const of_device = device < kDevices ? allowed[device] : nullptr;
  for (int i = 0; of_device != nullptr && i < kKernels; ++i) {
    const void* known = of_device[i].load(std::memory_order_relaxed);
    if (known == kernel) return cudaSuccess;
    if (known == nullptr) break;
  }
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_limit_of(device)));
  for (int i = 0; status == cudaSuccess && of_device != nullptr && i < kKernels; ++i) {
    const void* none = nullptr;
    if (of_device[i].compare_exchange_strong(none, kernel) || none == kernel) break;
  }
  return status;
}

inline const char* run_plan(const Plan& plan, Problem& problem, void* stream) {
  if (plan.error != nullptr) return plan.error;
  for (int i = 0; i < plan.count; ++i) {
    const Launch& launch = plan.launches[i];
    const void* kernel = reinterpret_cast<const void*>(launch.kernel);
    cudaError_t status = cudaSuccess;
    // More than every device gives without being asked.
    if (launch.shared_bytes > 48 * 1024) status = allow_shared_memory(kernel);
    if (status == cudaSuccess) {
      void* arguments[] = {&problem};
      status = cudaLaunchKernel(kernel, dim3(unsigned(launch.blocks), unsigned(launch.rows)),
                                dim3(kThreads), arguments, size_t(launch.shared_bytes),
                                static_cast<cudaStream_t>(stream));
    }
    if (status != cudaSuccess) {
      cudaGetLastError();  // it is reported here, and not by whoever looks next
      return cudaGetErrorString(status);
    }
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace salkernels
