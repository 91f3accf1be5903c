// cuda/launch.h on the host: the same plans, whose kernels run on the emulator, or are handed to
// whoever asked for them (the tests, for machine code that something else runs).
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/launch.h"

namespace {

using namespace salkernels::cuda;

// Takes a launch in place of the emulator; 0 if it went well.
using Take = int (*)(const char* kernel, int64_t blocks, int64_t rows, int64_t threads,
                     int64_t shared_bytes, const void* problem);

struct Settings {
  int64_t shared_limit = 163 << 10;  // bytes of a block: that of sm_80
  int64_t order = 0;                 // of threads: see emulator.h
  Take take = nullptr;
} settings;

const char* run_plan(const Plan& plan, const Problem& problem) {
  if (plan.error != nullptr) return plan.error;
  for (int i = 0; i < plan.count; ++i) {
    const Launch& launch = plan.launches[i];
    if (settings.take == nullptr) {
      emulator::run([&] { launch.kernel(problem); }, kThreads, launch.blocks, launch.rows,
                    launch.shared_bytes, settings.order);
    } else if (settings.take(launch.name, launch.blocks, launch.rows, kThreads,
                             launch.shared_bytes, &problem) != 0) {
      return "a launch was taken, and failed";
    }
  }
  return nullptr;
}

// What a pointer of a Problem points to.
struct Pointer {
  int64_t place;  // of the pointer in the Problem, in bytes
  const void* begin;
  int64_t bytes;
};

struct Pointers {
  const Problem& problem;
  Pointer* out;
  int count = 0;

  template <class T>
  void add(T* const& field, int64_t bytes) {
    if (field == nullptr || bytes <= 0) return;
    const auto* from = reinterpret_cast<const char*>(&problem);
    out[count++] = {reinterpret_cast<const char*>(&field) - from, field, bytes};
  }
};

int64_t span(const Problem& p, const Maps& maps, const int64_t (&strides)[5], int64_t element) {
  const int64_t sizes[5] = {p.groups, maps.samples, p.channels, p.grid.height, p.grid.width};
  int64_t last = 0;
  for (int i = 0; i < 5; ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return (last + 1) * element;
}

}  // namespace

namespace salkernels {
namespace cuda {

const char* launch_forward(Problem problem, void*) {
  const Plan plan = plan_forward(problem, settings.shared_limit);
  return run_plan(plan, problem);
}

const char* launch_backward(Problem problem, void*) {
  const Plan plan = plan_backward(problem, settings.shared_limit);
  return run_plan(plan, problem);
}

const char* launch_norms(Problem problem, void*) {
  const Plan plan = plan_norms(problem);
  return run_plan(plan, problem);
}

bool backward_needs_terms(const Problem& problem) {
  return backward_lists(problem, settings.shared_limit);
}

int driver_version() { return 0; }  // there is none

}  // namespace cuda
}  // namespace salkernels

extern "C" {

// Both parts of `count` floats as the kernels split them: `to` holds all upper, then all lower ones.
void emulator_split(const uint32_t* from, uint32_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Split x = split(from[i]);
    to[i] = x.high;
    to[count + i] = x.low;
  }
}

void emulator_set(int64_t shared_limit, int64_t order, Take take) {
  settings = {shared_limit, order, take};
}

// A launch that is taken and forgotten, for who measures all else.
int emulator_no_launch(const char*, int64_t, int64_t, int64_t, int64_t, const void*) { return 0; }

int64_t emulator_problem_bytes() { return sizeof(Problem); }

// Every pointer of a Problem that points to something; `out` has room for 24.
int emulator_pointers(const Problem* problem, Pointer* out) {
  const Problem& p = *problem;
  const int64_t features = p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2;
  const int64_t wide = p.dtype == kFloat64 ? 8 : 4, plane = p.grid.pixels();
  const int64_t matches = p.num_pairs * plane;
  Pointers all{p, out};
  for (const Maps& maps : p.maps) {
    all.add(maps.data, span(p, maps, maps.strides, features));
    all.add(maps.grad, span(p, maps, maps.grad_strides, features));
    all.add(maps.valid, (p.groups - 1) * maps.valid_stride + maps.samples * plane);
  }
  all.add(p.pairs, p.num_pairs * 8);
  all.add(p.norm, p.nodes() * plane * wide);
  all.add(p.query_begin, (p.groups * p.maps[0].samples + 1) * 4);
  all.add(p.key_begin, (p.groups * p.maps[1].samples + 1) * 4);
  all.add(p.by_key, p.num_pairs * 4);
  all.add(p.by_key_query, p.num_pairs * 4);
  all.add(p.term_end, p.nodes() * plane * 4);
  all.add(p.along, p.nodes() * plane * wide);
  all.add(p.terms, 2 * matches * 2 * wide);
  all.add(p.grad_sim, matches * wide);
  all.add(p.argmax, matches * (p.wide_index ? 4 : 1));
  all.add(p.max_sim, matches * wide);
  all.add(p.loss, p.num_pairs * wide);
  all.add(p.mean, wide);
  all.add(p.grad_mean, wide);
  return all.count;
}
}
