// Launches a plan.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "plan.h"

namespace salkernels {
namespace cuda {

// Shared memory that a block may ask for on the current device.
inline int64_t shared_limit() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes;
}

inline const char* run_plan(const Plan& plan, Problem& problem, void* stream) {
  if (plan.error != nullptr) return plan.error;
  for (int i = 0; i < plan.count; ++i) {
    const Launch& launch = plan.launches[i];
    const void* kernel = reinterpret_cast<const void*>(launch.kernel);
    cudaError_t status = cudaSuccess;
    if (launch.shared_bytes > 48 * 1024) {  // more than every device gives without being asked
      // Always the limit of the device, never what this launch needs: threads that launch at the
      // same time would take it from each other.
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_limit()));
    }
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
