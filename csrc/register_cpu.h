// What the registrations of the CPU operators share: from tensors to a problem, and how it is run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/plan.h"
#include "register.h"

namespace salkernels::host {

// Those of the instruction set that this process uses.
const Kernels& kernels();

DType dtype_of(const Tensor& x);
Maps maps_of(const Tensor& x, const Tensor* grad);
PairSet pairs_of(const Tensor& query, const std::optional<Tensor>& key,
                 const std::optional<Tensor>& list, const std::optional<Tensor>& valid);
Problem problem_of(const Tensor& query, const std::optional<Tensor>& valid, Sizes window,
                   double eps, DType dtype);

// Whether waking the threads would take longer than the work.
bool is_small(const Problem& problem);

// Whether gradients are too large for the caches.
bool beyond_caches(const Tensor& query, const std::optional<Tensor>& key);

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Runs one kernel over all its items, in parallel, with scratch memory once per thread: a unit
// needs megabytes, and an allocation of that size for each would go to the system and back.
template <class AProblem, class Item>
void run_all(const AProblem& problem, const std::vector<Item>& items,
             int64_t (*kernel)(const AProblem&, const Item*, char*), bool serial) {
  const int64_t count = int64_t(items.size());
  if (count == 0) return;
  const int64_t bytes = (kernel(problem, nullptr, nullptr) + 63) / 64 * 64;
  const auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char, Free> scratch(
        static_cast<char*>(std::aligned_alloc(64, size_t(bytes))));
    STD_TORCH_CHECK(scratch != nullptr, "out of memory: ", bytes, " bytes");
    for (int64_t i = begin; i < end; ++i) kernel(problem, &items[i], scratch.get());
  };
  if (serial) {
    run(0, count);
  } else {
    torch::stable::parallel_for(0, count, 1, run);
  }
}

}  // namespace salkernels::host
