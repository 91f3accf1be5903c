// The CPU operators as torch sees them, through the stable ABI: one binary serves torch 2.10 and
// later, and every Python. The schemas stand in salkernels/schema.py.
//
//      match:           tensors -> Problem -> plan, work -> tiles, streamed pieces -> losses
//      match_backward:  tensors -> Problem -> plan, work -> tiles, or norms and then gradients
//
// The units of work depend on shapes and pairs alone, and no two of them write the same element:
// any number of threads gives the same bits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kept_memory.h"
#include "gradient_cpu.h"
#include "register_cpu.h"

namespace salkernels::host {

// The best instruction set of this machine, or a lower one that SALKERNELS_CPU_ISA names, which the
// tests do. v3 and v4 are the levels of the x86-64 ABI that the files are compiled for.
static const Kernels& choose_kernels() {
#ifdef SALKERNELS_X86_LEVELS
  const char* name = std::getenv("SALKERNELS_CPU_ISA");
  const std::string limit = name == nullptr ? "" : name;
  __builtin_cpu_init();
  if (limit != "baseline") {
    if (limit != "avx2" && __builtin_cpu_supports("x86-64-v4")) return salkernels::kernels_avx512;
    if (__builtin_cpu_supports("x86-64-v3")) return salkernels::kernels_avx2;
  }
#endif
  return salkernels::kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "features must be float32, float64, bfloat16 or float16");
  }
}

salkernels::Maps maps_of(const Tensor& x, const Tensor* grad) {
  salkernels::Maps maps{};
  maps.data = x.const_data_ptr();
  maps.element_size = element_size(x);
  for (int i = 0; i < 5; ++i) maps.strides[i] = x.strides()[i];
  if (grad != nullptr) {
    maps.grad = grad->mutable_data_ptr();
    for (int i = 0; i < 5; ++i) maps.grad_strides[i] = grad->strides()[i];
  }
  return maps;
}

salkernels::PairSet pairs_of(const Tensor& query, const std::optional<Tensor>& key,
                             const std::optional<Tensor>& list,
                             const std::optional<Tensor>& valid) {
  salkernels::PairSet pairs{};
  pairs.groups = query.sizes()[0];
  pairs.queries = query.sizes()[1];
  pairs.keys = key.has_value() ? key->sizes()[1] : pairs.queries;
  pairs.set_form = !key.has_value();
  pairs.plane = query.sizes()[3] * query.sizes()[4];
  pairs.every = !list.has_value();
  if (list.has_value()) {
    pairs.list = list->const_data_ptr<int64_t>();
    pairs.length = list->numel();
    const char* fault = pairs.fault();
    STD_TORCH_CHECK(fault == nullptr, fault);
  }
  // Bytes, not bool: one that is neither 0 nor 1 would be no bool to the compiler.
  if (valid.has_value()) pairs.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
  return pairs;
}

Problem problem_of(const Tensor& query, const std::optional<Tensor>& valid, Sizes window,
                   double eps, DType dtype) {
  Problem problem{};
  const auto sizes = query.sizes();
  problem.grid = {sizes[3], sizes[4], window[0], window[1]};
  problem.channels = sizes[2];
  problem.eps = eps;
  problem.dtype = dtype;
  problem.wide_index = salkernels::wide_index(window);
  problem.has_valid = valid.has_value();
  return problem;
}

// Work below which waking the threads takes longer than doing it: about 10 us.
constexpr int64_t kSerialProducts = 400'000;

bool is_small(const Problem& problem) {
  const int64_t window = problem.grid.window_rows * problem.grid.window_columns;
  const int64_t per_pixel = int64_t(problem.plan.edges.size()) * window +
                            4 * int64_t(problem.plan.nodes.size());
  return double(per_pixel) * problem.channels * problem.grid.pixels() < kSerialProducts;
}

// A pass of its own, since the windows of a pair belong to different tiles: each sum has its order
// whatever thread computed a tile. The maxima were just written, and are small beside the features.
void reduce_losses(Problem& problem, bool serial) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) kernels().pair_loss(problem, pair);
  };
  if (serial) {
    run(0, problem.plan.num_pairs);
  } else {
    torch::stable::parallel_for(0, problem.plan.num_pairs, 1 + 16384 / problem.grid.pixels(), run);
  }
}

// Rows of the outputs that belong to no pair: no loss, and matches that take no part.
template <class T>
void clear_rows(const Problem& problem, int64_t count) {
  const int64_t first = problem.plan.num_pairs, rows = count - first;
  if (rows == 0) return;  // an empty output has no address
  const int64_t plane = problem.grid.pixels(), index_size = problem.wide_index ? 4 : 1;
  std::fill_n(static_cast<T*>(problem.loss) + first, rows, T(0));
  std::fill_n(static_cast<T*>(problem.max_sim) + first * plane, rows * plane, T(1));
  std::memset(static_cast<char*>(problem.argmax) + first * plane * index_size, 0xff,
              size_t(rows * plane * index_size));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> match(const Tensor& query, std::optional<Tensor> key,
                                                 std::optional<Tensor> list,
                                                 std::optional<Tensor> valid, Sizes window,
                                                 double eps, bool /*allow_tf32*/) {
  salkernels::check_arguments(query, key, list, valid, window);
  const DType dtype = dtype_of(query);
  const ScalarType wide = accumulate_type(query);
  Problem problem = problem_of(query, valid, window, eps, dtype);
  const salkernels::PairSet pairs = pairs_of(query, key, list, valid);
  const salkernels::Maps queries = maps_of(query, nullptr);
  const int64_t count = salkernels::count_pairs(query, key, list);
  const int64_t height = problem.grid.height, width = problem.grid.width;
  Tensor loss = empty(query, {count}, wide);
  Tensor max_sim = empty(query, {count, height, width}, wide);
  Tensor argmax = empty(query, {count, height, width}, salkernels::index_type(window));
  problem.loss = loss.mutable_data_ptr();
  problem.max_sim = max_sim.mutable_data_ptr();
  problem.argmax = argmax.mutable_data_ptr();

  // After the outputs: where those do not fit the memory, a plan of all pairs need not be made.
  problem.plan = salkernels::make_plan(
      pairs, queries, key.has_value() ? maps_of(*key, nullptr) : queries, false);
  problem.work = salkernels::make_work(problem, kernels(), false);
  const bool serial = is_small(problem);
  run_all(problem, problem.work.tiles, kernels().match_tile, serial);
  run_all(problem, problem.work.matches, kernels().match_streamed, serial);
  reduce_losses(problem, serial);
  dtype == DType::f64 ? clear_rows<double>(problem, count) : clear_rows<float>(problem, count);
  return {loss, max_sim, argmax, empty(query, {0}, wide)};
}

// A gradient larger than the last-level caches of most machines is in none of them when somebody
// reads it, so writing it through them would only fetch each line first: a third of the traffic.
constexpr int64_t kCachedBytes = 32 << 20;

bool beyond_caches(const Tensor& query, const std::optional<Tensor>& key) {
  const int64_t elements = query.numel() + (key.has_value() ? key->numel() : 0);
  return elements * element_size(query) >= kCachedBytes;
}

std::tuple<Tensor, std::optional<Tensor>> match_backward(
    const Tensor& grad_sim, const Tensor& query, std::optional<Tensor> key,
    std::optional<Tensor> list, std::optional<Tensor> valid, const Tensor& max_sim,
    const Tensor& argmax, const Tensor& /*norm*/, Sizes window, double eps, bool /*allow_tf32*/) {
  salkernels::check_arguments(query, key, list, valid, window);
  salkernels::check_saved(query, key, list, window, max_sim, argmax, grad_sim);
  const DType dtype = dtype_of(query);
  Problem problem = problem_of(query, valid, window, eps, dtype);
  const salkernels::PairSet pairs = pairs_of(query, key, list, valid);
  problem.write_around = beyond_caches(query, key);
  auto [grad_query, grad_key] = salkernels::empty_gradients(query, key);
  const salkernels::Maps queries = maps_of(query, &grad_query);
  problem.plan = salkernels::make_plan(
      pairs, queries, key.has_value() ? maps_of(*key, &*grad_key) : queries, true);
  if (problem.plan.num_pairs == 0) {
    torch::stable::zero_(grad_query);
    if (grad_key.has_value()) torch::stable::zero_(*grad_key);
    return {grad_query, grad_key};
  }
  problem.argmax = const_cast<void*>(argmax.const_data_ptr());
  problem.max_sim = const_cast<void*>(max_sim.const_data_ptr());
  problem.grad_sim = grad_sim.const_data_ptr();

  problem.work = salkernels::make_work(problem, kernels(), true);
  const bool serial = is_small(problem);
  std::vector<double> norms, poison;
  if (!problem.work.norms.empty()) {
    // Doubles hold either dtype; one table for all samples is small beside the maps.
    const size_t bytes = problem.plan.nodes.size() * size_t(problem.grid.pixels()) *
                         (dtype == DType::f64 ? 8 : 4);
    norms.resize((bytes + 7) / 8);
    poison.resize((bytes + 7) / 8);
    problem.norms = norms.data();
    problem.poison = poison.data();
  }
  run_all(problem, problem.work.tiles, kernels().gradient_tile, serial);
  run_all(problem, problem.work.norms, kernels().norms_streamed, serial);
  run_all(problem, problem.work.gradients, kernels().gradient_streamed, serial);
  return {grad_query, grad_key};
}

}  // namespace salkernels::host

// 0 baseline, 1 AVX2, 2 AVX-512: for reports and tests.
extern "C" __attribute__((visibility("default"))) int salkernels_instruction_set() {
#ifdef SALKERNELS_X86_LEVELS
  if (&salkernels::host::kernels() == &salkernels::kernels_avx512) return 2;
  if (&salkernels::host::kernels() == &salkernels::kernels_avx2) return 1;
#endif
  return 0;
}

// Bytes, which may not fit an int.
extern "C" __attribute__((visibility("default"))) int64_t salkernels_kept_bytes() {
  return salkernels::kept_bytes();
}

extern "C" __attribute__((visibility("default"))) int64_t salkernels_release_memory() {
  return salkernels::release_blocks();
}

STABLE_TORCH_LIBRARY_IMPL(salkernels, CPU, m) {
  m.impl("native_match", TORCH_BOX(&salkernels::host::match));
  m.impl("native_match_backward", TORCH_BOX(&salkernels::host::match_backward));
}
