// Backward of any window: dx = (V − (x̂·V) x̂) / ‖x‖, where V sums over the terms of a row, which
// terms.cuh has listed.
//
// gradient_rows  a block holds a slice of the channels of all rows of a window in shared memory, so
//                that features are read once, and partners are gathered from there:
//
//                           slice 0   slice 1  ...            each 64 to 256 bytes of channels
//                  row 0    [=======] [=======]
//                  row 1    [=======] [=======]               lanes beside each other take the
//                  ...                                        pieces of a row, so a row is read
//                  row R-1  [=======] [=======]               and written by whole sectors
//
// gather         a warp for each row, where a window does not fit, and for float64: partners come
//                from the cache. Blocks go window by window, so that it holds what they ask for.
#pragma once

#include "terms.cuh"

namespace salkernels {
namespace cuda {

// What a row of the gradient is made of besides V: dx = (V - self * x) * inverse. Nothing of a row
// without a term is anything but zero, be x an Inf or a NaN.
template <class F>
struct Projection {
  F self, inverse;

  __device__ static Projection of(F norm, F along, F eps, bool touched) {
    if (!touched) return {0, 0};
    return {along * unit_scale(norm, eps), gradient_scale(norm, eps)};
  }
};

// The terms of a row of a node in a window.
template <class F>
struct RowTerms {
  const Term<F>*at, *end;
  F along;

  __device__ static RowTerms of(const Problem& p, int64_t first_term, int64_t first_row,
                                int pixel) {
    const int32_t* ends = p.term_end + first_row;
    const Term<F>* terms = static_cast<const Term<F>*>(p.terms) + first_term;
    return {terms + (pixel == 0 ? 0 : ends[pixel - 1]), terms + ends[pixel],
            static_cast<const F*>(p.along)[first_row + pixel]};
  }
};

// Where the rows of a window are: of each node, and of each pixel of the window.
struct NodeRow {
  const unsigned char* data;
  unsigned char* grad;
  int64_t first_row, first_term;  // of its lists
};
struct alignas(16) PixelRow {
  int64_t offset[2], grad_offset[2];  // by side, in bytes
  int64_t norms;  // where those of the first node of the group stand; -1: no such pixel
};

struct alignas(16) RowsShared {
  Unit unit;
  alignas(16) NodeRow nodes[1];  // then PixelRow of each pixel, then the slice
};

__host__ __device__ constexpr int64_t rows_table_bytes(int64_t nodes, int64_t pixels) {
  return int64_t(sizeof(RowsShared)) + nodes * int64_t(sizeof(NodeRow)) +
         pixels * int64_t(sizeof(PixelRow));
}

// A row by number as a thread goes from one to the next by a fixed step, without a division.
struct RowWalk {
  int row, node, pixel;
  int step, node_step, pixel_step, pixels;

  __device__ RowWalk(int first, int by, int window_pixels)
      : row(first), node(first / window_pixels), pixel(first % window_pixels), step(by),
        node_step(by / window_pixels), pixel_step(by % window_pixels), pixels(window_pixels) {}
  __device__ void next() {
    row += step;
    node += node_step;
    pixel += pixel_step;
    if (pixel >= pixels) {
      pixel -= pixels;
      ++node;
    }
  }
};

template <class T>
__device__ inline void fill_tables(const Problem& p, RowsShared& shared, PixelRow* pixels) {
  constexpr int kElement = int(sizeof(T));
  const Unit& unit = shared.unit;
  for (int node = threadIdx.x; node < p.group_nodes(); node += kThreads) {
    const int which = node >= p.maps[0].samples;
    const Maps& maps = p.maps[which];
    const int64_t sample = which == 0 ? node : node - p.maps[0].samples;
    const NodeWindow at = NodeWindow::of(p, unit, node);
    const int64_t offset = unit.group * maps.strides[0] + sample * maps.strides[1];
    const int64_t grad = unit.group * maps.grad_strides[0] + sample * maps.grad_strides[1];
    shared.nodes[node] = {static_cast<const unsigned char*>(maps.data) + offset * kElement,
                          static_cast<unsigned char*>(maps.grad) + grad * kElement,
                          at.first_row(p), at.first_term(p)};
  }
  for (int i = threadIdx.x; i < p.window_pixels(); i += kThreads) {
    if (i >= unit.pixels()) {
      pixels[i].norms = -1;
      continue;
    }
    const int64_t row = unit.row + i / unit.columns, column = unit.column + i % unit.columns;
    for (int side = 0; side < 2; ++side) {
      const Maps& maps = p.maps[side];
      pixels[i].offset[side] = (row * maps.strides[3] + column * maps.strides[4]) * kElement;
      pixels[i].grad_offset[side] =
          (row * maps.grad_strides[3] + column * maps.grad_strides[4]) * kElement;
    }
    pixels[i].norms = norm_index(p, unit.group, 0, row * p.grid.width + column);
  }
}

// Channels of a lane of a row: a 16-byte piece as numbers, and back.
template <class T>
struct Pieces {
  static constexpr int kValues = 16 / int(sizeof(T));

  __device__ static void add(float (&sums)[kValues], float weight, const uint32_t* from) {
    const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(T) == 4) {
        sums[j] = fmaf(weight, bits_to_float(piece.words[j]), sums[j]);
      } else {
        float low, high;
        widen_pair(piece.words[j], T{}, low, high);
        sums[2 * j] = fmaf(weight, low, sums[2 * j]);
        sums[2 * j + 1] = fmaf(weight, high, sums[2 * j + 1]);
      }
    }
  }
  __device__ static Piece scaled(const float (&sums)[kValues], float factor) {
    Piece result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(T) == 4) {
        result.words[j] = float_to_bits(sums[j] * factor);
      } else {
        result.words[j] = narrow_pair(sums[2 * j] * factor, sums[2 * j + 1] * factor, T{});
      }
    }
    return result;
  }
};

// The slice of a block: which channels, where it lies in shared memory, and how lanes take it.
struct Slice {
  int words;          // of a row
  int first_channel, channels;
  uint32_t* rows;     // staged features
  uint32_t* results;  // of gradients that do not go straight to memory; else null
};

// Features of all rows; zeros of rows that nobody has to load, and of those that are lost: a NaN of
// theirs must not reach, times zero, rows of which they are no partner.
template <class T>
__device__ inline void load_slice(const Problem& p, const RowsShared& shared,
                                  const PixelRow* pixels, const Slice& slice) {
  constexpr int kValues = 16 / int(sizeof(T));
  const int pieces = slice.words / 4, rows = int(p.group_nodes()) * int(p.window_pixels());
  const bool vector = p.maps[0].vector && p.maps[1].vector;
  const bool along = vector || (p.maps[0].strides[2] == 1 && p.maps[1].strides[2] == 1);
  // Lanes share a row, or take rows beside each other, one piece after the other.
  const int lanes = along ? pieces : 1;
  const int first = threadIdx.x / lanes;
  for (int turn = 0; turn < pieces / lanes; ++turn) {
    const int piece = along ? threadIdx.x % lanes : turn;
    const int channel = slice.first_channel + piece * kValues;
#pragma unroll 2
    for (RowWalk at(first, kThreads / lanes, int(p.window_pixels())); at.row < rows; at.next()) {
      const PixelRow& pixel = pixels[at.pixel];
      const int which = at.node >= p.maps[0].samples;
      uint32_t* const to = slice.rows + at.row * slice.words + piece * 4;
      const float norm = pixel.norms < 0
                             ? INFINITY
                             : static_cast<const float*>(p.norm)[pixel.norms + at.node];
      const bool there = is_finite(norm) && norm > 0 && channel < slice.channels;
      const unsigned char* row = shared.nodes[at.node].data;
      if (there) row += pixel.offset[which];
      const T* from = reinterpret_cast<const T*>(row);
      if (vector) {
        copy_async_16(shared_words(to), from + (there ? channel : 0), there);
        continue;
      }
      union {
        Piece piece;
        T values[kValues];
      } staged = {};
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (there && channel + j < slice.channels) {
          staged.values[j] = from[(channel + j) * p.maps[which].strides[2]];
        }
      }
      *reinterpret_cast<Piece*>(to) = staged.piece;
    }
  }
  copy_async_commit();
  copy_async_wait(0);
  __syncthreads();
}

// Gradients of all rows of the slice. kPieces of a row to a lane.
template <class T, int kPieces>
__device__ inline void sum_slice(const Problem& p, const RowsShared& shared,
                                 const PixelRow* pixels, const Slice& slice) {
  constexpr int kValues = Pieces<T>::kValues;
  const int lanes = slice.words / 4 / kPieces;
  const int rows = int(p.group_nodes()) * int(p.window_pixels());
  const int lane_word = threadIdx.x % lanes * 4, far = lanes * 4;  // from a piece to the next
  const uint32_t* const own = slice.rows + lane_word;
  for (RowWalk at(threadIdx.x / lanes, kThreads / lanes, int(p.window_pixels())); at.row < rows;
       at.next()) {
    const PixelRow& pixel = pixels[at.pixel];
    if (pixel.norms < 0) continue;
    const NodeRow& node = shared.nodes[at.node];
    const auto terms = RowTerms<float>::of(p, node.first_term, node.first_row, at.pixel);
    const float norm = static_cast<const float*>(p.norm)[pixel.norms + at.node];
    float sums[kPieces][kValues] = {};
    // By fours: their loads are on their way side by side, and one by one a warp would stand still
    // for most of the time.
#pragma unroll 4
    for (const Term<float>* term = terms.at; term != terms.end; ++term) {
      const Term<float> of = *term;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        Pieces<T>::add(sums[i], of.weight, own + of.row * slice.words + i * far);
      }
    }
    const auto rest =
        Projection<float>::of(norm, terms.along, float(p.eps), terms.at != terms.end);
    const int which = at.node >= p.maps[0].samples;
    T* const grad = reinterpret_cast<T*>(node.grad + pixel.grad_offset[which]);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int word = at.row * slice.words + i * far;
      Pieces<T>::add(sums[i], -rest.self, own + word);
      const Piece piece = Pieces<T>::scaled(sums[i], rest.inverse);
      const int channel =
          slice.first_channel + (lane_word + i * far) * (4 / int(sizeof(T)));
      if (slice.results != nullptr) {
        *reinterpret_cast<Piece*>(slice.results + lane_word + word) = piece;
      } else if (channel < slice.channels) {
        *reinterpret_cast<Piece*>(grad + channel) = piece;
      }
    }
  }
}

// Gradients whose channels are apart, or which start at any address, from shared memory.
template <class T>
__device__ inline void store_slice(const Problem& p, const RowsShared& shared,
                                   const PixelRow* pixels, const Slice& slice) {
  const bool along = p.maps[0].grad_strides[2] == 1 && p.maps[1].grad_strides[2] == 1;
  const int rows = int(p.group_nodes()) * int(p.window_pixels());
  const int width = slice.words * 4 / int(sizeof(T)), left = slice.channels - slice.first_channel;
  const int channels = left < width ? left : width, lanes = along ? 32 : 1;
  for (RowWalk at(threadIdx.x / lanes, kThreads / lanes, int(p.window_pixels())); at.row < rows;
       at.next()) {
    if (pixels[at.pixel].norms < 0) continue;
    const int which = at.node >= p.maps[0].samples;
    T* const grad =
        reinterpret_cast<T*>(shared.nodes[at.node].grad + pixels[at.pixel].grad_offset[which]);
    const T* from = reinterpret_cast<const T*>(slice.results + at.row * slice.words);
    for (int c = threadIdx.x % lanes; c < channels; c += lanes) {
      grad[(slice.first_channel + c) * p.maps[which].grad_strides[2]] = from[c];
    }
  }
}

// A block for each slice of each window, window by window.
template <class T, int kPieces>
__device__ void gradient_rows(const Problem& p) {
  SALKERNELS_SHARED(memory);
  RowsShared& shared = *reinterpret_cast<RowsShared*>(memory);
  const int nodes = int(p.group_nodes()), words = int(p.tiling.slice_words);
  const int width = words * 4 / int(sizeof(T)), channels = int(p.channels);
  const int slices = (channels + width - 1) / width;
  PixelRow* const pixels = reinterpret_cast<PixelRow*>(shared.nodes + nodes);
  if (threadIdx.x == 0) shared.unit = unit_of(p, blockIdx.x / slices);
  __syncthreads();
  fill_tables<T>(p, shared, pixels);
  __syncthreads();
  uint32_t* const rows =
      reinterpret_cast<uint32_t*>(memory + rows_table_bytes(nodes, p.window_pixels()));
  const bool straight = p.maps[0].grad_vector && p.maps[1].grad_vector;
  const Slice slice = {words, int(blockIdx.x % slices) * width, channels, rows,
                       straight ? nullptr : rows + nodes * int(p.window_pixels()) * words};
  load_slice<T>(p, shared, pixels, slice);
  sum_slice<T, kPieces>(p, shared, pixels, slice);
  if (straight) return;
  __syncthreads();
  store_slice<T>(p, shared, pixels, slice);
}

}  // namespace cuda
}  // namespace salkernels
