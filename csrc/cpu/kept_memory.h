// Large blocks of memory that stay with the process between calls.
//
// malloc gives blocks of more than 32 MB back to the system as soon as they are freed, and takes
// them anew at the next call: the system clears every page again, which takes as long as reading
// and writing the block. A gradient of that size is therefore written to a block that was kept from
// the call before. A block belongs to the caller's tensor until its storage is freed, whatever
// thread does that; only then can it be lent again.
//
// What is kept is never more than the latest backward was given, and the system may take its pages
// (MADV_FREE), just as if the block were not there, whenever memory runs short.
#pragma once

#include <cstdint>

namespace salkernels {

// Smaller gradients are left to malloc, which keeps them: glibc's largest threshold.
constexpr int64_t kLeastKept = 32 << 20;

// A backward has one gradient, or two where keys are not the queries.
constexpr int kMostBlocks = 2;

struct Block {
  void* memory;      // aligned to pages of 2 MB
  int64_t capacity;  // bytes
};

// Linux only, like give_block: elsewhere nothing is ever kept.
//
// Memory for all gradients of one backward, uninitialised; null for those that are small, and for
// all where it is switched off (SALKERNELS_KEEP_MEMORY=0) or the system has none. Blocks that were
// kept and do not fit go back to the system first.
void take_blocks(int count, const int64_t* bytes, Block** blocks);

// Keeps a block that nobody uses any more, or gives it back to the system.
void give_block(Block* block);

// Gives all that is kept back to the system, and so will be what is freed before the next backward.
// Returns its bytes.
int64_t release_blocks();

// Bytes that are kept and not in use.
int64_t kept_bytes();

}  // namespace salkernels
