// Reading features into packed rows of unit vectors, and writing gradients back.
//
// A packed row holds the channels of one pixel, in the accumulation dtype, filled up with zeros to
// whole registers. Maps of any strides are addressed in place: no copy of a whole map is made.

template <class T>
static inline int64_t packed_width(int64_t channels) {
  return round_up(channels, kLanes<T>);
}

// An odd number of registers: rows at a power of two apart would fall on the same cache sets.
template <class T>
static inline int64_t packed_stride(int64_t channels) {
  return packed_width<T>(channels) | kLanes<T>;
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
    for (int64_t k = 0; k < pixels; ++k) {
      const bool absent = valid != nullptr && valid[r * width + i + k] == 0;
      store<T>(to + place.column_offset[i + k], absent ? Vec<T>{} : block[k]);
    }
  };
  for (int64_t c = 0; c < patch.channels; c += W) {
    const int64_t channels = least(W, patch.channels - c);
    for (int64_t r = 0; r < patch.rows; ++r) {
      for (int64_t done = 0; done < patch.columns; done += W) {
        const int64_t i = block_start(done, patch.columns, W);
        const int64_t pixels = least(W, patch.columns - i);
        const In* from = map + c * s.channel + r * s.row + i * s.column;
        Vec<T> block[W];
        if (channels == W && s.column == 1) {
          for (int64_t k = 0; k < W; ++k) {
            __builtin_prefetch(from + (k + W) * s.channel);
            block[k] = pixels == W ? Convert<T, In>::load_vec(from + k * s.channel)
                                   : load_part<T, In>(from + k * s.channel, pixels);
          }
          put_pixels_of_block(block, pixels, r, i, c);
          continue;
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
      }
    }
  }
}

// The reverse: packed rows into the gradient map.
template <class T, class In>
static void unpack_patch(const Node& node, const Patch& patch, const T* packed,
                         const PackedPlace& place) {
  const MapStrides& s = node.grad_strides;
  In* map = static_cast<In*>(node.grad) + patch.channel * s.channel + patch.row * s.row +
            patch.column * s.column;
  constexpr int W = kLanes<T>;
  if (s.channel == 1) {
    for (int64_t r = 0; r < patch.rows; ++r) {
      for (int64_t i = 0; i < patch.columns; ++i) {
        const T* from = packed + r * place.row_step + place.column_offset[i];
        In* to = map + r * s.row + i * s.column;
        int64_t c = 0;
        for (; c + W <= patch.channels; c += W) Convert<T, In>::store_vec(to + c, load<T>(from + c));
        if (c < patch.channels) store_part<T, In>(to + c, load<T>(from + c), patch.channels - c);
      }
    }
    return;
  }
  for (int64_t c = 0; c < patch.channels; c += W) {
    const int64_t channels = least(W, patch.channels - c);
    for (int64_t r = 0; r < patch.rows; ++r) {
      for (int64_t done = 0; done < patch.columns; done += W) {
        const int64_t i = block_start(done, patch.columns, W);
        const int64_t pixels = least(W, patch.columns - i);
        const T* from = packed + r * place.row_step + c;
        Vec<T> block[W];
        for (int64_t k = 0; k < W; ++k) {
          block[k] = load<T>(from + place.column_offset[i + least(k, pixels - 1)]);
        }
        transpose<T>(block);
        In* to = map + c * s.channel + r * s.row + i * s.column;
        if (channels == W && s.column == 1) {
          for (int64_t k = 0; k < W; ++k) {
            __builtin_prefetch(to + (k + W) * s.channel, 1);
            if (pixels == W) {
              Convert<T, In>::store_vec(to + k * s.channel, block[k]);
            } else {
              store_part<T, In>(to + k * s.channel, block[k], pixels);
            }
          }
          continue;
        }
        for (int64_t k = 0; k < channels; ++k) {
          if (s.column == 1) {
            store_part<T, In>(to + k * s.channel, block[k], pixels);
          } else {
            store_strided<T, In>(to + k * s.channel, block[k], s.column, pixels);
          }
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

// Scales a row to a unit vector as x / max(norm, eps) does.
template <class T>
static inline void scale_to_unit(T* row, int64_t width, T norm, T eps) {
  const T divisor = norm < eps ? eps : norm;  // NaN stays NaN
  const T factor = 1 / divisor;
  // The inverse of a subnormal number overflows, where the quotient need not.
  const bool divide = factor > 1 / (sizeof(T) == 4 ? T(1.2e-38) : T(2.3e-308));
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    const Vec<T> x = load<T>(row + c);
    store<T>(row + c, divide ? x / divisor : x * factor);
  }
}

// Turns packed rows into unit vectors and keeps their norms. A row whose squares have no finite sum
// becomes NaN: x / inf would be 0, without a word. `poison` is 0, but NaN for such a row: its
// gradient is NaN wherever a pair touches it.
template <class T>
static void normalise(T* rows, int64_t count, int64_t stride, int64_t width, T eps, T* norms,
                      T* poison) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    T* row = rows + i * stride;
    Vec<T> sum[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= width; c += 4 * W) {
      for (int k = 0; k < 4; ++k) {
        const Vec<T> x = load<T>(row + c + k * W);
        sum[k] += x * x;
      }
    }
    for (; c < width; c += W) {
      const Vec<T> x = load<T>(row + c);
      sum[0] += x * x;
    }
    const T square = total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    const T root = sizeof(T) == 4 ? T(__builtin_sqrtf(float(square))) : T(__builtin_sqrt(square));
    const T poisoned = root - root;  // 0, or NaN
    const T norm = root + poisoned;
    scale_to_unit<T>(row, width, norm, eps);
    if (norms == nullptr) continue;
    norms[i] = norm;
    poison[i] = poisoned;
  }
}

// 1 / norm as the gradient needs it: 0 where norm <= eps, NaN where it is NaN.
template <class T>
static inline T inverse_for_gradient(T norm, T eps) {
  return norm <= eps ? T(0) : 1 / norm;
}

// Bump allocation in the caller's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
};

// What a tile needs to know of its component and extent.
struct TileShape {
  const Component* component;
  const Node* nodes;
  Window window;  // the first one
  int64_t pixels, rows, stride, width, num_windows;

  template <class T>
  static TileShape of(const Problem& problem, const Tile& tile) {
    TileShape shape;
    shape.component = &problem.plan.components[tile.component];
    shape.nodes = &problem.plan.nodes[shape.component->first_node];
    shape.window = problem.grid.window(tile.strip, tile.first_window);
    shape.pixels = shape.window.pixels();
    shape.rows = shape.component->num_nodes * shape.pixels;
    shape.stride = packed_stride<T>(problem.channels);
    shape.width = packed_width<T>(problem.channels);
    shape.num_windows = tile.num_windows;
    return shape;
  }

  Window window_at(int64_t t) const {
    Window w = window;
    w.column += t * window.columns;
    return w;
  }
  Patch patch(int64_t channels) const {
    return {window.row, window.column, window.rows, num_windows * window.columns, 0, channels};
  }
  // Packed rows are ordered by window, node, pixel.
  PackedPlace place(int64_t* column_offset) const {
    for (int64_t i = 0; i < num_windows * window.columns; ++i) {
      column_offset[i] = (i / window.columns * rows + i % window.columns) * stride;
    }
    return {window.columns * stride, column_offset};
  }
};
