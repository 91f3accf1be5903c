// The CPU kernels from many threads, for ThreadSanitizer: scripts/threads.sh builds and runs it.
//
// torch's thread pool is not instrumented, so to go through the operators would report its own
// hand-overs as races. Here std::thread takes its place: several calls at once read the same
// features, and each shares its units of work among threads in whatever order they come. Every
// output must have the bits that one thread gives. The memory that is kept for gradients has a test of
// its own: no two threads may have one block.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/cpu/kept_memory.h"
#include "../csrc/cpu/lse.h"
#include "../csrc/cpu/plan.h"

namespace {

using namespace salkernels;

constexpr int kCalls = 3, kThreads = 3;

struct Case {
  const char* name;
  int64_t samples, channels, height, width, window;
  bool set_form;
};

// Tiles; tiles with narrow and short windows at the edges; one window that is blocked, one that is
// streamed. Between them they use every kernel.
const Case kCases[] = {
    {"tiles", 6, 40, 12, 16, 2, true},
    {"edges", 5, 21, 13, 11, 3, false},
    {"blocked", 4, 33, 13, 30, 10, true},
    {"streamed", 3, 24, 18, 20, 20, true},
};

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType wide_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
int64_t wide_size(DType dtype) { return element_size(wide_dtype(dtype)); }

std::vector<char> random_features(int64_t count, DType dtype) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<char> out(size_t(count * element_size(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal(random);
    const double wide = x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t brain = uint16_t(bits >> 16);
    const void* from = dtype == DType::f64   ? static_cast<const void*>(&wide)
                       : dtype == DType::f32 ? static_cast<const void*>(&x)
                                             : static_cast<const void*>(&brain);
    std::memcpy(&out[size_t(i * element_size(dtype))], from, size_t(element_size(dtype)));
  }
  return out;
}

// As torch's parallel-for: scratch memory per thread, items in any order.
template <class Item>
void share(const std::vector<Item>& items, int threads, int64_t bytes,
           const std::function<void(const Item&, char*)>& run) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    const std::unique_ptr<char, void (*)(void*)> scratch(
        static_cast<char*>(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64))), std::free);
    for (size_t i = next++; i < items.size(); i = next++) run(items[i], scratch.get());
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

template <class AProblem, class Item>
void run_all(const AProblem& problem, const std::vector<Item>& items, int threads,
             int64_t (*kernel)(const AProblem&, const Item*, char*)) {
  if (items.empty()) return;
  share<Item>(items, threads, kernel(problem, nullptr, nullptr),
              [&](const Item& item, char* scratch) { kernel(problem, &item, scratch); });
}

// One forward and backward, with outputs of its own.
struct Call {
  std::vector<char> loss, argmax, max_sim, grad, lse, lse_grad;

  Call(const Kernels& kernels, const Case& c, DType dtype, bool channels_last, bool around,
       const std::vector<char>& features, int threads)
      : grad(features.size()), lse_grad(features.size()) {
    const int64_t area = c.height * c.width, samples = c.samples;
    Maps maps{features.data(), grad.data(), element_size(dtype), {}, {}};
    const int64_t nchw[5] = {0, c.channels * area, area, c.width, 1};
    const int64_t last[5] = {0, c.channels * area, 1, c.width * c.channels, c.channels};
    std::memcpy(maps.strides, channels_last ? last : nchw, sizeof nchw);
    std::memcpy(maps.grad_strides, maps.strides, sizeof nchw);
    // Queries and keys are the halves of the features in the pairwise form.
    const int64_t queries = c.set_form ? samples : samples / 2;
    Maps key = maps;
    const int64_t skip = c.set_form ? 0 : queries * c.channels * area * maps.element_size;
    key.data = features.data() + skip;
    key.grad = grad.data() + skip;
    PairSet pairs{};
    pairs.groups = 1;
    pairs.queries = queries;
    pairs.keys = c.set_form ? samples : samples - queries;
    pairs.set_form = c.set_form;
    pairs.every = true;
    pairs.plane = area;

    Problem problem{};
    problem.grid = {c.height, c.width, least(c.window, c.height), least(c.window, c.width)};
    problem.channels = c.channels;
    problem.eps = 1e-12;
    problem.dtype = dtype;
    problem.wide_index = problem.grid.window_rows * problem.grid.window_columns > 256;
    problem.write_around = around;
    problem.plan = make_plan(pairs, maps, key, true);
    const int64_t count = problem.plan.num_pairs;
    loss.resize(size_t(count * wide_size(dtype)));
    max_sim.resize(size_t(count * area * wide_size(dtype)));
    argmax.resize(size_t(count * area * (problem.wide_index ? 4 : 1)));
    problem.loss = loss.data();
    problem.max_sim = max_sim.data();
    problem.argmax = argmax.data();

    problem.work = make_work(problem, kernels, false);
    run_all(problem, problem.work.tiles, threads, kernels.match_tile);
    run_all(problem, problem.work.matches, threads, kernels.match_streamed);
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), int64_t(0));
    share<int64_t>(numbers, threads, 0, [&](const int64_t& pair, char*) {
      kernels.pair_loss(problem, pair);
    });

    // Another number for every (pair, pixel): what lands in the wrong place changes the result.
    const std::vector<char> grad_sim = random_features(count * area, wide_dtype(dtype));
    problem.grad_sim = grad_sim.data();
    problem.work = make_work(problem, kernels, true);
    const size_t pixels = problem.plan.nodes.size() * size_t(area * wide_size(dtype));
    std::vector<char> norms(pixels), poison(pixels);
    problem.norms = norms.data();
    problem.poison = poison.data();
    run_all(problem, problem.work.tiles, threads, kernels.gradient_tile);
    run_all(problem, problem.work.norms, threads, kernels.norms_streamed);
    run_all(problem, problem.work.gradients, threads, kernels.gradient_streamed);

    maps.grad = lse_grad.data();
    key.grad = lse_grad.data() + skip;
    problem.plan = make_plan(pairs, maps, key, true);
    problem.work = Work{};
    sums(kernels, problem, queries * area, threads);
  }

  // The log-sum-exp, and its gradient.
  void sums(const Kernels& kernels, const Problem& matches, int64_t count, int threads) {
    LseProblem problem{};
    static_cast<Problem&>(problem) = matches;
    lse.resize(size_t(count * wide_size(problem.dtype)));
    const std::vector<char> grad_lse = random_features(count, wide_dtype(problem.dtype));
    problem.temperature = 0.1;
    problem.lse = lse.data();
    problem.grad_lse = grad_lse.data();
    make_lse_work(problem, kernels, false);
    run_all(problem, problem.work.tiles, threads, kernels.lse_tile);
    run_all(problem, problem.pieces, threads, kernels.lse_piece);
    problem.work = Work{};
    problem.pieces.clear();
    make_lse_work(problem, kernels, true);
    run_all(problem, problem.work.tiles, threads, kernels.lse_gradient_tile);
    run_all(problem, problem.pieces, threads, kernels.lse_gradient_piece);
  }

  bool operator==(const Call& other) const {
    return loss == other.loss && argmax == other.argmax && max_sim == other.max_sim &&
           grad == other.grad && lse == other.lse && lse_grad == other.lse_grad;
  }

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Whether several calls at once, of several threads each, all equal the call of one thread, which
// writes through the caches; they go around them if `around`.
bool agrees(const Kernels& kernels, const Case& c, DType dtype, bool channels_last, bool around) {
  const std::vector<char> features =
      random_features(c.samples * c.channels * c.height * c.width, dtype);
  const Call expected(kernels, c, dtype, channels_last, false, features, 1);
  std::vector<char> equal(kCalls);
  std::vector<std::thread> callers;
  for (int i = 0; i < kCalls; ++i) {
    callers.emplace_back([&, i] {
      equal[size_t(i)] =
          Call(kernels, c, dtype, channels_last, around, features, kThreads) == expected;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const char ok : equal) {
    if (!ok) return false;
  }
  return true;
}

std::vector<const Kernels*> levels() {
  std::vector<const Kernels*> found{&kernels_baseline};
#ifdef SALKERNELS_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&kernels_avx2);
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&kernels_avx512);
#endif
  return found;
}

// Writes its own number all over a block, and finds it there once the others had their turn.
bool owns(const Block& block, int64_t bytes, uint64_t number) {
  volatile uint64_t* words = static_cast<uint64_t*>(block.memory);
  constexpr int64_t kStep = 64 << 10;
  for (int64_t i = 0; i < bytes; i += kStep) words[i / 8] = number;
  std::this_thread::yield();
  for (int64_t i = 0; i < bytes; i += kStep) {
    if (words[i / 8] != number) return false;
  }
  return block.capacity >= bytes;
}

// One "backward" after the other, with gradients of queries alone or of keys too, freed in any
// order, some of them by the next one, and now and then all memory is released.
bool blocks_have_one_owner(uint64_t thread) {
  std::mt19937 random(static_cast<uint32_t>(thread));
  std::vector<Block*> alive;
  bool good = true;
  for (uint64_t round = 0; round < 40; ++round) {
    const int64_t bytes[kMostBlocks] = {kLeastKept + int64_t(random() % 4) * (kLeastKept / 8),
                                        random() % 2 == 0 ? 0 : kLeastKept};
    Block* blocks[kMostBlocks];
    take_blocks(kMostBlocks, bytes, blocks);
    for (int i = 0; i < kMostBlocks; ++i) {
      good = good && (blocks[i] != nullptr) == (bytes[i] > 0);
      if (blocks[i] == nullptr) continue;
      good = good && owns(*blocks[i], bytes[i], thread << 32 | round << 1 | uint64_t(i));
      alive.push_back(blocks[i]);
    }
    std::shuffle(alive.begin(), alive.end(), random);
    for (size_t left = random() % 2; alive.size() > left; alive.pop_back()) give_block(alive.back());
    if (random() % 8 == 0) release_blocks();
  }
  for (Block* block : alive) give_block(block);
  return good;
}

bool kept_memory_works() {
  std::vector<char> good(kThreads);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { good[i] = blocks_have_one_owner(i + 1); });
  }
  for (std::thread& thread : threads) thread.join();
  release_blocks();
  for (const char ok : good) {
    if (!ok) return false;
  }
  return kept_bytes() == 0;
}

}  // namespace

int main() {
  int runs = 0, wrong = 0;
  for (const Kernels* kernels : levels()) {
    for (const Case& c : kCases) {
      for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
        for (const bool channels_last : {false, true}) {
          for (const bool around : {false, true}) {
            ++runs;
            if (agrees(*kernels, c, dtype, channels_last, around)) continue;
            ++wrong;
            std::printf("%s %s: bits depend on the threads\n", kernels->name, c.name);
          }
        }
      }
    }
  }
  if (!kept_memory_works()) {
    ++wrong;
    std::printf("a block of kept memory had two owners, or was lost\n");
  }
  std::printf("%d cases from %d callers of %d threads, %d wrong\n", runs, kCalls, kThreads, wrong);
  return wrong == 0 ? 0 : 1;
}
