// From tensors' shapes and a mask to nodes, edges, components and units of work.
#pragma once

#include <cstdint>

#include "problem.h"

namespace salkernels {

// A (G, S, C, H, W) tensor.
struct Maps {
  const void* data;
  void* grad;
  int64_t element_size;
  int64_t strides[5], grad_strides[5];
};

// A (G, N, M) tensor of anything, by strides in elements; null data: see the user.
template <class T>
struct PairTable {
  const T* data;
  int64_t strides[3];

  const T& at(int64_t g, int64_t q, int64_t k) const {
    return data[g * strides[0] + q * strides[1] + k * strides[2]];
  }
};

struct PairSet {
  int64_t groups, queries, keys;
  bool set_form;         // the keys are the queries
  PairTable<bool> mask;  // null: every pair
};

// Samples without any pair have no work in forward, but a gradient to be written in backward.
Plan make_plan(const PairSet& pairs, const Maps& query, const Maps& key, bool keep_isolated);

// Cuts the work into pieces that do not depend on the number of threads.
Work make_work(const Problem& problem, const Kernels& kernels, bool backward);

// The gradient of each pair's loss, over H·W, into the edges. T is the accumulation dtype.
template <class T>
void set_edge_gradients(Plan& plan, const PairSet& pairs, const PairTable<T>& grad, int64_t pixels);

}  // namespace salkernels
