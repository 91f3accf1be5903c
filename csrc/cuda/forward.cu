#include "forward.cuh"
#include "launch.cuh"

namespace salkernels {
namespace cuda {

const char* launch_forward(Problem problem, void* stream) {
  const Plan plan = plan_forward(problem, shared_limit());
  return run_plan(plan, problem, stream);
}

}  // namespace cuda
}  // namespace salkernels
