// See emulator.h.
#include "cuda/device.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call must keep on the stack, and takes those of the other stack.
// A tenth of the time of swapcontext, which asks the system for its signal mask.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  Index index;
  void* stack = nullptr;
  void* saved = nullptr;  // stack pointer while it waits
  void* fake_stack = nullptr;
  bool waits = false, done = false;
  std::vector<Copy> open;                // not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Place {  // in the source
  const char* what = "";
  int line = 0;

  bool operator!=(const Place& other) const {
    return line != other.line || std::strcmp(what, other.what) != 0;
  }
  std::string text() const { return what + std::string(", line ") + std::to_string(line); }
};

struct Meeting {  // of the threads of a block, or of the lanes of a warp
  std::vector<Fiber*> present;
  void* offers[32];
  Place place;
};

struct Block {
  std::vector<Fiber> fibers;
  Index index;
  unsigned char* shared = nullptr;
  Meeting barrier;
  std::vector<Meeting> warps;
  bool any = false, result = false;
  std::function<void()> body;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};

Block block;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: block (%u, %u), thread %u: %s\n", block.index.x, block.index.y,
               block.current ? block.current->index.x : 0, what.c_str());
  std::abort();
}

void enter(Fiber& fiber) {
  block.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, kStack);
#endif
  emulator_switch(&block.scheduler, fiber.saved);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
  block.current = nullptr;
}

void leave(bool for_good) {
  Fiber& fiber = *block.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.scheduler_bottom,
                                 block.scheduler_size);
#else
  (void)for_good;
#endif
  emulator_switch(&fiber.saved, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  block.body();
  block.current->done = true;
  leave(true);
  std::abort();
}

// Waits until `expected` fibers are here; true for the last of them.
bool meet(Meeting& meeting, size_t expected, Place place) {
  if (meeting.present.empty()) {
    meeting.place = place;
  } else if (meeting.place != place) {
    fail("waits at " + place.text() + " while others wait at " + meeting.place.text());
  }
  meeting.present.push_back(block.current);
  if (meeting.present.size() == expected) return true;
  block.current->waits = true;
  leave(false);
  return false;
}

void release(Meeting& meeting) {
  for (Fiber* fiber : meeting.present) fiber->waits = false;
  meeting.present.clear();
}

void run_block(Index index, size_t shared_bytes, const std::vector<int>& order) {
  block.index = index;
  // Its own allocation for each block: nothing of the one before is left, and its ends are known.
  block.shared = static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 31) / 16 * 16));
  std::memset(block.shared, 0xff, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  const size_t rounded = (shared_bytes + 31) / 16 * 16;
  __asan_poison_memory_region(block.shared + shared_bytes, rounded - shared_bytes);
#endif
  for (Fiber& fiber : block.fibers) {
    fiber.done = fiber.waits = false;
    fiber.groups.clear();
    fiber.open.clear();
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack) - 2;
    *top = reinterpret_cast<void*>(start);
    top -= 6;  // the registers that emulator_switch takes
    std::memset(top, 0, 6 * sizeof(void*));
    fiber.saved = top;
  }
  size_t left = block.fibers.size();
  while (left > 0) {
    bool moved = false;
    for (int i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || fiber.waits) continue;
      moved = true;
      enter(fiber);
      if (fiber.done) --left;
    }
    if (!moved) {
      fail("the threads that are left wait for ever; some at " + block.barrier.place.text());
    }
  }
  if (!block.barrier.present.empty()) fail("a thread ended while others wait");
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared + shared_bytes, rounded - shared_bytes);
#endif
  std::free(block.shared);
}

}  // namespace

Index& thread_index() { return block.current->index; }
Index& block_index() { return block.index; }
unsigned char* shared_memory() { return block.shared; }

bool block_barrier(bool on, int line) {
  block.any |= on;
  if (meet(block.barrier, block.fibers.size(), {"__syncthreads", line})) {
    block.result = block.any;
    block.any = false;
    release(block.barrier);
  }
  // No thread can be at the next barrier before all have left this one and read the result.
  return block.result;
}

void warp_together(void* own, const char* what, int line,
                   const std::function<void(void* const*)>& together) {
  Meeting& meeting = block.warps[block.current->index.x / 32];
  meeting.offers[block.current->index.x % 32] = own;
  if (meet(meeting, 32, {what, line})) {
    together(meeting.offers);
    release(meeting);
  }
}

void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    fail("an asynchronous copy is not aligned to 16 bytes");
  }
  block.current->open.push_back({to, from});
}

void copy_commit() {
  block.current->groups.push_back(std::move(block.current->open));
  block.current->open.clear();
}

void copy_wait(int newest) {
  auto& groups = block.current->groups;
  while (int(groups.size()) > newest) {
    for (const Copy& copy : groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
    groups.pop_front();
  }
}

void run(const std::function<void()>& body, int threads, int64_t blocks, int64_t rows,
         int64_t shared_bytes, int64_t order_seed) {
  if (block.fibers.size() != size_t(threads)) {
    if (!block.fibers.empty()) fail("all launches must have the same number of threads");
    block.fibers.resize(threads);
    block.warps.resize(threads / 32);
    for (int i = 0; i < threads; ++i) {
      block.fibers[i].index.x = unsigned(i);
      block.fibers[i].stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = order_seed < 0 ? threads - 1 - i : i;
  if (order_seed > 0) std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(order_seed)));
  block.body = body;
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < blocks; ++x) {
      run_block({unsigned(x), unsigned(y), 0}, size_t(shared_bytes), order);
    }
  }
}

}  // namespace emulator

namespace salkernels {
namespace cuda {

float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return float(value);
}
void narrow(float x, Half& to) {
  const _Float16 value = _Float16(x);
  std::memcpy(&to.bits, &value, 2);
}
void narrow(float x, BFloat16& to) {
  uint32_t bits = float_to_bits(x);
  if (x != x) {
    to.bits = 0x7fff;
    return;
  }
  bits += 0x7fff + (bits >> 16 & 1);
  to.bits = uint16_t(bits >> 16);
}

namespace {

struct Factors {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// value(word, i): the i-th value of a word, of which it holds `values`.
template <int values, class Value>
void multiply_together(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       const char* what, const Value& value) {
  Factors own{sum, a, {b0, b1}};
  ::emulator::warp_together(&own, what, 0, [&](void* const* lanes) {
    auto* const* all = reinterpret_cast<Factors* const*>(lanes);
    float left[16][8 * values], right[8][8 * values];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < values; ++i) {
        for (int w = 0; w < 4; ++w) {
          left[g + w % 2 * 8][(t + w / 2 * 4) * values + i] = value(all[lane]->a[w], i);
        }
        for (int w = 0; w < 2; ++w) right[g][(t + w * 4) * values + i] = value(all[lane]->b[w], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float total = all[lane]->sum[i];
        for (int k = 0; k < 8 * values; ++k) total += left[row][k] * right[column][k];
        all[lane]->sum[i] = total;
      }
    }
  });
}

}  // namespace

namespace {

struct Matrices {
  uint32_t* to;
  const uint32_t* row;
};

// take(rows of a matrix, lane): the word of it that a lane is given.
template <class Word>
void load_together(uint32_t (&to)[4], const uint32_t* row, const char* what, const Word& take) {
  Matrices own{to, row};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "emulator: %s is not aligned to 16 bytes\n", what);
    std::abort();
  }
  ::emulator::warp_together(&own, what, 0, [&](void* const* lanes) {
    const auto* const* all = reinterpret_cast<const Matrices* const*>(lanes);
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) all[lane]->to[m] = take(all + m * 8, lane);
    }
  });
}

}  // namespace

void load_matrices_at(uint32_t (&to)[4], const uint32_t* row) {
  load_together(to, row, "ldmatrix",
                [](const Matrices* const* rows, int i) { return rows[i / 4]->row[i % 4]; });
}
void load_matrices_across_at(uint32_t (&to)[4], const uint32_t* row) {
  load_together(to, row, "ldmatrix.trans", [](const Matrices* const* rows, int i) {
    const int first = i % 4 * 2, column = i / 4;
    const auto value = [&](int r) {
      return rows[r]->row[column / 2] >> (column % 2 * 16) & 0xffffu;
    };
    return value(first) | value(first + 1) << 16;
  });
}

void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  // The hardware does not look at the lower 13 bits.
  multiply_together<1>(sum, a, b0, b1, "mma tf32",
                       [](uint32_t word, int) { return bits_to_float(word & 0xffffe000); });
}
void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_together<2>(sum, a, b0, b1, "mma bf16", [](uint32_t word, int i) {
    return bits_to_float(i == 0 ? word << 16 : word & 0xffff0000);
  });
}
void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_together<2>(sum, a, b0, b1, "mma f16", [](uint32_t word, int i) {
    return widen(Half{uint16_t(word >> (16 * i))});
  });
}

}  // namespace cuda
}  // namespace salkernels
