// Products of a tile: up to 128 query rows times up to 128 key rows, chunk by chunk of channels.
//
// The tile falls into 8 x 8 blocks of 16 x 16 products. Those that some pair needs are numbered,
// and warp w takes the blocks w, w + 8, w + 16, ..., so that all have about as many, however few
// pairs there are; in the set form nothing below the diagonal is needed:
//
//                 columns by 16
//        rows     0 . . 1 . .        0, 1, ...: needed, by which warp
//        by 16      2 . 3 . .        . : skipped
//                     4 . 5 6
//
// A chunk is 128 bytes of channels of each row. It lands in a ring of stages by asynchronous
// copies; then each thread looks at the pieces of its rows once, for what all warps would
// otherwise do over and over: squares for the norms, and for fp32 the split in two tf32 (the
// upper part stays in place, the lower goes to a stage of its own):
//
//   stage 0 | stage 1 | ... | lower parts         each (query rows, then key rows) x 36 words
#pragma once

#include "rows.cuh"

namespace salkernels {
namespace cuda {

// How products are made. tf32x3 splits each fp32 in two tf32, which loses about what fp32 does.
struct Fp32 {
  using T = float;
  static constexpr int kProducts = 3;
  static constexpr bool kHalf = false;
};
struct Tf32 {
  using T = float;
  static constexpr int kProducts = 1;
  static constexpr bool kHalf = false;
};
struct Bf16 {
  using T = BFloat16;
  static constexpr int kProducts = 1;
  static constexpr bool kHalf = false;
};
struct Fp16 {
  using T = Half;
  static constexpr int kProducts = 1;
  static constexpr bool kHalf = true;
};

constexpr int kStagePitch = kChunkWords + 4;  // words; 16-byte rows of ldmatrix fall on all banks
constexpr int kSimPitch = kTile + 8;          // words; so do pairs of columns, and rows of 16 bytes
constexpr int kTileWords = kTile * kStagePitch;  // of a stage, for one side
constexpr int kRowsOfThread = 2 * kTile / (kThreads / 8);  // that a thread looks at, of both sides

__host__ __device__ constexpr int64_t product_words(int64_t stages, bool one_side, bool lower) {
  const int64_t staged = (stages + (lower ? 1 : 0)) * (one_side ? 1 : 2) * kTileWords;
  const int64_t sims = int64_t(kTile) * kSimPitch;
  return staged > sims ? staged : sims;
}

constexpr int kBlocks = kTile / 16;  // of a side of the tile

// Which blocks are needed, and in which order warps take them.
// A block is 8 (row / 16) + column / 16.
struct BlockList {
  uint32_t needed[2];
  uint8_t blocks[kBlocks * kBlocks];
  int32_t count;

  // The block that holds a row and a column of the tile.
  __device__ void need(int row, int column) {
    const int block = row / 16 * kBlocks + column / 16;
    atomicOr(&needed[block / 32], 1u << block % 32);
  }
  // By the whole thread block, after the last call of `need` and a barrier; ends with one.
  __device__ void number() {
    const int all = __popc(needed[0]) + __popc(needed[1]);
    if (threadIdx.x < kBlocks * kBlocks) {
      const int block = threadIdx.x, word = block / 32;
      const uint32_t below = needed[word] & ((1u << block % 32) - 1);
      const int rank = __popc(below) + (word == 1 ? __popc(needed[0]) : 0);
      // Room at the end is filled with block 0, whose products are made and not looked at.
      if ((needed[word] >> block % 32 & 1) != 0) {
        blocks[rank] = uint8_t(block);
      } else {
        blocks[all + block - rank] = 0;
      }
    }
    if (threadIdx.x == 0) count = all;
    __syncthreads();
  }
};

// A warp's products of kShare blocks: two groups of 8 columns each.
template <int kShare>
struct Sums {
  float at[kShare][2][4];
};

// Rows and columns of the i-th block of this warp, and whether there is one.
struct WarpBlock {
  int row, column;
  bool exists;

  __device__ static WarpBlock of(const BlockList& list, int i) {
    const int number = i * kWarps + threadIdx.x / 32;
    const int block = list.blocks[number];
    return {block / kBlocks * 16, block % kBlocks * 16, number < list.count};
  }
};

template <class Mode>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1) {
  if constexpr (sizeof(typename Mode::T) == 4) {
    multiply_tf32(sum, a, b0, b1);
  } else if constexpr (Mode::kHalf) {
    multiply_f16(sum, a, b0, b1);
  } else {
    multiply_bf16(sum, a, b0, b1);
  }
}

// Adds the products of a block and of a chunk: a step of the tensor core takes 8 words.
//
// In three parts, the tensor core truncates where it adds, hundreds of times in a long row. So a
// chunk is summed by itself, and added with rounding.
template <class Mode, int kWord>
__device__ inline void multiply_step(float (&sums)[2][4], SharedWords rows, SharedWords columns,
                                     SharedWords low_rows, SharedWords low_columns) {
  uint32_t a[4], b[4];
  load_matrices<kWord>(a, rows);
  load_matrices<kWord>(b, columns);
  if constexpr (Mode::kProducts == 3) {  // the small ones first
    uint32_t a_low[4], b_low[4];
    load_matrices<kWord>(a_low, low_rows);
    load_matrices<kWord>(b_low, low_columns);
#pragma unroll
    for (int j = 0; j < 2; ++j) multiply<Mode>(sums[j], a_low, b[2 * j], b[2 * j + 1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) multiply<Mode>(sums[j], a, b_low[2 * j], b_low[2 * j + 1]);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) multiply<Mode>(sums[j], a, b[2 * j], b[2 * j + 1]);
}
template <class Mode>
__device__ inline void multiply_block(float (&sums)[2][4], SharedWords rows, SharedWords columns,
                                      int lower) {
  static_assert(kChunkWords == 32, "four steps");
  constexpr bool kSplit = Mode::kProducts == 3;
  const SharedWords low_rows = rows + lower, low_columns = columns + lower;
  float part[2][4] = {};
  float(&to)[2][4] = kSplit ? part : sums;
  // Between steps: or the compiler would load the operands of all of them first, and spill.
  multiply_step<Mode, 0>(to, rows, columns, low_rows, low_columns);
  if constexpr (kSplit) __syncwarp();
  multiply_step<Mode, 8>(to, rows, columns, low_rows, low_columns);
  if constexpr (kSplit) __syncwarp();
  multiply_step<Mode, 16>(to, rows, columns, low_rows, low_columns);
  if constexpr (kSplit) __syncwarp();
  multiply_step<Mode, 24>(to, rows, columns, low_rows, low_columns);
  if constexpr (kSplit) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += part[i / 4][i % 4];
  }
}

// Where this lane reads of a block: as queries 16 rows, words 0..3 and 4..7 of them; as keys two
// groups of 8 rows.
__device__ inline int lane_of_rows() {
  const int lane = threadIdx.x % 32;
  return lane % 16 * kStagePitch + lane / 16 * 4;
}
__device__ inline int lane_of_columns() {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * kStagePitch + lane / 8 % 2 * 4;
}

// A tile of which all blocks are multiplied. A warp has the rows of four and the columns of two, so
// that each operand it reads from shared memory serves several products:
//
//        columns by 32      sums.at[2 r + c]: rows 16 r and columns 16 c of the warp's part
//        rows    0 1 2 3
//        by 64   4 5 6 7
constexpr int kWarpRows = 64, kWarpColumns = 32;

struct WarpPart {
  __device__ static int row() {
    return int(threadIdx.x) / (32 * (kTile / kWarpColumns)) * kWarpRows;
  }
  __device__ static int column() {
    return int(threadIdx.x) / 32 % (kTile / kWarpColumns) * kWarpColumns;
  }
};

// A step of all rows, from block kRow on: its products with two blocks of columns.
template <class Mode, int kWord, int kRow>
__device__ inline void multiply_part_rows(Sums<kBlocks>& sums, SharedWords rows,
                                          const uint32_t (&b)[2][4]) {
  uint32_t a[4];
  load_matrices<kWord + kRow * 16 * kStagePitch>(a, rows);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    multiply<Mode>(sums.at[2 * kRow + i / 2][i % 2], a, b[i / 2][i % 2 * 2],
                   b[i / 2][i % 2 * 2 + 1]);
  }
  if constexpr (kRow + 1 < kWarpRows / 16) {
    multiply_part_rows<Mode, kWord, kRow + 1>(sums, rows, b);
  }
}
template <class Mode, int kWord>
__device__ inline void multiply_part_step(Sums<kBlocks>& sums, SharedWords rows,
                                          SharedWords columns) {
  uint32_t b[2][4];
  load_matrices<kWord>(b[0], columns);
  load_matrices<kWord + 16 * kStagePitch>(b[1], columns);
  multiply_part_rows<Mode, kWord, 0>(sums, rows, b);
}

// In three parts, block by block: the sums of a chunk by itself take registers too.
template <class Mode>
__device__ inline void multiply_part(Sums<kBlocks>& sums, SharedWords rows, SharedWords columns,
                                     int lower) {
  if constexpr (Mode::kProducts == 3) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      __syncwarp();  // as between steps
      multiply_block<Mode>(sums.at[i], rows + i / 2 * 16 * kStagePitch,
                           columns + i % 2 * 16 * kStagePitch, lower);
    }
  } else {
    multiply_part_step<Mode, 0>(sums, rows, columns);
    multiply_part_step<Mode, 8>(sums, rows, columns);
    multiply_part_step<Mode, 16>(sums, rows, columns);
    multiply_part_step<Mode, 24>(sums, rows, columns);
  }
}

// A thread's look at the pieces of its rows in a chunk: see above. Rows of keys follow those of
// queries; `rows[side]` of each are staged.
template <class Mode, bool kNorms>
__device__ inline void prepare_chunk(uint32_t* staged, int lower, const int32_t* rows,
                                     float (&squares)[kRowsOfThread]) {
  using T = typename Mode::T;
  uint32_t* at = staged + threadIdx.x / 8 * kStagePitch + threadIdx.x % 8 * 4;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i, at += kThreads / 8 * kStagePitch) {
    const int row = threadIdx.x / 8 + i % (kRowsOfThread / 2) * (kThreads / 8);
    if (row >= rows[i / (kRowsOfThread / 2)]) continue;
    Piece piece = *reinterpret_cast<const Piece*>(at);
    if constexpr (kNorms) add_squares<T>(squares[i], piece);
    if constexpr (sizeof(T) == 4) {
      Piece low;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Split x = split(piece.words[j]);
        piece.words[j] = x.high;
        low.words[j] = x.low;
      }
      *reinterpret_cast<Piece*>(at) = piece;
      if constexpr (Mode::kProducts == 3) *reinterpret_cast<Piece*>(at + lower) = low;
    }
  }
}

// Rows of a tile in device memory: queries, then, unless they are the same, keys.
struct TileRows {
  const unsigned char* const* start;  // (2 kTile)
  const int32_t* rows;  // staged of each side, by 32; in shared memory, since registers are short
  bool one_side;
};

// Sums of products of all channels, and, if kNorms, the squares of the rows that this thread looks
// at; with `by_diagonal` these are not asked for, being products themselves. If kWhole, all blocks
// are multiplied, as WarpPart deals them out, and `list` is not looked at.
template <class Mode, bool kNorms, bool kWhole, int kShare>
__device__ __forceinline__ void multiply_tile(const Problem& p, const TileRows& tile,
                                              const BlockList* list, bool by_diagonal,
                                              uint32_t* buffer, Sums<kShare>& sums,
                                              float (&squares)[kRowsOfThread]) {
  using T = typename Mode::T;
  constexpr int kChannels = kChunkWords * 4 / int(sizeof(T));
  constexpr bool kWritten = sizeof(T) == 4;
  const int stages = int(p.tiling.stages), words = (tile.one_side ? 1 : 2) * kTileWords;
  const int channels = int(p.channels), chunks = (channels + kChannels - 1) / kChannels;
  // Where this lane reads of each block: rows in the lower half, columns in the upper one, since
  // registers are short.
  const int first_column = lane_of_columns() + (tile.one_side ? 0 : kTileWords);
  uint32_t places[kShare];
#pragma unroll
  for (int i = 0; i < kShare && !kWhole; ++i) {
    const WarpBlock block = WarpBlock::of(*list, i);
    places[i] = uint32_t(block.row * kStagePitch + lane_of_rows()) |
                uint32_t(block.column * kStagePitch + first_column) << 16;
  }

  const auto stage = [&](int chunk, int place) {
#pragma unroll 1
    for (int side = 0; side < (tile.one_side ? 1 : 2); ++side) {
      const Maps& maps = p.maps[side];
      load_chunk<T, kStagePitch>({tile.start + side * kTile, maps.strides[2], nullptr},
                                 tile.rows[side], maps.vector, maps.strides[2] == 1, chunk * kChannels, channels,
                                 buffer + place * words + side * kTileWords);
    }
  };
  // Turns before the first product and those with one are the same code: it is long, and a block
  // runs through it a few times only, so that what it costs is to be fetched. `place` in the ring is
  // that of the chunk which is staged, and, one further, of the one that is multiplied.
  int place = 0;
#pragma unroll 1
  for (int chunk = 1 - stages; chunk < chunks; ++chunk) {
    if (stages > 1) copy_async_wait(stages - 2);
    // The chunk has landed for every thread, and none reads the one before it any more.
    __syncthreads();
    if (chunk + stages - 1 < chunks) stage(chunk + stages - 1, place);
    copy_async_commit();
    place = place + 1 == stages ? 0 : place + 1;
    if (chunk < 0) continue;
    if (stages == 1) {
      copy_async_wait(0);
      __syncthreads();
    }
    uint32_t* const staged = buffer + place * words;
    const int lower = (stages - place) * words;
    if (kWritten || (kNorms && !by_diagonal)) {
      prepare_chunk<Mode, kNorms>(staged, lower, tile.rows, squares);
      if (kWritten) __syncthreads();
    }
    const SharedWords at = shared_words(staged);
    if constexpr (kWhole) {
      multiply_part<Mode>(sums, at + (WarpPart::row() * kStagePitch + lane_of_rows()),
                          at + (WarpPart::column() * kStagePitch + first_column), lower);
    } else {
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        // As between steps.
        if constexpr (Mode::kProducts == 3) __syncwarp();
        multiply_block<Mode>(sums.at[i], at + int(places[i] & 0xffff), at + int(places[i] >> 16),
                             lower);
      }
    }
  }
  copy_async_wait(0);
}

// 1 / norm, or kAbsent of a row that takes no part. A row that is lost is NaN.
constexpr float kAbsent = -1;

// Cosines from the sums of products, to shared memory in the place of the stages; -INFINITY where
// either row takes no part: a query pixel that does not finds no match either.
//
//   a lane has of a group of 8 columns: rows lane / 4 and 8 below, columns 2 (lane % 4) and next
template <int kShare>
__device__ inline void store_cosines(const Sums<kShare>& sums, const BlockList& list,
                                     const float* row_scale, const float* column_scale,
                                     float* sims) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const WarpBlock block = WarpBlock::of(list, i);
    if (!block.exists) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = block.column + j * 8 + lane % 4 * 2;
      const float scales[2] = {column_scale[column], column_scale[column + 1]};
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int row = block.row + upper * 8 + lane / 4;
        const float scale = row_scale[row];
        float pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          pair[k] = scale < 0 || scales[k] < 0
                        ? -INFINITY
                        : sums.at[i][j][2 * upper + k] * scale * scales[k];
        }
        *reinterpret_cast<float2*>(sims + row * kSimPitch + column) =
            make_float2(pair[0], pair[1]);
      }
    }
  }
}

// Squared norms from the blocks on the diagonal of a tile whose sides are the same rows: the lane
// that holds a row and the column of the same number has its square.
template <int kShare>
__device__ inline void store_diagonal(const Sums<kShare>& sums, const BlockList& list,
                                      float* squares) {
  const int lane = threadIdx.x % 32, row = lane / 4, odd = row % 2;
  if (row / 2 != lane % 4) return;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const WarpBlock block = WarpBlock::of(list, i);
    if (!block.exists || block.row != block.column) continue;
    squares[block.row + row] = odd != 0 ? sums.at[i][0][1] : sums.at[i][0][0];
    squares[block.row + 8 + row] = odd != 0 ? sums.at[i][1][3] : sums.at[i][1][2];
  }
}

// Squared norms from what threads have looked at: 8 of them share a row.
__device__ inline void store_squares(const float (&squares)[kRowsOfThread], bool one_side,
                                     float* to) {
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    if (one_side && i >= kRowsOfThread / 2) break;
    float sum = squares[i];
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 8 == 0) to[threadIdx.x / 8 + i * (kThreads / 8)] = sum;
  }
}

}  // namespace cuda
}  // namespace salkernels
