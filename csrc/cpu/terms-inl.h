// From matches to terms: which rows, times which weights, each row of the gradient is the sum of.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#endif

// A match as the lists of a window need it.
template <class T>
struct Match {
  T weight, max_sim;  // ∂L/∂m and m
  int32_t key;        // the pixel of the match, -1: none
};

// The match of one pixel of a map. Where m is NaN, so is ∂L/∂m, whatever was made of the maximum.
template <class T, class I>
static inline Match<T> match_at(const Problem& problem, int64_t at, const Window& window) {
  const T m = static_cast<const T*>(problem.max_sim)[at];
  const T gradient = static_cast<const T*>(problem.grad_sim)[at];
  const I place = static_cast<const I*>(problem.argmax)[at];
  if (place == I(-1)) return {0, m, -1};
  // Clamped, since nothing else keeps a foreign argmax from pointing out of the window.
  const int64_t l = problem.grid.pixel_of_offset(place, window.columns);
  return {m == m ? gradient : m, m, int32_t(l < 0 ? 0 : least(l, window.pixels() - 1))};
}

// Calls use(p, pixel of the match, m, ∂L/∂m) for each pixel of a window of a pair that has a match.
template <class T, class I, class Use>
static inline void for_matches_as(const Problem& problem, int64_t pair, const Window& window,
                                  const Use& use) {
  const Grid& grid = problem.grid;
  const int64_t corner = pair * grid.pixels() + window.row * grid.width + window.column;
  int64_t p = 0;
  for (int64_t row = 0; row < window.rows; ++row) {
    for (int64_t column = 0; column < window.columns; ++column, ++p) {
      const Match<T> match = match_at<T, I>(problem, corner + row * grid.width + column, window);
      if (match.key >= 0) use(p, int64_t(match.key), match.max_sim, match.weight);
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

// Calls use(pair, query sample, key sample) for each directed pair of a component.
template <class Use>
static inline void for_directed_pairs(const Problem& problem, const Component& component,
                                      const Use& use) {
  const Edge* edges = &problem.plan.edges[component.first_edge];
  for (int64_t e = 0; e < component.num_edges; ++e) {
    if (edges[e].forward >= 0) use(edges[e].forward, edges[e].first, edges[e].second);
    if (edges[e].reverse >= 0) use(edges[e].reverse, edges[e].second, edges[e].first);
  }
}

// The matches of all windows of a tile. Each pair has planes of its own, in which a window of two
// pixels a row is 8 bytes of each cache line: read window by window, a line would be fetched again
// for each of the windows that share it.
template <class T>
struct MatchTable {
  Match<T>* matches;   // [window][directed pair][pixel]
  int64_t per_window;

  static MatchTable allocate(Arena& arena, const Work& work) {
    return {arena.take<Match<T>>(work.max_tile_matches), 0};
  }
  const Match<T>* window(int64_t t) const { return matches + t * per_window; }

  void read(const Problem& problem, const TileShape& shape) {
    int64_t count = 0;
    for_directed_pairs(problem, *shape.component, [&](int64_t, int64_t, int64_t) { ++count; });
    per_window = count * shape.pixels;
    Match<T>* to = matches;
    for_directed_pairs(problem, *shape.component, [&](int64_t pair, int64_t, int64_t) {
      if (problem.wide_index) {
        read_pair<int32_t>(problem, shape, pair, to);
      } else {
        read_pair<uint8_t>(problem, shape, pair, to);
      }
      to += shape.pixels;
    });
  }

 private:
  template <class I>
  void read_pair(const Problem& problem, const TileShape& shape, int64_t pair,
                 Match<T>* to) const {
    const Grid& grid = problem.grid;
    const Window& window = shape.window;
    const int64_t corner = pair * grid.pixels() + window.row * grid.width + window.column;
    for (int64_t row = 0; row < window.rows; ++row, to += window.columns) {
      int64_t at = corner + row * grid.width;
      for (int64_t t = 0; t < shape.num_windows; ++t) {
        for (int64_t i = 0; i < window.columns; ++i, ++at) {
          to[t * per_window + i] = match_at<T, I>(problem, at, window);
        }
      }
    }
  }
};

template <class T>
struct Term {
  int32_t offset;  // of the partner's row in the packed window
  T weight;
};

// For each row of a packed window, the rows that V sums over, in an order that follows from the
// pairs alone.
//
//      pixel p of a query matched pixel l of a key, with ∂L/∂m = w:
//          the query's row p gets the term (row of l, w)     one for each pair of that query
//          the key's row l gets the term (row of p, w)       as many as pixels have matched it
//
//      begin    [ 0      2   3           6 ]     row 0 has two terms, row 1 one, row 2 three
//      terms    [ .  .   .   .   .   .     ]
//
// Scattering w · row into the gradients instead would need atomic additions or a copy for each
// thread; with lists, each gradient is summed in registers and written once.
//
// x̂·V needs no product of its own: each term adds w times the cosine of its two rows, and that is
// the maximum m that the forward kept.
template <class T>
struct TermLists {
  int32_t* begin;  // (rows + 1)
  int32_t* cursor;
  T* along;  // x̂·V
  Term<T>* terms;

  static TermLists allocate(Arena& arena, int64_t rows, int64_t matches) {
    TermLists lists;
    lists.begin = arena.take<int32_t>(rows + 1);
    lists.cursor = arena.take<int32_t>(rows);
    lists.along = arena.take<T>(rows);
    lists.terms = arena.take<Term<T>>(2 * matches);
    return lists;
  }

  // A counting sort in two passes over the matches: how many terms each row has, then the terms.
  void build(const Problem& problem, const TileShape& shape, const Match<T>* matches) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      cursor[r] = 0;
      along[r] = 0;
    }
    for_rows(problem, shape, matches, [&](int64_t query, int64_t key, const Match<T>& match) {
      ++cursor[query];
      ++cursor[key];
      along[query] += match.weight * match.max_sim;
      along[key] += match.weight * match.max_sim;
    });
    begin[0] = 0;
    for (int64_t r = 0; r < shape.rows; ++r) {
      begin[r + 1] = begin[r] + cursor[r];
      cursor[r] = begin[r];
    }
    const int32_t stride = int32_t(shape.stride);
    for_rows(problem, shape, matches, [&](int64_t query, int64_t key, const Match<T>& match) {
      terms[cursor[query]++] = {int32_t(key) * stride, match.weight};
      terms[cursor[key]++] = {int32_t(query) * stride, match.weight};
    });
  }

 private:
  // Calls use(query row, key row, match) for each match of a window.
  template <class Use>
  static void for_rows(const Problem& problem, const TileShape& shape, const Match<T>* match,
                       const Use& use) {
    for_directed_pairs(problem, *shape.component, [&](int64_t, int64_t first, int64_t second) {
      for (int64_t p = 0; p < shape.pixels; ++p, ++match) {
        if (match->key < 0) continue;
        use(first * shape.pixels + p, second * shape.pixels + match->key, *match);
      }
    });
  }
};
