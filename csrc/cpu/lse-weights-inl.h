// Backward of the log-sum-exp: from products to the weights that each row sums its partners with.
//
//      w(q, k) = ∂L/∂lse[q] · e^{s/τ − lse[q]} / τ        of a pixel q and a pixel k of a negative
//      W(q, k) = w(q, k) + w(k, q)                        for both roles; s is symmetric, and so is W
//      V(q)    = Σ over k of W(q, k) · x̂(k)

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#include "ahead-inl.h"
#include "match-inl.h"
#include "terms-inl.h"
#include "streamed-inl.h"
#include "lse-inl.h"
#endif

// A sample that another one is paired with, in the list of that other.
struct Partner {
  int32_t node;
  int32_t mirror;      // where the other stands in the list of this one
  bool query, key;     // whether the owner of the list is a query of the pair, or a key, or both
};

// The partners of each sample of a component, in ascending order.
//
//      begin   [ 0        2        5 ]       sample 0 has two partners, sample 1 three
//      list    [ 1, 4  |  0, 2, 5  | ...
struct Partners {
  int32_t *begin, *cursor;
  Partner* list;

  static Partners allocate(Arena& arena, const LseProblem& problem) {
    Partners partners;
    partners.begin = arena.take<int32_t>(problem.max_nodes + 1);
    partners.cursor = arena.take<int32_t>(problem.max_nodes);
    partners.list = arena.take<Partner>(2 * problem.max_edges);
    return partners;
  }

  // Edges come by first and then second sample: each list is in order as it is filled.
  void build(const LseProblem& problem, const Component& component) const {
    const Edge* edges = problem.plan.edges.data() + component.first_edge;
    for (int64_t n = 0; n < component.num_nodes; ++n) cursor[n] = 0;
    for (int64_t e = 0; e < component.num_edges; ++e) {
      ++cursor[edges[e].first];
      if (edges[e].first != edges[e].second) ++cursor[edges[e].second];
    }
    begin[0] = 0;
    for (int64_t n = 0; n < component.num_nodes; ++n) {
      begin[n + 1] = begin[n] + cursor[n];
      cursor[n] = begin[n];
    }
    for (int64_t e = 0; e < component.num_edges; ++e) {
      const auto [first, second, forward, reverse] = edges[e];
      const int32_t i = cursor[first]++;
      if (first == second) {  // a pixel and itself: a query and a key of one pair
        list[i] = {first, i, true, true};
        continue;
      }
      const int32_t j = cursor[second]++;
      list[i] = {second, j, forward >= 0, reverse >= 0};
      list[j] = {first, i, reverse >= 0, forward >= 0};
    }
  }
};

// lse of rows as queries, and ∂L/∂lse / τ. A row that is no query, has no terms or no gradient has ∞
// and 0, which make its weights 0: NaN of such a row reaches nothing.
template <class T>
struct QueryRows {
  T *shift, *scale;

  static QueryRows allocate(Arena& arena, int64_t rows) {
    return {arena.take<T>(rows), arena.take<T>(rows)};
  }
  QueryRows from(int64_t row) const { return {shift + row, scale + row}; }

  void clear(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i) {
      shift[i] = std::numeric_limits<T>::infinity();
      scale[i] = 0;
    }
  }
  // Pixels [first, first + count) of a window of one sample.
  void read(const LseProblem& problem, const Node& node, const Window& window, int64_t first,
            int64_t count) const {
    clear(0, count);
    if (node.query < 0) return;
    const int64_t plane = node.query * problem.grid.pixels();
    const T* const lse = static_cast<const T*>(problem.lse) + plane;
    const T* const grad = static_cast<const T*>(problem.grad_lse) + plane;
    for_pixel_runs(window, first, count, [&](int64_t row, int64_t column, int64_t run, int64_t at) {
      for (int64_t i = 0; i < run; ++i) {
        const int64_t place = row * problem.grid.width + column + i;
        if (lse[place] == kNothing<T> || grad[place] == 0) continue;
        shift[at + i] = lse[place];
        scale[at + i] = grad[place] / T(problem.temperature);
      }
    });
  }
};

// Makes products w, given the query of each lane; those with pixels that take no part are −∞.
template <class T>
static void to_weights(T* sims, int64_t rows, int64_t stride, int64_t lanes, T inverse_temperature,
                       const QueryRows<T>& query) {
  for (int64_t n = 0; n < lanes; n += kLanes<T>) {
    const Vec<T> shift = load<T>(query.shift + n), scale = load<T>(query.scale + n);
    for (int64_t i = 0; i < rows; ++i) {
      T* const at = sims + i * stride + n;
      store<T>(at, scale * exponential<T>(load<T>(at) * inverse_temperature - shift));
    }
  }
}

// The weights of samples [first, end) with all their partners, in one packed window.
//
//      of an entry of a list:    W(p, l), p fastest: of the sample's pixels p, and its partner's l
//
// A product of two samples that both belong to the panel is formed once, and written to both.
template <class T>
struct WeightPanel {
  static constexpr int64_t kRoom = (256 << 10) / int64_t(sizeof(T));

  T* weights;
  SimBlock<T> sims;
  QueryRows<T> lanes, others;
  WindowValid valid;
  int32_t first, end;

  static WeightPanel allocate(Arena& arena, const LseProblem& problem) {
    WeightPanel panel;
    panel.weights = arena.take<T>(most(kRoom, problem.max_weights));
    panel.sims = SimBlock<T>::allocate(arena);
    panel.lanes = QueryRows<T>::allocate(arena, kForwardStride + kLanes<T>);
    panel.others = QueryRows<T>::allocate(arena, kForwardStride + kLanes<T>);
    panel.valid = WindowValid::allocate(arena, problem, problem.work.max_window_rows);
    return panel;
  }

  // The longest panel from `from` on whose weights have room; one sample always has.
  void begin_at(int32_t from, const Partners& partners, int32_t nodes, int64_t pixels) {
    first = from;
    end = from + 1;
    const int64_t room = kRoom / (pixels * pixels);
    while (end < nodes && partners.begin[end + 1] - partners.begin[first] <= room) ++end;
  }

  const T* of(const Partners& partners, int32_t node, int64_t pixels) const {
    return weights + (partners.begin[node] - partners.begin[first]) * pixels * pixels;
  }

  void compute(const TileShape& shape, const T* unit, const Partners& partners,
               const QueryRows<T>& rows, T inverse_temperature) {
    const int64_t room = kBlock / shape.pixels;
    for (int32_t node = first; node < end; ++node) {
      const int32_t last = partners.begin[node + 1];
      for (int32_t i = partners.begin[node]; i < last;) {
        const auto is_done = [&](int32_t at) {
          return partners.list[at].node >= first && partners.list[at].node < node;
        };
        if (is_done(i)) {
          ++i;
          continue;
        }
        int32_t stop = i;
        while (stop < last && stop - i < room && !is_done(stop)) ++stop;
        batch(shape, unit, partners, node, i, stop, rows, inverse_temperature);
        i = stop;
      }
    }
  }

 private:
  // Entries [i, stop) of a node's list.
  void batch(const TileShape& shape, const T* unit, const Partners& partners, int32_t node,
             int32_t i, int32_t stop, const QueryRows<T>& rows, T inverse_temperature) {
    const int64_t pixels = shape.pixels, count = stop - i;
    const int group = row_group(pixels);
    const int64_t pitch = round_up(pixels, group);
    bool as_key = false;
    sims.columns = 0;
    sims.forward_stride = round_up(count * pitch, kLanes<T>);
    sims.reverse_stride = round_up(round_up(count * pixels, block_columns(group)), kLanes<T>);
    lanes.clear(0, sims.forward_stride);
    others.clear(0, sims.reverse_stride);
    for (int64_t j = 0; j < count; ++j) {
      const Partner& partner = partners.list[i + j];
      sims.add_key(unit + partner.node * pixels * shape.stride, pixels, shape.stride, j * pitch);
      if (partner.query) put(lanes, j * pitch, rows.from(node * pixels), pixels);
      if (partner.key) put(others, j * pixels, rows.from(partner.node * pixels), pixels);
      as_key |= partner.key;
    }
    sims.fill_up(group);
    sims.compute(group, unit + node * pixels * shape.stride, pixels, shape.stride, shape.width,
                 as_key);
    for (int64_t j = 0; j < count; ++j) {
      leave_out<T>(valid.of(partners.list[i + j].node), pixels, sims.forward + j * pitch,
                   sims.forward_stride, pitch);
    }
    to_weights<T>(sims.forward, pixels, sims.forward_stride, count * pitch, inverse_temperature,
                  lanes);
    if (as_key) {
      leave_out<T>(valid.of(node), pixels, sims.reverse, sims.reverse_stride, count * pixels);
      to_weights<T>(sims.reverse, pixels, sims.reverse_stride, count * pixels,
                    inverse_temperature, others);
    }
    for (int64_t j = 0; j < count; ++j) {
      write(partners, node, i + int32_t(j), pixels, sims.forward + j * pitch,
            as_key ? sims.reverse + j * pixels : nullptr);
    }
  }

  static void put(const QueryRows<T>& to, int64_t at, const QueryRows<T>& from, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      to.shift[at + p] = from.shift[p];
      to.scale[at + p] = from.scale[p];
    }
  }

  // W of one entry, and of its mirror if that is in the panel.
  void write(const Partners& partners, int32_t node, int32_t entry, int64_t pixels,
             const T* forward, const T* reverse) const {
    const Partner& partner = partners.list[entry];
    const int64_t area = pixels * pixels;
    T* const own = weights + (entry - partners.begin[first]) * area;
    const bool twice = partner.node > node && partner.node < end;
    T* const mirror = twice ? weights + (partner.mirror - partners.begin[first]) * area : nullptr;
    for (int64_t l = 0; l < pixels; ++l) {
      for (int64_t p = 0; p < pixels; ++p) {
        const T back = reverse == nullptr ? T(0) : reverse[p * sims.reverse_stride + l];
        const T weight = forward[l * sims.forward_stride + p] + back;
        own[l * pixels + p] = weight;
        if (twice) mirror[p * pixels + l] = weight;
      }
    }
  }
};
