// The CUDA operators as torch sees them, through the stable ABI. A C++ compiler suffices for this
// file: kernels are behind cuda/launch.h. Nothing waits for the device, and memory is torch's, so
// that a CUDA graph can hold a call. The schemas stand in salkernels/backends/cuda.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
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

namespace {

using salkernels::accumulate_type;
using salkernels::element_size;
using salkernels::empty;
using salkernels::ScalarType;
using salkernels::Sizes;
using salkernels::Tensor;
using salkernels::cuda::Maps;
using salkernels::cuda::Problem;
using torch::stable::accelerator::DeviceGuard;

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

// Kernels count the pixels of a map, and pairs, in 32 bits.
void check_counts(const Tensor& query, const std::optional<Tensor>& key) {
  const auto sizes = query.sizes();
  STD_TORCH_CHECK(sizes[3] * sizes[4] <= INT_MAX, "a map must have fewer than 2^31 pixels");
  const int64_t keys = key.has_value() ? key->sizes()[1] : sizes[1];
  STD_TORCH_CHECK(sizes[0] * sizes[1] * keys < INT_MAX, "there must be fewer than 2^31 pairs");
}

// The tensors of a call that are nobody's but its own: torch's allocator frees them in the order
// of the stream.
struct Scratch {
  std::optional<Tensor> slots, norms[2], chosen_end, chosen_by;
};

Problem problem_of(const Tensor& query, const std::optional<Tensor>& key,
                   const std::optional<Tensor>& mask, Sizes window, double eps, int64_t capacity,
                   bool allow_tf32, Scratch& scratch) {
  Problem problem{};
  const auto sizes = query.sizes();
  problem.dtype = dtype_of(query);
  problem.grid = {sizes[3], sizes[4], window[0], window[1]};
  problem.groups = sizes[0];
  problem.channels = sizes[2];
  problem.capacity = capacity;
  problem.eps = eps;
  problem.allow_tf32 = allow_tf32;
  problem.set_form = !key.has_value();
  problem.wide_index = salkernels::wide_index(window);
  set_maps(problem.maps[0], query);
  set_maps(problem.maps[1], key.has_value() ? *key : query);
  if (mask.has_value()) {
    problem.mask = reinterpret_cast<const uint8_t*>(mask->const_data_ptr());
    std::copy_n(mask->strides().begin(), 3, problem.mask_strides);
    scratch.slots = empty(query, {problem.table() + 1}, ScalarType::Int);
    problem.slots = scratch.slots->mutable_data_ptr<int32_t>();
  } else {
    STD_TORCH_CHECK(problem.table() <= capacity, "there are ", problem.table(),
                    " pairs, but capacity is ", capacity);
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

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

std::tuple<Tensor, Tensor, Tensor> pair_losses(const Tensor& query, std::optional<Tensor> key,
                                               std::optional<Tensor> mask, Sizes window,
                                               double eps, int64_t capacity, bool allow_tf32) {
  salkernels::check_arguments(query, key, mask, window);
  check_counts(query, key);
  const DeviceGuard guard(query.get_device_index());
  Scratch scratch;
  Problem problem = problem_of(query, key, mask, window, eps, capacity, allow_tf32, scratch);
  const int64_t queries = problem.maps[0].samples, keys = problem.maps[1].samples;
  const ScalarType wide = accumulate_type(query);
  Tensor loss = empty(query, {problem.groups, queries, keys}, wide);
  Tensor argmax = empty(query, {capacity, problem.grid.height, problem.grid.width},
                        salkernels::index_type(window));
  Tensor max_sim = empty(query, {capacity, problem.grid.height, problem.grid.width}, wide);
  if (problem.table() == 0) {
    torch::stable::zero_(argmax);
    torch::stable::zero_(max_sim);
    return {loss, argmax, max_sim};
  }
  problem.loss = loss.mutable_data_ptr();
  problem.argmax = argmax.mutable_data_ptr();
  problem.max_sim = max_sim.mutable_data_ptr();
  if (wide == ScalarType::Double) add_norms(problem, query, scratch);
  const char* error = salkernels::cuda::launch_forward(problem, current_stream(query));
  STD_TORCH_CHECK(error == nullptr, "the forward could not be launched: ", error);
  return {loss, argmax, max_sim};
}

std::tuple<Tensor, std::optional<Tensor>> pair_losses_backward(
    const Tensor& grad_loss, const Tensor& query, std::optional<Tensor> key,
    std::optional<Tensor> mask, const Tensor& argmax, const Tensor& max_sim, Sizes window,
    double eps, bool allow_tf32) {
  salkernels::check_arguments(query, key, mask, window);
  check_counts(query, key);
  salkernels::check_saved(query, key, window, argmax, max_sim, grad_loss);
  const DeviceGuard guard(query.get_device_index());
  Scratch scratch;
  Problem problem = problem_of(query, key, mask, window, eps, argmax.sizes()[0], allow_tf32,
                               scratch);
  Tensor grad_query = torch::stable::empty_like(query);
  std::optional<Tensor> grad_key;
  if (key.has_value()) grad_key = torch::stable::empty_like(*key);
  if (problem.table() == 0) {
    torch::stable::zero_(grad_query);
    if (grad_key.has_value()) torch::stable::zero_(*grad_key);
    return {grad_query, grad_key};
  }
  set_grad(problem.maps[0], grad_query);
  set_grad(problem.maps[1], grad_key.has_value() ? *grad_key : grad_query);
  problem.grad_loss = grad_loss.const_data_ptr();
  std::copy_n(grad_loss.strides().begin(), 3, problem.grad_loss_strides);
  problem.argmax = const_cast<void*>(argmax.const_data_ptr());
  problem.max_sim = const_cast<void*>(max_sim.const_data_ptr());
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

// The latest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.
int64_t driver_version() { return salkernels::cuda::driver_version(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(salkernels_cuda, CUDA, m) {
  m.impl("pair_losses", TORCH_BOX(&pair_losses));
  m.impl("pair_losses_backward", TORCH_BOX(&pair_losses_backward));
}

STABLE_TORCH_LIBRARY_IMPL(salkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("driver_version", TORCH_BOX(&driver_version));
}
