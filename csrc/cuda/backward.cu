#include "backward.cuh"
#include "launch.cuh"

namespace salkernels {
namespace cuda {

const char* launch_backward(Problem problem, void* stream) {
  const Plan plan = plan_backward(problem, shared_limit());
  return run_plan(plan, problem, stream);
}

bool backward_needs_terms(const Problem& problem) {
  return backward_lists(problem, shared_limit());
}

}  // namespace cuda
}  // namespace salkernels
