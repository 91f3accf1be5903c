// The CUDA operators as torch sees them, through the stable ABI. A C++ compiler suffices for this
// file: kernels are behind cuda/launch.h. Nothing waits for the device, and memory is torch's, so
// that a CUDA graph can hold a call. The schemas stand in salkernels/schema.py.
//
// The tests build it a second time, with the kernels as host code: see
// tools/host_cuda/registration.h.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "register.h"

#ifdef SALKERNELS_EMULATOR
#include "registration.h"  // tools/host_cuda
#else
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

// (H, W, count) in memory, seen as (count, H, W): pixel by pixel with what it belongs to innermost,
// as the Triton backend lays out its outputs. Uninitialised.
Tensor planes(const Tensor& like, int64_t count, ScalarType dtype) {
  const auto sizes = like.sizes();
  const int64_t shape[3] = {count, sizes[3], sizes[4]};
  const int64_t strides[3] = {1, sizes[4] * count, count};
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  const auto status = aoti_torch_empty_strided(
      3, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device, like.get_device_index(), &result);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "out of memory: no room for a result of ",
                  double(count) * double(sizes[3]) * double(sizes[4]),
                  " elements beside the features");
  return Tensor(result);
}

// The same numbers as `planes` has them: gradients come in any layout and dtype, what was saved in
// that of another backend, or of a hook.
Tensor as_planes(const Tensor& x, const Tensor& like, ScalarType dtype) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t wanted[3] = {1, sizes[2] * sizes[0], sizes[0]};
  bool same = x.scalar_type() == dtype;
  for (int i = 0; i < 3; ++i) same &= sizes[i] <= 1 || strides[i] == wanted[i];
  if (same) return x;
  Tensor result = planes(like, sizes[0], dtype);
  torch::stable::copy_(result, x);
  return result;
}

void check_planes(const Tensor& x, const Tensor& query, int64_t count, const char* what) {
  const auto sizes = query.sizes();
  STD_TORCH_CHECK(x.dim() == 3 && x.sizes()[0] == count && x.sizes()[1] == sizes[3] &&
                      x.sizes()[2] == sizes[4],
                  what, ", here (", count, ", ", sizes[3], ", ", sizes[4], "), got ", x.dim(),
                  " axes, the first of extent ", x.dim() > 0 ? x.sizes()[0] : 0);
  STD_TORCH_CHECK(x.device() == query.device(), "all tensors must be on one device");
}

// What the forward kept; a norm without elements is none.
void check_kept(const Problem& problem, const Tensor& query, Sizes window, const Tensor& max_sim,
                const Tensor& argmax, const Tensor& norm) {
  for (const Tensor* x : {&max_sim, &argmax}) {
    check_planes(*x, query, problem.num_pairs, "max_sim and argmax must be (pairs, H, W)");
  }
  if (norm.numel() > 0) {
    check_planes(norm, query, problem.nodes(), "norm must be empty or (samples, H, W)");
  }
  STD_TORCH_CHECK(argmax.scalar_type() == salkernels::index_type(window),
                  "argmax must be uint8 for windows of at most 255 pixels, else int32");
  STD_TORCH_CHECK(max_sim.scalar_type() == accumulate_type(query),
                  "max_sim must be float32, or float64 for float64 features");
}

Problem problem_of(const Tensor& query, const std::optional<Tensor>& key,
                   const std::optional<Tensor>& pairs, const std::optional<Tensor>& valid,
                   Sizes window, double eps, bool allow_tf32) {
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
  if (pairs.has_value()) problem.pairs = pairs->const_data_ptr<int64_t>();
  return problem;
}

struct Found {
  Tensor loss, max_sim, argmax, norm;
};

// Launches the forward of what has been checked; `mean` is null where nobody asks for it.
Found run_match(Problem& problem, const Tensor& query, Sizes window, Tensor* mean) {
  const int64_t count = problem.num_pairs;
  const ScalarType wide = accumulate_type(query);
  Found found{empty(query, {count}, wide), planes(query, count, wide),
              planes(query, count, salkernels::index_type(window)),
              planes(query, problem.nodes(), wide)};
  if (count == 0 || problem.table() == 0) torch::stable::fill_(found.norm, INFINITY);
  if (count == 0) return found;
  problem.loss = found.loss.mutable_data_ptr();
  problem.max_sim = found.max_sim.mutable_data_ptr();
  problem.argmax = found.argmax.mutable_data_ptr();
  problem.norm = found.norm.mutable_data_ptr();
  if (mean != nullptr) problem.mean = mean->mutable_data_ptr();
  const char* error = salkernels::cuda::launch_forward(problem, current_stream(query));
  STD_TORCH_CHECK(error == nullptr, "the forward could not be launched: ", error);
  return found;
}

// (loss, max_sim, argmax, norm)
std::tuple<Tensor, Tensor, Tensor, Tensor> match(const Tensor& query, std::optional<Tensor> key,
                                                 std::optional<Tensor> pairs,
                                                 std::optional<Tensor> valid, Sizes window,
                                                 double eps, bool allow_tf32) {
  salkernels::check_arguments(query, key, pairs, valid, window);
  const DeviceGuard guard(query.get_device_index());
  Problem problem = problem_of(query, key, pairs, valid, window, eps, allow_tf32);
  const Found found = run_match(problem, query, window, nullptr);
  return {found.loss, found.max_sim, found.argmax, found.norm};
}

// Maps (S, C, H, W) as (G, S / G, C, H, W): a view, which costs less here than in Python.
Tensor grouped(const Tensor& maps, int64_t groups) {
  STD_TORCH_CHECK(maps.dim() == 4, "maps must be (S, C, H, W), got ", maps.dim(), " axes");
  const auto sizes = maps.sizes(), strides = maps.strides();
  STD_TORCH_CHECK(groups >= 1 && sizes[0] % groups == 0, "groups must divide the samples: ",
                  sizes[0], " in ", groups);
  const int64_t samples = sizes[0] / groups;
  const int64_t shape[5] = {groups, samples, sizes[1], sizes[2], sizes[3]};
  const int64_t steps[5] = {samples * strides[0], strides[0], strides[1], strides[2], strides[3]};
  AtenTensorHandle result = nullptr;
  // The offset is added to that of the maps in their storage.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(maps.get(), 5, shape, steps, 0, &result));
  return Tensor(result);
}

std::optional<Tensor> grouped(const std::optional<Tensor>& maps, int64_t groups) {
  if (!maps.has_value()) return std::nullopt;
  return grouped(*maps, groups);
}

// The mean of the losses of one pair and more, and what its backward needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> mean_match(const Tensor& x, std::optional<Tensor> y,
                                                      std::optional<Tensor> pairs, int64_t groups,
                                                      Sizes window, double eps, bool allow_tf32) {
  const Tensor query = grouped(x, groups);
  const std::optional<Tensor> key = grouped(y, groups);
  salkernels::check_arguments(query, key, pairs, std::nullopt, window);
  const DeviceGuard guard(query.get_device_index());
  Problem problem = problem_of(query, key, pairs, std::nullopt, window, eps, allow_tf32);
  STD_TORCH_CHECK(problem.num_pairs > 0, "there is no pair, and so no mean");
  Tensor mean = empty(query, {}, accumulate_type(query));
  const Found found = run_match(problem, query, window, &mean);
  return {mean, found.max_sim, found.argmax, found.norm};
}

// Memory of a backward that is nobody's but its own, in one piece: torch's allocator frees it in
// the order of the stream, and one call takes less time than eight.
class Scratch {
 public:
  template <class T>
  void add(T*& field, int64_t bytes) {
    wanted_[count_++] = {reinterpret_cast<void**>(&field), bytes_};
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  Tensor allocate(const Tensor& like) {
    Tensor memory = empty(like, {bytes_}, ScalarType::Byte);
    auto* const begin = static_cast<char*>(memory.mutable_data_ptr());
    for (int i = 0; i < count_; ++i) *wanted_[i].field = begin + wanted_[i].offset;
    return memory;
  }

 private:
  static constexpr int64_t kAlignment = 256;
  struct Wanted {
    void** field;
    int64_t offset;
  } wanted_[8];
  int count_ = 0;
  int64_t bytes_ = 0;
};

Tensor add_scratch(Problem& problem, const Tensor& query) {
  const int64_t wide = problem.dtype == salkernels::cuda::kFloat64 ? 8 : 4;
  const int64_t rows = problem.nodes() * problem.grid.pixels();
  Scratch scratch;
  scratch.add(problem.query_begin, 4 * (problem.groups * problem.maps[0].samples + 1));
  scratch.add(problem.key_begin, 4 * (problem.groups * problem.maps[1].samples + 1));
  scratch.add(problem.by_key, 4 * problem.num_pairs);
  scratch.add(problem.by_key_query, 4 * problem.num_pairs);
  if (salkernels::cuda::backward_needs_terms(problem)) {
    scratch.add(problem.term_end, 4 * rows);
    scratch.add(problem.along, wide * rows);
    // Two for each pair and pixel: of a row number and a weight, which come to twice a weight.
    scratch.add(problem.terms, 2 * problem.num_pairs * problem.grid.pixels() * 2 * wide);
  }
  return scratch.allocate(query);
}

// Launches the backward, whose upstream gradient the problem has, into grad_query and grad_key.
void run_backward(Problem& problem, const Tensor& query, Tensor& grad_query,
                  std::optional<Tensor>& grad_key, const Tensor& max_sim, const Tensor& argmax,
                  const Tensor& norm) {
  if (problem.table() == 0 || problem.num_pairs == 0) {
    torch::stable::zero_(grad_query);
    if (grad_key.has_value()) torch::stable::zero_(*grad_key);
    return;
  }
  set_grad(problem.maps[0], grad_query);
  set_grad(problem.maps[1], grad_key.has_value() ? *grad_key : grad_query);
  const ScalarType wide = accumulate_type(query);
  const Tensor maxima = as_planes(max_sim, query, wide);
  const Tensor places = as_planes(argmax, query, argmax.scalar_type());
  const bool kept = norm.numel() > 0;
  Tensor norms = kept ? as_planes(norm, query, wide) : planes(query, problem.nodes(), wide);
  problem.max_sim = const_cast<void*>(maxima.const_data_ptr());
  problem.argmax = const_cast<void*>(places.const_data_ptr());
  problem.norm = const_cast<void*>(norms.const_data_ptr());
  const Tensor scratch = add_scratch(problem, query);
  void* const stream = current_stream(query);
  const char* error = kept ? nullptr : salkernels::cuda::launch_norms(problem, stream);
  if (error == nullptr) error = salkernels::cuda::launch_backward(problem, stream);
  STD_TORCH_CHECK(error == nullptr, "the backward could not be launched: ", error);
}

std::tuple<Tensor, std::optional<Tensor>> match_backward(
    const Tensor& grad_sim, const Tensor& query, std::optional<Tensor> key,
    std::optional<Tensor> pairs, std::optional<Tensor> valid, const Tensor& max_sim,
    const Tensor& argmax, const Tensor& norm, Sizes window, double eps, bool allow_tf32) {
  salkernels::check_arguments(query, key, pairs, valid, window);
  const DeviceGuard guard(query.get_device_index());
  Problem problem = problem_of(query, key, pairs, valid, window, eps, allow_tf32);
  check_kept(problem, query, window, max_sim, argmax, norm);
  check_planes(grad_sim, query, problem.num_pairs, "grad_sim must be (pairs, H, W)");
  Tensor grad_query = torch::stable::empty_like(query);
  std::optional<Tensor> grad_key;
  if (key.has_value()) grad_key = torch::stable::empty_like(*key);
  Tensor gradient = grad_sim;
  if (problem.num_pairs > 0) gradient = as_planes(grad_sim, query, accumulate_type(query));
  problem.grad_sim = gradient.const_data_ptr();
  run_backward(problem, query, grad_query, grad_key, max_sim, argmax, norm);
  return {grad_query, grad_key};
}

// From the gradient of the mean, a scalar: no pass over the maxima comes before the kernels.
std::tuple<Tensor, std::optional<Tensor>> mean_match_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> y, std::optional<Tensor> pairs,
    int64_t groups, const Tensor& max_sim, const Tensor& argmax, const Tensor& norm, Sizes window,
    double eps, bool allow_tf32) {
  const Tensor query = grouped(x, groups);
  const std::optional<Tensor> key = grouped(y, groups);
  salkernels::check_arguments(query, key, pairs, std::nullopt, window);
  const DeviceGuard guard(query.get_device_index());
  Problem problem = problem_of(query, key, pairs, std::nullopt, window, eps, allow_tf32);
  check_kept(problem, query, window, max_sim, argmax, norm);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == accumulate_type(query) &&
                      grad.device() == query.device(),
                  "grad must be one number of the dtype of the loss, on the device of the maps");
  Tensor grad_x = torch::stable::empty_like(x);
  std::optional<Tensor> grad_y, key_gradient;
  if (y.has_value()) grad_y = torch::stable::empty_like(*y);
  Tensor query_gradient = grouped(grad_x, groups);
  key_gradient = grouped(grad_y, groups);
  problem.grad_mean = grad.const_data_ptr();
  problem.mean_share = 1 / (double(problem.num_pairs) * double(problem.grid.pixels()));
  run_backward(problem, query, query_gradient, key_gradient, max_sim, argmax, norm);
  return {grad_x, grad_y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SALKERNELS_LIBRARY, SALKERNELS_KEY, m) {
  m.impl("native_match", TORCH_BOX(&match));
  m.impl("native_match_backward", TORCH_BOX(&match_backward));
  m.impl("native_mean_match", TORCH_BOX(&mean_match));
  m.impl("native_mean_match_backward", TORCH_BOX(&mean_match_backward));
}

// The latest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.
extern "C" __attribute__((visibility("default"))) int salkernels_driver_version() {
  return salkernels::cuda::driver_version();
}
