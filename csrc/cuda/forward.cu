#include "forward.cuh"
#include "launch.cuh"

namespace salkernels {
namespace cuda {

const char* launch_forward(Problem problem, void* stream) {
  const Plan plan = plan_forward(problem, shared_limit());
  return run_plan(plan, problem, stream);
}

const char* launch_norms(Problem problem, void* stream) {
  const Plan plan = plan_norms(problem);
  return run_plan(plan, problem, stream);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace cuda
}  // namespace salkernels
