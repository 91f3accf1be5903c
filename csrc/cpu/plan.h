// From tensors' shapes and a list of pairs to nodes, edges, components and units of work.
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

struct PairSet {
  int64_t groups, queries, keys;
  bool set_form;  // the keys are the queries
  bool every;     // every query with every key: there is no list
  // Where each pair stands in (G, N, M), ascending, and from some place on -1.
  const int64_t* list;
  int64_t length;
  const uint8_t* valid;  // (G, samples, H·W): queries, then keys that are not the queries; or null
  int64_t plane;         // H·W

  int64_t samples() const { return set_form ? queries : queries + keys; }
  // What is wrong with the list, or null.
  const char* fault() const;
};

// Samples without any pair have no work in forward, but a gradient to be written in backward.
Plan make_plan(const PairSet& pairs, const Maps& query, const Maps& key, bool keep_isolated);

// Adds the windows of one component as tiles; a packed row has `row_bytes`.
void add_tiles(Work& work, const Problem& problem, int32_t component, int64_t row_bytes,
               bool backward);

// Cuts the work into pieces that do not depend on the number of threads.
Work make_work(const Problem& problem, const Kernels& kernels, bool backward);

}  // namespace salkernels
