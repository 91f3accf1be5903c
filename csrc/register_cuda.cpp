// The CUDA operators as torch sees them, through the stable ABI. A C++ compiler suffices for this
// file: kernels are behind cuda/launch.h. Nothing waits for the device, and memory is torch's, so
// that a CUDA graph can hold a call. The schemas stand in salkernels/schema.py.
//
// The tests build it a second time, with the kernels as host code: see tools/host_cuda/registration.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <climits>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "register.h"

#ifdef SALKERNELS_EMULATOR
#include "registration.h"  // tools/host_cuda
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define SALKERNELS_LIBRARY salkernels
#define SALKERNELS_KEY CUDA

namespace {

using torch::stable::accelerator::DeviceGuard;

void* current_stream(const salkernels::Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

}  // namespace
#endif

namespace {

using salkernels::accumulate_type;
using salkernels::element_size;
using salkernels::empty;
using salkernels::ScalarType;
using salkernels::Sizes;
using salkernels::Tensor;
using salkernels::cuda::Maps;
using salkernels::cuda::Problem;

salkernels::cuda::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return salkernels::cuda::kFloat32;
    case ScalarType::Double: return salkernels::cuda::kFloat64;
    case ScalarType::BFloat16: return salkernels::cuda::kBFloat16;
    case ScalarType::Half: return salkernels::cuda::kFloat16;
    default: STD_TORCH_CHECK(false, "features must be float32, float64, bfloat16 or float16");
  }
}

// Whether the channels of a pixel are contiguous, and start at addresses that are multiples of 16
// bytes and end there.
bool is_vector(const Tensor& x) {
  const int64_t element = element_size(x);
  const auto sizes = x.sizes(), strides = x.strides();
  bool aligned = strides[2] == 1 && sizes[2] * element % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int i : {0, 1, 3, 4}) aligned &= sizes[i] <= 1 || strides[i] * element % 16 == 0;
  return aligned;
}

void set_maps(Maps& maps, const Tensor& x) {
  maps.data = x.const_data_ptr();
  maps.samples = x.sizes()[1];
  maps.vector = is_vector(x);
  std::copy_n(x.strides().begin(), 5, maps.strides);
}

void set_grad(Maps& maps, const Tensor& grad) {
  maps.grad = grad.mutable_data_ptr();
  maps.grad_vector = is_vector(grad);
  std::copy_n(grad.strides().begin(), 5, maps.grad_strides);
}

// Queries, then keys that are not the queries.
void set_valid(Problem& problem, const Tensor& valid) {
  const auto* bytes = static_cast<const uint8_t*>(valid.const_data_ptr());
  for (Maps& maps : problem.maps) {
    maps.valid = bytes;
    maps.valid_stride = valid.sizes()[1] * problem.grid.pixels();
    if (!problem.set_form) bytes += maps.samples * problem.grid.pixels();
  }
}

// Kernels count the pixels of a map, and pairs, in 32 bits.
void check_counts(const Problem& problem) {
  STD_TORCH_CHECK(problem.grid.pixels() <= INT_MAX, "a map must have fewer than 2^31 pixels");
  STD_TORCH_CHECK(problem.table() < INT_MAX && problem.num_pairs < INT_MAX,
                  "there must be fewer than 2^31 pairs");
}

// The tensors of a call that are nobody's but its own: torch's allocator frees them in the order
// of the stream.
struct Scratch {
  std::optional<Tensor> slots, norms[2], chosen_end, chosen_by;
};

Problem problem_of(const Tensor& query, const std::optional<Tensor>& key,
                   const std::optional<Tensor>& pairs, const std::optional<Tensor>& valid,
                   Sizes window, double eps, bool allow_tf32, Scratch& scratch) {
  Problem problem{};
  const auto sizes = query.sizes();
  problem.dtype = dtype_of(query);
  problem.grid = {sizes[3], sizes[4], window[0], window[1]};
  problem.groups = sizes[0];
  problem.channels = sizes[2];
  problem.num_pairs = salkernels::count_pairs(query, key, pairs);
  problem.eps = eps;
  problem.allow_tf32 = allow_tf32;
  problem.set_form = !key.has_value();
  problem.wide_index = salkernels::wide_index(window);
  set_maps(problem.maps[0], query);
  set_maps(problem.maps[1], key.has_value() ? *key : query);
  check_counts(problem);
  if (valid.has_value()) set_valid(problem, *valid);
  if (pairs.has_value()) {
    problem.pairs = pairs->const_data_ptr<int64_t>();
    scratch.slots = empty(query, {problem.table()}, ScalarType::Int);
    problem.slots = scratch.slots->mutable_data_ptr<int32_t>();
  }
  return problem;
}

void add_norms(Problem& problem, const Tensor& query, Scratch& scratch) {
  for (int side = 0; side < 2; ++side) {
    Maps& maps = problem.maps[side];
    if (side == 1 && problem.set_form) {
      maps.norms = problem.maps[0].norms;
      return;
    }
    scratch.norms[side] = empty(query, {problem.groups * maps.samples * problem.grid.pixels()},
                                accumulate_type(query));
    maps.norms = scratch.norms[side]->mutable_data_ptr();
  }
}

// (loss, max_sim, argmax, norm)
std::tuple<Tensor, Tensor, Tensor, Tensor> match(const Tensor& query, std::optional<Tensor> key,
                                                 std::optional<Tensor> pairs,
                                                 std::optional<Tensor> valid, Sizes window,
                                                 double eps, bool allow_tf32) {
  salkernels::check_arguments(query, key, pairs, valid, window);
  const DeviceGuard guard(query.get_device_index());
  Scratch scratch;
  Problem problem = problem_of(query, key, pairs, valid, window, eps, allow_tf32, scratch);
  const int64_t count = problem.num_pairs;
  const int64_t height = problem.grid.height, width = problem.grid.width;
  const ScalarType wide = accumulate_type(query);
  Tensor loss = empty(query, {count}, wide);
  Tensor max_sim = empty(query, {count, height, width}, wide);
  Tensor argmax = empty(query, {count, height, width}, salkernels::index_type(window));
  Tensor norm = empty(query, {0}, wide);
  if (count == 0) return {loss, max_sim, argmax, norm};
  problem.loss = loss.mutable_data_ptr();
  problem.max_sim = max_sim.mutable_data_ptr();
  problem.argmax = argmax.mutable_data_ptr();
  if (wide == ScalarType::Double) add_norms(problem, query, scratch);
  const char* error = salkernels::cuda::launch_forward(problem, current_stream(query));
  STD_TORCH_CHECK(error == nullptr, "the forward could not be launched: ", error);
  return {loss, max_sim, argmax, norm};
}

std::tuple<Tensor, std::optional<Tensor>> match_backward(
    const Tensor& grad_sim, const Tensor& query, std::optional<Tensor> key,
    std::optional<Tensor> pairs, std::optional<Tensor> valid, const Tensor& max_sim,
    const Tensor& argmax, const Tensor& /*norm*/, Sizes window, double eps, bool allow_tf32) {
  salkernels::check_arguments(query, key, pairs, valid, window);
  salkernels::check_saved(query, key, pairs, window, max_sim, argmax, grad_sim);
  const DeviceGuard guard(query.get_device_index());
  Scratch scratch;
  Problem problem = problem_of(query, key, pairs, valid, window, eps, allow_tf32, scratch);
  Tensor grad_query = torch::stable::empty_like(query);
  std::optional<Tensor> grad_key;
  if (key.has_value()) grad_key = torch::stable::empty_like(*key);
  if (problem.table() == 0 || problem.num_pairs == 0) {
    torch::stable::zero_(grad_query);
    if (grad_key.has_value()) torch::stable::zero_(*grad_key);
    return {grad_query, grad_key};
  }
  set_grad(problem.maps[0], grad_query);
  set_grad(problem.maps[1], grad_key.has_value() ? *grad_key : grad_query);
  problem.grad_sim = grad_sim.const_data_ptr();
  problem.max_sim = const_cast<void*>(max_sim.const_data_ptr());
  problem.argmax = const_cast<void*>(argmax.const_data_ptr());
  if (salkernels::cuda::backward_needs_lists(problem)) {
    add_norms(problem, query, scratch);
    scratch.chosen_end = empty(query, {argmax.numel()}, ScalarType::Int);
    scratch.chosen_by = empty(query, {argmax.numel()}, ScalarType::Int);
    problem.chosen_end = scratch.chosen_end->mutable_data_ptr<int32_t>();
    problem.chosen_by = scratch.chosen_by->mutable_data_ptr<int32_t>();
  }
  const char* error = salkernels::cuda::launch_backward(problem, current_stream(query));
  STD_TORCH_CHECK(error == nullptr, "the backward could not be launched: ", error);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SALKERNELS_LIBRARY, SALKERNELS_KEY, m) {
  m.impl("native_match", TORCH_BOX(&match));
  m.impl("native_match_backward", TORCH_BOX(&match_backward));
}

// The latest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.
extern "C" __attribute__((visibility("default"))) int salkernels_driver_version() {
  return salkernels::cuda::driver_version();
}
