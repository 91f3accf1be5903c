// Backward: V of each row is a short list of partner rows and weights, gathered and summed in
// registers, so that each gradient is written once and no two threads share one.

// Calls use(p, pixel of the match, m, ∂L/∂m) for each pixel of a window of one pair that has a
// match. Where m is NaN, so is ∂L/∂m, whatever was made of the maximum.
template <class T, class I, class Use>
static inline void for_matches_as(const Problem& problem, int64_t pair, const Window& window,
                                  const Use& use) {
  const Grid& grid = problem.grid;
  const int64_t corner = pair * grid.pixels() + window.row * grid.width + window.column;
  const T* max_sim = static_cast<const T*>(problem.max_sim) + corner;
  const T* grad_sim = static_cast<const T*>(problem.grad_sim) + corner;
  const I* argmax = static_cast<const I*>(problem.argmax) + corner;
  const int64_t last = window.pixels() - 1;
  int64_t p = 0;
  for (int64_t row = 0; row < window.rows; ++row) {
    for (int64_t column = 0; column < window.columns; ++column, ++p) {
      const int64_t at = row * grid.width + column;
      const T m = max_sim[at];
      if (argmax[at] == I(-1)) continue;
      // Clamped, since nothing else keeps a foreign argmax from pointing out of the window.
      const int64_t l = grid.pixel_of_offset(argmax[at], window.columns);
      use(p, l < 0 ? 0 : least(l, last), m, m == m ? grad_sim[at] : m);
    }
  }
}

template <class T, class Use>
static inline void for_matches(const Problem& problem, int64_t pair, const Window& window,
                               const Use& use) {
  if (pair < 0) return;
  if (problem.wide_index) {
    for_matches_as<T, int32_t>(problem, pair, window, use);
  } else {
    for_matches_as<T, uint8_t>(problem, pair, window, use);
  }
}

template <class T>
struct Term {
  int32_t offset;  // of the partner's row in the packed window
  T weight;
};

// For each row of a packed window, the rows that V sums over, in an order that follows from the
// pairs alone; and x̂·V, which the kept maxima give without another product.
template <class T>
struct TermLists {
  int32_t* begin;  // (rows + 1)
  int32_t* cursor;
  T* along;  // x̂·V
  Term<T>* terms;
  // The matches of all pairs in the window, as read: two passes over them build the lists.
  int32_t *query_row, *key_row;
  T* weight;

  static TermLists allocate(Arena& arena, int64_t rows, int64_t matches) {
    TermLists lists;
    lists.begin = arena.take<int32_t>(rows + 1);
    lists.cursor = arena.take<int32_t>(rows);
    lists.along = arena.take<T>(rows);
    lists.terms = arena.take<Term<T>>(2 * matches);
    lists.query_row = arena.take<int32_t>(matches);
    lists.key_row = arena.take<int32_t>(matches);
    lists.weight = arena.take<T>(matches);
    return lists;
  }

  void build(const Problem& problem, const TileShape& shape, const Window& window) {
    const Edge* edges = &problem.plan.edges[shape.component->first_edge];
    for (int64_t r = 0; r < shape.rows; ++r) {
      cursor[r] = 0;
      along[r] = 0;
    }
    int64_t count = 0;
    for (int64_t e = 0; e < shape.component->num_edges; ++e) {
      const int64_t first = edges[e].first * shape.pixels, second = edges[e].second * shape.pixels;
      auto collect = [&](int64_t query, int64_t key) {
        return [&, query, key](int64_t p, int64_t l, T max_sim, T gradient) {
          query_row[count] = int32_t(query + p);
          key_row[count] = int32_t(key + l);
          weight[count++] = gradient;
          ++cursor[query + p];
          ++cursor[key + l];
          along[query + p] += gradient * max_sim;
          along[key + l] += gradient * max_sim;
        };
      };
      for_matches<T>(problem, edges[e].forward, window, collect(first, second));
      for_matches<T>(problem, edges[e].reverse, window, collect(second, first));
    }
    begin[0] = 0;
    for (int64_t r = 0; r < shape.rows; ++r) {
      begin[r + 1] = begin[r] + cursor[r];
      cursor[r] = begin[r];
    }
    const int32_t stride = int32_t(shape.stride);
    for (int64_t i = 0; i < count; ++i) {
      terms[cursor[query_row[i]]++] = {key_row[i] * stride, weight[i]};
      terms[cursor[key_row[i]]++] = {query_row[i] * stride, weight[i]};
    }
  }
};

// dx = (V − (x̂·V) x̂) / ‖x‖ of `Registers` registers of one row; a single one may be the last, of
// which only `count` channels exist.
template <class T, class Out, int Registers>
static inline void gradient_row(const Term<T>* terms, const Term<T>* end, const T* unit,
                                const T* self, T along, T inv_norm, Out* out, int64_t count) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[Registers] = {};
  for (; terms != end; ++terms) {
    const T* partner = unit + terms->offset;
    const Vec<T> weight = splat<T>(terms->weight);
    for (int k = 0; k < Registers; ++k) sum[k] += weight * load<T>(partner + k * W);
  }
  for (int k = 0; k < Registers; ++k) {
    sum[k] = (sum[k] - along * load<T>(self + k * W)) * inv_norm;
  }
  if (Registers == 1 && count < W) {
    store_part<T, Out>(out, sum[0], count);
  } else {
    for (int k = 0; k < Registers; ++k) Convert<T, Out>::store_vec(out + k * W, sum[k]);
  }
}

// The gradients of a packed window, to wherever its rows are to go.
template <class T, class Out>
struct GradientRows {
  Out** out;  // (rows)
  int64_t rows, stride, channels;

  template <int Registers>
  void columns(const TermLists<T>& lists, const T* unit, const T* inv_norm, int64_t c,
               Ahead& ahead) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Term<T>*terms = lists.terms + lists.begin[r], *end = lists.terms + lists.begin[r + 1];
      gradient_row<T, Out, Registers>(terms, end, unit + c, unit + r * stride + c, lists.along[r],
                                      inv_norm[r], out[r] + c, channels - c);
      ahead.step();
    }
  }

  // A few channels of all rows at a time: they stay in the first-level cache.
  void all(const TermLists<T>& lists, const T* unit, const T* inv_norm, Ahead& ahead) const {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W) columns<4>(lists, unit, inv_norm, c, ahead);
    for (; c < channels; c += W) columns<1>(lists, unit, inv_norm, c, ahead);
  }
};

// Rows of the map itself, in the order of packed rows.
template <class Out>
static void rows_of_map(const TileShape& shape, const Window& window, Out** out) {
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    const MapStrides& strides = shape.nodes[s].grad_strides;
    Out* map = static_cast<Out*>(shape.nodes[s].grad);
    for (int64_t row = window.row; row < window.row + window.rows; ++row) {
      for (int64_t column = window.column; column < window.column + window.columns; ++column) {
        *out++ = map + row * strides.row + column * strides.column;
      }
    }
  }
}

// NaN reaches the gradient of a row in a pair; a row in none has no gradient, and is no partner.
template <class T>
static void apply_poison(TermLists<T>& lists, const TileShape& shape, const T* poison, T* unit,
                         T* inv_norm) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (lists.begin[r + 1] > lists.begin[r]) {
      lists.along[r] += poison[r];
    } else if (poison[r] != 0) {
      T* row = unit + r * shape.stride;
      for (int64_t c = 0; c < shape.stride; ++c) row[c] = 0;
      inv_norm[r] = 0;
    }
  }
}

template <class T, class In>
static int64_t gradient_tile(const Problem& problem, const Tile* tile, char* scratch) {
  const int64_t row_stride = packed_stride<T>(problem.channels);
  Arena arena{scratch};
  int64_t* column_offset = arena.take<int64_t>(problem.grid.width);
  // One window more than the tile: see below.
  T* pack = arena.take<T>((problem.work.max_tile_rows + problem.work.max_window_rows) * row_stride);
  T* inv_norm = arena.take<T>(problem.work.max_tile_rows);
  T* poison = arena.take<T>(problem.work.max_tile_rows);
  void** out = arena.take<void*>(problem.work.max_window_rows);
  TermLists<T> lists = TermLists<T>::allocate(arena, problem.work.max_window_rows,
                                              problem.work.max_window_matches);
  if (scratch == nullptr) return arena.used;

  const TileShape shape = TileShape::of<T>(problem, *tile);
  const int64_t window_size = shape.rows * shape.stride;
  const int64_t rows = shape.num_windows * shape.rows;
  const T eps = T(problem.eps);
  // Channels-last, gradients go straight to the map. Else a window's take the place of the window
  // before it, which nothing needs any more, and then all go to the map together.
  T* unit = pack + window_size;
  pack_tile<T, In>(problem, shape, unit, column_offset, inv_norm, poison);
  for (int64_t r = 0; r < rows; ++r) inv_norm[r] = inverse_for_gradient<T>(inv_norm[r], eps);
  const int64_t blocks = (shape.width / kLanes<T> + 3) / 4;
  Ahead ahead = Ahead::of<T, In>(problem, tile, rows * blocks);
  const bool direct = shape.component->grads_channels_last;

  for (int64_t t = 0; t < shape.num_windows; ++t) {
    T *from = unit + t * window_size, *inv = inv_norm + t * shape.rows;
    lists.build(problem, shape, shape.window_at(t));
    apply_poison<T>(lists, shape, poison + t * shape.rows, from, inv);
    if (direct) {
      In** to = reinterpret_cast<In**>(out);
      rows_of_map<In>(shape, shape.window_at(t), to);
      const GradientRows<T, In> gradients{to, shape.rows, shape.stride, problem.channels};
      gradients.all(lists, from, inv, ahead);
    } else {
      T** to = reinterpret_cast<T**>(out);
      for (int64_t r = 0; r < shape.rows; ++r) to[r] = pack + t * window_size + r * shape.stride;
      const GradientRows<T, T> gradients{to, shape.rows, shape.stride, shape.width};
      gradients.all(lists, from, inv, ahead);
    }
  }
  if (direct) return arena.used;
  const PackedPlace place = shape.place(column_offset);
  const Patch patch = shape.patch(problem.channels);
  for (int64_t s = 0; s < shape.component->num_nodes; ++s) {
    unpack_patch<T, In>(shape.nodes[s], patch, pack + s * shape.pixels * shape.stride, place);
  }
  return arena.used;
}

// Pixels are numbered window after window here, so that a window's norms are contiguous.
static inline int64_t window_start(const Grid& grid, const Window& window) {
  return window.row * grid.width + window.column * window.rows;
}

template <class T, class In>
static int64_t norms_streamed(const Problem& problem, const StreamedNorms* item, char* scratch) {
  const int64_t stride = packed_stride<T>(problem.channels);
  Arena arena{scratch};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* rows = arena.take<T>(kBlock * stride);
  if (scratch == nullptr) return arena.used;
  const Window window = problem.grid.window(item->strip, item->window);
  const int64_t start = item->node * problem.grid.pixels() + window_start(problem.grid, window);
  fill_consecutive(consecutive, problem.grid.width, stride);
  for (int64_t p = item->first_row; p < item->first_row + item->num_rows; p += kBlock) {
    const int64_t count = least(kBlock, item->first_row + item->num_rows - p);
    pack_pixels<T, In>(problem, problem.plan.nodes[item->node], window, p, count, rows,
                       consecutive, static_cast<T*>(problem.norms) + start + p,
                       static_cast<T*>(problem.poison) + start + p);
  }
  return arena.used;
}

// Some channels of one sample's gradient in a large window. V is a sum over channels of nothing:
// given the norms, channels are independent, so a whole window of a few of them fits the cache.
template <class T, class In>
static int64_t gradient_streamed(const Problem& problem, const StreamedGradient* item,
                                 char* scratch) {
  constexpr int W = kLanes<T>;
  const int64_t stride = packed_stride<T>(problem.work.max_streamed_channels);
  Arena arena{scratch};
  int64_t* consecutive = arena.take<int64_t>(problem.grid.width);
  T* total_grad = arena.take<T>(problem.work.max_window_pixels * stride);  // V
  T* unit = arena.take<T>(problem.work.max_window_pixels * stride);
  T* along = arena.take<T>(problem.work.max_window_pixels);
  uint8_t* touched = arena.take<uint8_t>(problem.work.max_window_pixels);  // by some pair
  if (scratch == nullptr) return arena.used;

  const Component& component = problem.plan.components[item->component];
  const Node* nodes = &problem.plan.nodes[component.first_node];
  const Window window = problem.grid.window(item->strip, item->window);
  const int64_t pixels = window.pixels(), width = packed_width<T>(item->num_channels);
  const T eps = T(problem.eps);
  fill_consecutive(consecutive, problem.grid.width, stride);
  auto table = [&](void* values, int64_t node) {
    return static_cast<T*>(values) + (component.first_node + node) * problem.grid.pixels() +
           window_start(problem.grid, window);
  };
  auto load_unit = [&](int64_t node) {
    for_pixel_runs(window, 0, pixels, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
      pack_patch<T, In>(nodes[node],
                        {row, column, 1, run, item->first_channel, item->num_channels},
                        problem.grid.width, unit + at * stride, {0, consecutive});
    });
    const T* norms = table(problem.norms, node);
    for (int64_t p = 0; p < pixels; ++p) scale_to_unit<T>(unit + p * stride, width, norms[p], eps);
  };
  for (int64_t i = 0; i < pixels * stride; ++i) total_grad[i] = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    along[p] = 0;
    touched[p] = 0;
  }
  // Adds weight times the partner's row to a row of this sample.
  auto add = [&](int64_t own, int64_t partner, T max_sim, T gradient) {
    along[own] += gradient * max_sim;
    touched[own] = 1;
    const Vec<T> weight = splat<T>(gradient);
    T* to = total_grad + own * stride;
    const T* from = unit + partner * stride;
    for (int64_t c = 0; c < width; c += W) store<T>(to + c, load<T>(to + c) + weight * load<T>(from + c));
  };
  auto as_query = [&](int64_t p, int64_t l, T max_sim, T gradient) { add(p, l, max_sim, gradient); };
  auto as_key = [&](int64_t p, int64_t l, T max_sim, T gradient) { add(l, p, max_sim, gradient); };

  const Edge* edges = &problem.plan.edges[component.first_edge];
  for (int64_t e = 0; e < component.num_edges; ++e) {
    const Edge& edge = edges[e];
    if (edge.first != item->node && edge.second != item->node) continue;
    const bool is_first = edge.first == item->node;
    load_unit(is_first ? edge.second : edge.first);
    if (edge.first == edge.second) {
      for_matches<T>(problem, edge.forward, window,
                     [&](int64_t p, int64_t l, T max_sim, T gradient) {
                       as_query(p, l, max_sim, gradient);
                       as_key(p, l, max_sim, gradient);
                     });
    } else if (is_first) {
      for_matches<T>(problem, edge.forward, window, as_query);
      for_matches<T>(problem, edge.reverse, window, as_key);
    } else {
      for_matches<T>(problem, edge.forward, window, as_key);
      for_matches<T>(problem, edge.reverse, window, as_query);
    }
  }

  load_unit(item->node);
  const T *norms = table(problem.norms, item->node), *poison = table(problem.poison, item->node);
  for (int64_t p = 0; p < pixels; ++p) {
    if (!touched[p]) continue;  // V is 0, and so is the gradient, be the features NaN
    const T inv_norm = inverse_for_gradient<T>(norms[p], eps), part = along[p] + poison[p];
    T* to = total_grad + p * stride;
    const T* self = unit + p * stride;
    for (int64_t c = 0; c < width; c += W) {
      store<T>(to + c, (load<T>(to + c) - part * load<T>(self + c)) * inv_norm);
    }
  }
  for_pixel_runs(window, 0, pixels, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
    unpack_patch<T, In>(nodes[item->node],
                        {row, column, 1, run, item->first_channel, item->num_channels},
                        total_grad + at * stride, {0, consecutive});
  });
  return arena.used;
}
