// The log-sum-exp over windows of negatives as torch sees it. As in register_cpu.cpp, the units of
// work depend on shapes and pairs alone.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cpu/lse.h"
#include "gradient_cpu.h"
#include "register_cpu.h"

namespace {

using salkernels::DType;
using salkernels::LseProblem;
using salkernels::Maps;
using salkernels::Sizes;
using salkernels::Tensor;
namespace host = salkernels::host;

LseProblem lse_problem_of(const Tensor& query, const std::optional<Tensor>& valid, Sizes window,
                          double temperature, double eps) {
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0, got ", temperature);
  LseProblem problem{};
  static_cast<salkernels::Problem&>(problem) =
      host::problem_of(query, valid, window, eps, host::dtype_of(query));
  problem.temperature = temperature;
  return problem;
}

void check_sums(const Tensor& query, const Tensor& sums) {
  const auto sizes = query.sizes(), of = sums.sizes();
  STD_TORCH_CHECK(sums.is_contiguous() && sums.dim() == 4 && of[0] == sizes[0] &&
                      of[1] == sizes[1] && of[2] == sizes[3] && of[3] == sizes[4],
                  "lse and grad_lse must be (G, N, H, W) and contiguous");
  STD_TORCH_CHECK(sums.device() == query.device(), "all tensors must be on one device");
  STD_TORCH_CHECK(sums.scalar_type() == salkernels::accumulate_type(query),
                  "lse and grad_lse must be float32, or float64 for float64 features");
}

Tensor window_lse(const Tensor& query, std::optional<Tensor> key, std::optional<Tensor> list,
                  std::optional<Tensor> valid, Sizes window, double temperature, double eps,
                  bool /*allow_tf32*/) {
  salkernels::check_arguments(query, key, list, valid, window);
  LseProblem problem = lse_problem_of(query, valid, window, temperature, eps);
  const auto sizes = query.sizes();
  Tensor lse = salkernels::empty(query, {sizes[0], sizes[1], sizes[3], sizes[4]},
                                 salkernels::accumulate_type(query));
  problem.lse = lse.mutable_data_ptr();
  // Queries without any pair are in no unit of work.
  if (problem.dtype == DType::f64) {
    std::fill_n(lse.mutable_data_ptr<double>(), lse.numel(),
                -std::numeric_limits<double>::infinity());
  } else {
    std::fill_n(lse.mutable_data_ptr<float>(), lse.numel(),
                -std::numeric_limits<float>::infinity());
  }
  const Maps queries = host::maps_of(query, nullptr);
  problem.plan =
      salkernels::make_plan(host::pairs_of(query, key, list, valid), queries,
                            key.has_value() ? host::maps_of(*key, nullptr) : queries, false);
  salkernels::make_lse_work(problem, host::kernels(), false);
  const bool serial = host::is_small(problem);
  host::run_all(problem, problem.work.tiles, host::kernels().lse_tile, serial);
  host::run_all(problem, problem.pieces, host::kernels().lse_piece, serial);
  return lse;
}

std::tuple<Tensor, std::optional<Tensor>> window_lse_backward(
    const Tensor& grad_lse, const Tensor& query, std::optional<Tensor> key,
    std::optional<Tensor> list, std::optional<Tensor> valid, const Tensor& lse, Sizes window,
    double temperature, double eps, bool /*allow_tf32*/) {
  salkernels::check_arguments(query, key, list, valid, window);
  check_sums(query, lse);
  check_sums(query, grad_lse);
  LseProblem problem = lse_problem_of(query, valid, window, temperature, eps);
  problem.write_around = host::beyond_caches(query, key);
  problem.lse = const_cast<void*>(lse.const_data_ptr());
  problem.grad_lse = grad_lse.const_data_ptr();
  const auto [grad_query, grad_key] = salkernels::empty_gradients(query, key);
  const Maps queries = host::maps_of(query, &grad_query);
  problem.plan =
      salkernels::make_plan(host::pairs_of(query, key, list, valid), queries,
                            key.has_value() ? host::maps_of(*key, &*grad_key) : queries, true);
  if (problem.plan.num_pairs == 0) {
    torch::stable::zero_(const_cast<Tensor&>(grad_query));
    if (grad_key.has_value()) torch::stable::zero_(const_cast<Tensor&>(*grad_key));
    return {grad_query, grad_key};
  }
  salkernels::make_lse_work(problem, host::kernels(), true);
  const bool serial = host::is_small(problem);
  host::run_all(problem, problem.work.tiles, host::kernels().lse_gradient_tile, serial);
  host::run_all(problem, problem.pieces, host::kernels().lse_gradient_piece, serial);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(salkernels, CPU, m) {
  m.impl("native_window_lse", TORCH_BOX(&window_lse));
  m.impl("native_window_lse_backward", TORCH_BOX(&window_lse_backward));
}
