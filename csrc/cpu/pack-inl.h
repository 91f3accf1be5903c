// Reading features into packed rows of unit vectors, and writing gradients back.
//
// A packed row holds the channels of one pixel, in the accumulation dtype, filled up with zeros to
// whole registers. Maps of any strides are addressed in place: no copy of a whole map is made.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#endif

template <class T>
static inline int64_t packed_width(int64_t channels) {
  return round_up(channels, kLanes<T>);
}

// Elements of a cache line.
template <class T>
constexpr int64_t kLine = kLineBytes / int64_t(sizeof(T));

// Whole cache lines, of an odd number: rows at a power of two apart would fall on the same sets.
template <class T>
static inline int64_t packed_stride(int64_t channels) {
  return round_up(channels, kLine<T>) | kLine<T>;
}

// A rectangle of pixels and the channels to be taken from it.
struct Patch {
  int64_t row, column, rows, columns;
  int64_t channel, channels;
};

// Where a patch lies in the pack: pixel (r, i) starts at r * row_step + column_offset[i].
struct PackedPlace {
  int64_t row_step;
  const int64_t* column_offset;
};

// The last block of a row overlaps the one before it, rather than being a part of a register.
static inline int64_t block_start(int64_t done, int64_t columns, int64_t lanes) {
  return done + lanes > columns && columns >= lanes ? columns - lanes : done;
}

// Calls use(r, i, pixels, c) for each block of W pixels by W channels of a patch: a block is
// transposed in registers, by shuffles between pairs of them.
//
//      map, one channel a row               packed, one pixel a row
//        c    p p p p | p p p p | ...         p    c c c c | next channels
//        c+1  p p p p | p p p p |      ->     p+1  c c c c |
//        ...  a block | next one,             ...  a block |
//                       of the same lines
//
// Blocks follow each other along the strip: so each line of the map is read once. To finish packed
// lines instead, two blocks of channels at a time, took 8 % longer: twice as many planes are open.
template <class T, class Use>
static inline void for_each_block(const Patch& patch, const Use& use) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < patch.channels; c += W) {
    for (int64_t r = 0; r < patch.rows; ++r) {
      for (int64_t done = 0; done < patch.columns; done += W) {
        const int64_t i = block_start(done, patch.columns, W);
        use(r, i, least(W, patch.columns - i), c);
      }
    }
  }
}

// Pixels that take no part become zeros; channels-last they are not read.
template <class T, class In>
static void pack_patch(const Node& node, const Patch& patch, int64_t width, T* out,
                       const PackedPlace& place) {
  const MapStrides& s = node.strides;
  const uint8_t* const valid =
      node.valid == nullptr ? nullptr : node.valid + patch.row * width + patch.column;
  const In* map = static_cast<const In*>(node.map) + patch.channel * s.channel +
                  patch.row * s.row + patch.column * s.column;
  constexpr int W = kLanes<T>;
  if (s.channel == 1) {
    for (int64_t r = 0; r < patch.rows; ++r) {
      for (int64_t i = 0; i < patch.columns; ++i) {
        const In* from = map + r * s.row + i * s.column;
        T* to = out + r * place.row_step + place.column_offset[i];
        int64_t c = 0;
        if (valid != nullptr && valid[r * width + i] == 0) {
          for (; c < patch.channels; c += W) store<T>(to + c, Vec<T>{});
          continue;
        }
        for (; c + W <= patch.channels; c += W) store<T>(to + c, Convert<T, In>::load_vec(from + c));
        if (c < patch.channels) store<T>(to + c, load_part<T, In>(from + c, patch.channels - c));
      }
    }
    return;
  }
  const auto put_pixels_of_block = [&](Vec<T>(&block)[W], int64_t pixels, int64_t r, int64_t i,
                                       int64_t c) {
    transpose<T>(block);
    T* to = out + r * place.row_step + c;
    if (pixels == W && valid == nullptr) {
      const int64_t* offset = place.column_offset + i;
      SALKERNELS_UNROLL
      for (int k = 0; k < W; ++k) store<T>(to + offset[k], block[k]);
      return;
    }
    for (int64_t k = 0; k < pixels; ++k) {
      const bool absent = valid != nullptr && valid[r * width + i + k] == 0;
      store<T>(to + place.column_offset[i + k], absent ? Vec<T>{} : block[k]);
    }
  };
  const auto pack_block = [&](int64_t r, int64_t i, int64_t pixels, int64_t c) {
    const int64_t channels = least(W, patch.channels - c);
    const In* from = map + c * s.channel + r * s.row + i * s.column;
    Vec<T> block[W];
    if (channels == W && pixels == W && s.column == 1) {
      const int64_t step = s.channel, next = W * step;
      SALKERNELS_UNROLL
      for (int k = 0; k < W; ++k) {
        __builtin_prefetch(from + k * step + next);
        block[k] = Convert<T, In>::load_vec(from + k * step);
      }
      put_pixels_of_block(block, W, r, i, c);
      return;
    }
    for (int64_t k = 0; k < W; ++k) {
      if (k >= channels) {
        block[k] = Vec<T>{};
      } else if (s.column == 1) {
        block[k] = pixels == W ? Convert<T, In>::load_vec(from + k * s.channel)
                               : load_part<T, In>(from + k * s.channel, pixels);
      } else {
        block[k] = load_strided<T, In>(from + k * s.channel, s.column, pixels);
      }
    }
    put_pixels_of_block(block, pixels, r, i, c);
  };
  for_each_block<T>(patch, pack_block);
}

// A few channels of some pixels of a patch, transposed, on their way to the map: there each channel
// is one run of bytes, or one for each row of pixels, and can be written around the caches.
template <class T, class In>
struct Stage {
  static constexpr int64_t kPixels = 512;
  static constexpr int64_t kPitch = kPixels + kLine<In>;  // no power of two

  alignas(kLineBytes) In values[kLanes<T> * kPitch];

  // Pixels [column, column + columns) of rows [row, row + rows), W channels from `channel`.
  void fill(const T* packed, const PackedPlace& place, int64_t row, int64_t rows, int64_t column,
            int64_t columns, int64_t channel) {
    constexpr int W = kLanes<T>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = packed + (row + r) * place.row_step + channel;
      for (int64_t done = 0; done < columns; done += W) {
        const int64_t i = block_start(done, columns, W), pixels = least(W, columns - i);
        const int64_t* offset = place.column_offset + column + i;
        In* to = values + r * columns + i;
        Vec<T> block[W];
        if (pixels == W) {
          SALKERNELS_UNROLL
          for (int k = 0; k < W; ++k) block[k] = load<T>(from + offset[k]);
          transpose<T>(block);
          SALKERNELS_UNROLL
          for (int k = 0; k < W; ++k) Convert<T, In>::store_vec(to + k * kPitch, block[k]);
          continue;
        }
        for (int64_t k = 0; k < W; ++k) block[k] = load<T>(from + offset[least(k, pixels - 1)]);
        transpose<T>(block);
        for (int64_t k = 0; k < W; ++k) store_part<T, In>(to + k * kPitch, block[k], pixels);
      }
    }
  }

  static void put(In* to, const In* from, int64_t count, bool around) {
    const int64_t bytes = count * int64_t(sizeof(In));
    if (around) {
      stream_copy(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), bytes);
    } else {
      __builtin_memcpy(to, from, size_t(bytes));
    }
  }
  // To the map, from the address of the first pixel in the first channel.
  void write(In* map, const MapStrides& s, int64_t rows, int64_t columns, int64_t channels,
             bool around) const {
    const bool joined = s.row == columns;
    for (int64_t k = 0; k < channels; ++k) {
      for (int64_t r = 0; r < (joined ? 1 : rows); ++r) {
        put(map + k * s.channel + r * s.row, values + k * kPitch + r * columns,
            joined ? rows * columns : columns, around);
      }
    }
  }
};

// Packed rows to a map whose rows of pixels are contiguous.
template <class T, class In>
static void unpack_by_channel(const MapStrides& s, In* map, const Patch& patch, const T* packed,
                              const PackedPlace& place, bool around) {
  using S = Stage<T, In>;
  S stage;
  constexpr int W = kLanes<T>;
  const int64_t columns = least(patch.columns, S::kPixels), rows = S::kPixels / columns;
  for (int64_t c = 0; c < patch.channels; c += W) {
    for (int64_t r = 0; r < patch.rows; r += rows) {
      for (int64_t i = 0; i < patch.columns; i += columns) {
        const int64_t some_rows = least(rows, patch.rows - r);
        const int64_t some_columns = least(columns, patch.columns - i);
        stage.fill(packed, place, r, some_rows, i, some_columns, c);
        stage.write(map + c * s.channel + r * s.row + i, s, some_rows, some_columns,
                    least(W, patch.channels - c), around);
      }
    }
  }
}

// The reverse of `pack_patch`: packed rows into the gradient map. `around`: around the caches.
template <class T, class In>
static void unpack_patch(const Node& node, const Patch& patch, const T* packed,
                         const PackedPlace& place, bool around) {
  const MapStrides& s = node.grad_strides;
  In* map = static_cast<In*>(node.grad) + patch.channel * s.channel + patch.row * s.row +
            patch.column * s.column;
  constexpr int W = kLanes<T>;
  if (s.channel != 1 && s.column == 1) {
    return unpack_by_channel<T, In>(s, map, patch, packed, place, around);
  }
  for (int64_t r = 0; r < patch.rows; ++r) {
    for (int64_t i = 0; i < patch.columns; ++i) {
      const T* from = packed + r * place.row_step + place.column_offset[i];
      In* to = map + r * s.row + i * s.column;
      for (int64_t c = 0; c < patch.channels; c += W) {
        const int64_t channels = least(W, patch.channels - c);
        const Vec<T> v = load<T>(from + c);
        if (s.channel != 1) {
          store_strided<T, In>(to + c * s.channel, v, s.channel, channels);
        } else if (channels == W) {
          Convert<T, In>::store_vec(to + c, v);
        } else {
          store_part<T, In>(to + c, v, channels);
        }
      }
    }
  }
}

// Pixels [first, first + count) of a window, in its row-major order, to consecutive packed rows.
// `Move` is pack_patch or unpack_patch.
template <class Move>
static void for_pixel_runs(const Window& window, int64_t first, int64_t count, const Move& move) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / window.columns, column = (first + done) % window.columns;
    const int64_t run = least(window.columns - column, count - done);
    move(window.row + row, window.column + column, run, done);
    done += run;
  }
}

// What makes a unit vector of a row: x / max(norm, eps). A row whose squares have no finite sum
// becomes NaN: x / inf would be 0, without a word. `poison` is 0, but NaN for such a row: its
// gradient is NaN wherever a pair touches it.
template <class T>
struct UnitScale {
  T norm, poison, divisor, factor;
  bool divide;  // the inverse of a subnormal number overflows, where the quotient need not

  static UnitScale of_norm(T norm, T eps) {
    UnitScale scale;
    scale.norm = norm;
    scale.poison = 0;
    scale.divisor = norm < eps ? eps : norm;  // NaN stays NaN
    scale.factor = 1 / scale.divisor;
    scale.divide = scale.factor > 1 / (sizeof(T) == 4 ? T(1.2e-38) : T(2.3e-308));
    return scale;
  }
  static UnitScale of_square(T square, T eps) {
    const T root = sizeof(T) == 4 ? T(__builtin_sqrtf(float(square))) : T(__builtin_sqrt(square));
    const T poison = root - root;  // 0, or NaN
    UnitScale scale = of_norm(root + poison, eps);
    scale.poison = poison;
    return scale;
  }
  Vec<T> operator()(const Vec<T>& x) const { return divide ? x / divisor : x * factor; }
};

// The sum of squares of `channels` numbers, in storage or packed:
//
//      channels      0..W-1   W..2W-1   2W..3W-1   3W..4W-1   4W..5W-1   ...
//      added to      sum[0]   sum[1]    sum[2]     sum[3]     sum[0]     ...
//      result        lanes of (sum[0] + sum[1]) + (sum[2] + sum[3]), from the first to the last
//
// Four sums, since an addition waits about four cycles for the one before it. The order is the same
// for either source, and that is what gives both layouts of a map the same bits.
template <class T, class In>
static inline T square_sum(const In* from, int64_t channels) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W) {
    for (int k = 0; k < 4; ++k) {
      const Vec<T> x = Convert<T, In>::load_vec(from + c + k * W);
      sum[k] += x * x;
    }
  }
  for (int k = 0; c < channels; c += W, ++k) {
    const Vec<T> x = c + W <= channels ? Convert<T, In>::load_vec(from + c)
                                       : load_part<T, In>(from + c, channels - c);
    sum[k] += x * x;
  }
  return total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
static inline void scale_to_unit(T* row, int64_t width, const UnitScale<T>& scale) {
  for (int64_t c = 0; c < width; c += kLanes<T>) store<T>(row + c, scale(load<T>(row + c)));
}

// Turns packed rows into unit vectors and keeps their norms.
template <class T>
static void normalise(T* rows, int64_t count, int64_t stride, int64_t width, T eps, T* norms,
                      T* poison) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = rows + i * stride;
    const auto scale = UnitScale<T>::of_square(square_sum<T, T>(row, width), eps);
    scale_to_unit<T>(row, width, scale);
    if (norms == nullptr) continue;
    norms[i] = scale.norm;
    poison[i] = scale.poison;
  }
}

// Channels-last: packs one pixel as a unit vector. It is read twice, the second time from the
// first-level cache, and written once.
template <class T, class In>
static inline UnitScale<T> pack_unit_pixel(const In* from, int64_t channels, T* to, T eps) {
  constexpr int W = kLanes<T>;
  const auto scale = UnitScale<T>::of_square(square_sum<T, In>(from, channels), eps);
  int64_t c = 0;
  for (; c + W <= channels; c += W) store<T>(to + c, scale(Convert<T, In>::load_vec(from + c)));
  if (c < channels) store<T>(to + c, scale(load_part<T, In>(from + c, channels - c)));
  return scale;
}

// 1 / norm as the gradient needs it: 0 where norm <= eps, NaN where it is NaN.
template <class T>
static inline T inverse_for_gradient(T norm, T eps) {
  return norm <= eps ? T(0) : 1 / norm;
}
