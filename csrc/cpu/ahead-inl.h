// Asks for the features of the next tile while this one is computed, a few cache lines at a time,
// so that neither memory nor arithmetic waits for the other. Together with tiles small enough for
// the second-level cache this took a third off both passes at "paper". Channels-last only: in NCHW,
// which needs tiles that fill the cache, it cost 14 % of the forward and 2 to 15 % of the backward.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#include "simd-inl.h"
#include "pack-inl.h"
#include "tile-inl.h"
#endif
class Ahead {
 public:
  // Of the tile after this one.
  template <class T, class In>
  static Ahead of_next(const Problem& problem, const Tile* tile, int64_t steps) {
    const Tile* next = tile + 1;
    if (next == problem.work.tiles.data() + problem.work.tiles.size()) return Ahead{};
    return of<In>(problem, TileShape::of<T>(problem, *next), steps);
  }

  // `steps`: about how often `step` will be called before that shape's features are needed.
  template <class In>
  static Ahead of(const Problem& problem, const TileShape& shape, int64_t steps) {
    Ahead ahead;
    if (!shape.component->channels_last) return ahead;
    ahead.node_ = shape.nodes;
    ahead.end_ = shape.nodes + shape.component->num_nodes;
    ahead.patch_ = shape.patch(problem.channels);
    ahead.element_size_ = int64_t(sizeof(In));
    const int64_t pixel_lines = problem.channels * ahead.element_size_ / kLineBytes + 1;
    steps = most(1, steps);
    ahead.lines_per_step_ = (shape.rows * shape.num_windows * pixel_lines + steps - 1) / steps;
    return ahead;
  }

  void step() {
    for (int64_t i = 0; i < lines_per_step_; ++i, line_ += kLineBytes) {
      if (line_ >= pixel_end_ && !next_pixel()) return;
      __builtin_prefetch(line_, 0, 2);  // into the second level: a tile does not fit the first
    }
  }

 private:
  bool next_pixel() {
    if (node_ == end_) return false;
    const MapStrides& s = node_->strides;
    const int64_t at = (patch_.row + row_) * s.row + (patch_.column + column_) * s.column;
    line_ = static_cast<const char*>(node_->map) + at * element_size_;
    pixel_end_ = line_ + patch_.channels * element_size_;
    if (++column_ < patch_.columns) return true;
    column_ = 0;
    if (++row_ < patch_.rows) return true;
    row_ = 0;
    ++node_;
    return true;
  }

  const Node *node_ = nullptr, *end_ = nullptr;
  Patch patch_{};
  int64_t element_size_ = 0, lines_per_step_ = 0;
  int64_t row_ = 0, column_ = 0;  // of the patch: the pixel that comes next
  const char *line_ = nullptr, *pixel_end_ = nullptr;
};
