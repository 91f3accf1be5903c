#include "kept_memory.h"

#ifdef __linux__

#include <pthread.h>
#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

namespace salkernels {
namespace {

constexpr int64_t kHuge = 2 << 20;  // bytes of a large page; a multiple of every common small one

using Blocks = std::array<Block*, kMostBlocks>;

struct Pool {
  std::mutex mutex;
  Blocks kept{};
  int64_t limit = 0;  // bytes: what the latest backward was given
};

void lock_pool();
void unlock_pool();

// Never destroyed: tensors that live until the process ends give their blocks back after the
// destructors of this file would have run. A fork waits for the lock, so that its child, which has
// none of the other threads, does not inherit it locked; the blocks are the child's own copies.
Pool& make_pool() {
  Pool* made = new Pool;
  pthread_atfork(lock_pool, unlock_pool, unlock_pool);
  return *made;
}

Pool& pool = make_pool();

void lock_pool() { pool.mutex.lock(); }
void unlock_pool() { pool.mutex.unlock(); }

bool is_off() {
  static const bool off = [] {
    const char* value = std::getenv("SALKERNELS_KEEP_MEMORY");
    return value != nullptr && std::strcmp(value, "0") == 0;
  }();
  return off;
}

// New memory, in large pages where the system leaves that to the program; null if there is none.
Block* map_block(int64_t bytes) {
  const int64_t capacity = (bytes + kHuge - 1) / kHuge * kHuge, length = capacity + kHuge;
  Block* block = new (std::nothrow) Block;
  if (block == nullptr) return nullptr;
  void* mapped =
      mmap(nullptr, size_t(length), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    delete block;
    return nullptr;
  }
  char* const begin = static_cast<char*>(mapped);
  const int64_t before = (kHuge - int64_t(reinterpret_cast<uintptr_t>(begin) % kHuge)) % kHuge;
  if (before > 0) munmap(begin, size_t(before));
  munmap(begin + before + capacity, size_t(length - before - capacity));
  madvise(begin + before, size_t(capacity), MADV_HUGEPAGE);  // only a hint
  *block = {begin + before, capacity};
  return block;
}

void unmap_block(Block* block) {
  munmap(block->memory, size_t(block->capacity));
  delete block;
}

Blocks take_all() {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  return std::exchange(pool.kept, Blocks{});
}

int64_t unmap_all(const Blocks& blocks) {
  int64_t bytes = 0;
  for (Block* block : blocks) {
    if (block == nullptr) continue;
    bytes += block->capacity;
    unmap_block(block);
  }
  return bytes;
}

// The smallest of some blocks that fits without wasting a quarter of it, no longer among them; null
// if none does.
Block* choose(Blocks& idle, int64_t bytes) {
  Block** best = nullptr;
  for (Block*& block : idle) {
    if (block == nullptr || bytes > block->capacity || bytes < block->capacity / 4 * 3) continue;
    if (best == nullptr || block->capacity < (*best)->capacity) best = &block;
  }
  return best == nullptr ? nullptr : std::exchange(*best, nullptr);
}

}  // namespace

void take_blocks(int count, const int64_t* bytes, Block** blocks) {
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) {
    blocks[i] = nullptr;
    if (bytes[i] > largest) largest = bytes[i];
  }
  if (largest < kLeastKept || is_off()) return;
  Blocks idle = take_all();
  for (int i = 0; i < count; ++i) {
    if (bytes[i] >= kLeastKept) blocks[i] = choose(idle, bytes[i]);
  }
  unmap_all(idle);  // before there are new ones beside it
  int64_t given = 0;
  for (int i = 0; i < count; ++i) {
    if (blocks[i] == nullptr && bytes[i] >= kLeastKept) blocks[i] = map_block(bytes[i]);
    if (blocks[i] != nullptr) given += blocks[i]->capacity;
  }
  const std::lock_guard<std::mutex> lock(pool.mutex);
  pool.limit = given;
}

void give_block(Block* block) {
  // Before anyone else can have it: the system drops pages that were not written since.
  madvise(block->memory, size_t(block->capacity), MADV_FREE);
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    Block** room = nullptr;
    int64_t bytes = block->capacity;
    for (Block*& kept : pool.kept) {
      if (kept == nullptr) {
        room = &kept;
      } else {
        bytes += kept->capacity;
      }
    }
    if (room != nullptr && bytes <= pool.limit) {
      *room = block;
      return;
    }
  }
  unmap_block(block);
}

int64_t release_blocks() {
  Blocks idle;
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    idle = std::exchange(pool.kept, Blocks{});
    pool.limit = 0;
  }
  return unmap_all(idle);
}

int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  int64_t bytes = 0;
  for (const Block* block : pool.kept) bytes += block == nullptr ? 0 : block->capacity;
  return bytes;
}

}  // namespace salkernels

#else

namespace salkernels {

int64_t release_blocks() { return 0; }

int64_t kept_bytes() { return 0; }

}  // namespace salkernels

#endif
