// From pairs to units of work.
//
//      pairs of a group         components             units of each component
//      (0,2) (2,5)              {0, 2, 5}              tiles: runs of windows in a strip, or,
//      (1,3)               ->   {1, 3}           ->    for large windows, streamed pieces
//      none of 4                {4} (backward only)
//
// Samples that no chain of pairs connects never meet in a product. Each component is therefore
// packed, multiplied and written by itself, which keeps what must share the cache small.
#include "plan.h"

#include <algorithm>
#include <numeric>

namespace salkernels {

namespace {

// Samples of one group, joined by pairs: union-find with path halving.
class Sets {
 public:
  explicit Sets(int64_t size) : parent_(size) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }
  int32_t root(int32_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  // The smaller root stays one, so that components follow the order of samples.
  void join(int32_t a, int32_t b) {
    a = root(a);
    b = root(b);
    parent_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int32_t> parent_;
};

Node node_of(const Maps& maps, int64_t group, int64_t sample) {
  const int64_t offset = group * maps.strides[0] + sample * maps.strides[1];
  const int64_t grad_offset = group * maps.grad_strides[0] + sample * maps.grad_strides[1];
  Node node;
  node.map = static_cast<const char*>(maps.data) + offset * maps.element_size;
  node.grad = maps.grad == nullptr
                  ? nullptr
                  : static_cast<char*>(maps.grad) + grad_offset * maps.element_size;
  node.valid = nullptr;
  node.query = -1;
  node.strides = {maps.strides[2], maps.strides[3], maps.strides[4]};
  node.grad_strides = {maps.grad_strides[2], maps.grad_strides[3], maps.grad_strides[4]};
  return node;
}

// The edges of one component; its samples in ascending order, queries before keys.
void add_edges(Plan& plan, const PairSet& pairs, const std::vector<int32_t>& samples,
               const std::vector<int64_t>& slots) {
  const auto slot = [&](int32_t q, int32_t k) { return slots[q * pairs.keys + k]; };
  for (size_t a = 0; a < samples.size(); ++a) {
    if (!pairs.set_form && samples[a] >= pairs.queries) break;
    for (size_t b = a; b < samples.size(); ++b) {
      Edge edge{int32_t(a), int32_t(b), -1, -1};
      if (pairs.set_form) {
        edge.forward = slot(samples[a], samples[b]);
        if (a != b) edge.reverse = slot(samples[b], samples[a]);
      } else if (samples[b] >= pairs.queries) {
        edge.forward = slot(samples[a], int32_t(samples[b] - pairs.queries));
      }
      if (edge.forward >= 0 || edge.reverse >= 0) plan.edges.push_back(edge);
    }
  }
}

// How a window is computed follows from the bytes of its packed rows, over all samples of the
// component, and from how many windows there are to share among threads:
//
//      bytes of a window     up to 2.5 MB                       more
//      many windows          a tile packs several of them       streamed
//      fewer than 8          the same; from 256 pixels on,      streamed
//                            streamed
//
// Windows of one component that are packed whole are cut into tiles of at most this size. In NCHW a
// tile should span whole rows of the map: at 16 samples of "paper" a tile of a whole strip took a
// third less time than one that fits the second-level cache (1 MB) but reads 56 bytes at a time.
constexpr int64_t kTileBytes = 2400 << 10;
// Channels-last a pixel is read whole in any case, and a tile need only be large enough to be worth
// its set-up: it, the next one on its way and the matches then share the second level.
constexpr int64_t kChannelsLastTileBytes = 128 << 10;
// The backward takes channels-last windows one by one, and cuts tiles by its matches instead: runs
// of pixels that fill a cache line of each pair's planes, and no more than this of matches.
constexpr int64_t kRunPixels = 16, kMatchBytes = 256 << 10;
// A window larger than this is streamed; so is a large one if there are too few to share out.
constexpr int64_t kWindowBytes = 5 << 19;
constexpr int64_t kFewTiles = 8, kManyPixels = 256;
constexpr int64_t kStreamedRows = 256;    // query rows of one unit, where rows can be shared out
constexpr int64_t kStreamedBytes = 1 << 19;  // of each of two buffers in a streamed gradient

// How many windows of a component a tile should have.
int64_t windows_of_tile(const Problem& problem, const Component& component, int64_t row_bytes,
                        bool by_window) {
  const Grid& grid = problem.grid;
  const int64_t pixels = grid.window_rows * grid.window_columns;
  if (by_window) {
    const int64_t bytes = 2 * component.num_edges * pixels * 12;
    const int64_t run = (kRunPixels + grid.window_columns - 1) / grid.window_columns;
    return std::clamp<int64_t>(kMatchBytes / std::max<int64_t>(1, bytes), 1, run);
  }
  const int64_t tile_bytes = component.channels_last ? kChannelsLastTileBytes : kTileBytes;
  return std::max<int64_t>(1, tile_bytes / (component.num_nodes * pixels * row_bytes));
}

}  // namespace

void add_tiles(Work& work, const Problem& problem, int32_t index, int64_t row_bytes,
               bool backward) {
  const Component& component = problem.plan.components[index];
  const Grid& grid = problem.grid;
  const bool by_window = backward && component.by_window();
  const int64_t fitting = windows_of_tile(problem, component, row_bytes, by_window);
  const int64_t whole = grid.whole_across();
  // Even pieces rather than full ones and a rest, which would leave a thread with little to do:
  //
  //      9 windows, of which 4 fit      [0 1 2][3 4 5][6 7 8]      not [0 1 2 3][4 5 6 7][8]
  const int64_t pieces = (whole + fitting - 1) / fitting;
  for (int64_t strip = 0; strip < grid.strips(); ++strip) {
    const auto add = [&](int64_t first, int64_t count) {
      const int64_t pixels = grid.window(strip, first).pixels();
      const int64_t rows = component.num_nodes * pixels;
      work.tiles.push_back({index, int32_t(strip), int32_t(first), int32_t(count)});
      work.max_window_rows = std::max(work.max_window_rows, rows | 1);
      const int64_t packed = by_window ? 1 : count;
      work.max_tile_rows = std::max(work.max_tile_rows, (rows | 1) * packed);
      const int64_t matches = 2 * component.num_edges * pixels;
      work.max_window_matches = std::max(work.max_window_matches, matches);
      work.max_tile_matches = std::max(work.max_tile_matches, matches * count);
    };
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = whole * i / pieces, end = whole * (i + 1) / pieces;
      add(first, end - first);
    }
    if (whole < grid.across()) add(whole, 1);
  }
}

namespace {

// The pieces of large windows.
//
//      forward, one pair                            backward, one sample
//      one direction        both directions         norms, then the gradient
//      +-------------+      +-------------+         +-------------+     +--+--+--+--+
//      | 256 queries |      | all queries |         | 256 pixels  |     |  |  |  |  |
//      +-------------+      | x all keys  |         +-------------+     |  |  |  |  |
//      | 256 queries |      |             |         | 256 pixels  |     |  |  |  |  |
//      +-------------+      +-------------+         +-------------+     +--+--+--+--+
//      each x all keys                              all channels        some channels, all pixels
//
// A query's maximum is complete within its piece. A key's runs over all queries: two pieces would
// each have a part of it, and no piece may wait for another. In the backward a norm needs all
// channels of a pixel; once norms are known, channels are independent of each other.
void add_streamed(Work& work, const Problem& problem, int32_t index, bool backward) {
  const Component& component = problem.plan.components[index];
  const Edge* edges = problem.plan.edges.data() + component.first_edge;
  const Grid& grid = problem.grid;
  const int64_t element = problem.dtype == DType::f64 ? 8 : 4;
  const int64_t window_pixels = grid.window_rows * grid.window_columns;
  const int64_t channels = std::min(
      problem.channels, std::max<int64_t>(16, kStreamedBytes / (window_pixels * element) / 16 * 16));
  work.max_streamed_channels = std::max(work.max_streamed_channels, channels);
  for (int32_t strip = 0; strip < grid.strips(); ++strip) {
    for (int32_t w = 0; w < grid.across(); ++w) {
      const int64_t pixels = grid.window(strip, w).pixels();
      if (!backward) {
        for (int32_t e = 0; e < component.num_edges; ++e) {
          // A maximum over query rows must see all of them; one over key rows need not.
          const int64_t step = edges[e].reverse >= 0 ? pixels : kStreamedRows;
          for (int64_t row = 0; row < pixels; row += step) {
            work.matches.push_back({index, e, strip, w, row, std::min(step, pixels - row)});
          }
        }
        continue;
      }
      for (int32_t n = 0; n < component.num_nodes; ++n) {
        for (int64_t row = 0; row < pixels; row += kStreamedRows) {
          work.norms.push_back({component.first_node + n, strip, w, row,
                                std::min(kStreamedRows, pixels - row)});
        }
        for (int64_t c = 0; c < problem.channels; c += channels) {
          work.gradients.push_back(
              {index, n, strip, w, c, std::min(channels, problem.channels - c)});
        }
      }
    }
  }
}

}  // namespace

const char* PairSet::fault() const {
  int64_t last = -1;
  for (int64_t i = 0; i < length; ++i) {
    if (list[i] == -1) {
      last = INT64_MAX;  // nothing but room that is left over may follow
    } else if (list[i] <= last || list[i] >= groups * queries * keys) {
      return "pairs must be places in (G, N, M), in ascending order, then -1";
    }
    if (list[i] >= 0) last = list[i];
  }
  return nullptr;
}

Plan make_plan(const PairSet& pairs, const Maps& query, const Maps& key, bool keep_isolated) {
  Plan plan;
  const int64_t samples = pairs.samples(), table = pairs.queries * pairs.keys;
  std::vector<int64_t> slots(table);
  std::vector<std::vector<int32_t>> by_root(samples);
  for (int64_t g = 0; g < pairs.groups; ++g) {
    Sets sets(samples);
    std::fill(slots.begin(), slots.end(), -1);
    const auto add_pair = [&](int64_t place) {
      const int64_t q = place / pairs.keys, k = place % pairs.keys;
      slots[place] = plan.num_pairs++;
      sets.join(int32_t(q), int32_t(pairs.set_form ? k : pairs.queries + k));
    };
    if (pairs.every) {
      for (int64_t place = 0; place < table; ++place) add_pair(place);
    } else {
      const auto in_group = [&](int64_t i) {
        return i < pairs.length && pairs.list[i] >= 0 && pairs.list[i] < (g + 1) * table;
      };
      // The list is in ascending order, so each group's pairs follow those of the group before it.
      while (in_group(plan.num_pairs)) add_pair(pairs.list[plan.num_pairs] - g * table);
    }
    for (int64_t s = 0; s < samples; ++s) by_root[s].clear();
    for (int64_t s = 0; s < samples; ++s) by_root[sets.root(int32_t(s))].push_back(int32_t(s));
    for (int64_t root = 0; root < samples; ++root) {
      if (by_root[root].empty()) continue;
      const int32_t first_edge = int32_t(plan.edges.size());
      add_edges(plan, pairs, by_root[root], slots);
      const int32_t num_edges = int32_t(plan.edges.size()) - first_edge;
      if (num_edges == 0 && !keep_isolated) continue;
      Component component{int32_t(plan.nodes.size()), int32_t(by_root[root].size()), first_edge,
                          num_edges, true, true};
      for (const int32_t s : by_root[root]) {
        Node node = s < pairs.queries ? node_of(query, g, s) : node_of(key, g, s - pairs.queries);
        if (s < pairs.queries) node.query = g * pairs.queries + s;
        if (pairs.valid != nullptr) node.valid = pairs.valid + (g * samples + s) * pairs.plane;
        component.channels_last &= node.strides.channel == 1;
        component.grads_channels_last &= node.grad_strides.channel == 1;
        plan.nodes.push_back(node);
      }
      plan.components.push_back(component);
    }
  }
  return plan;
}

Work make_work(const Problem& problem, const Kernels& kernels, bool backward) {
  Work work;
  const Grid& grid = problem.grid;
  const int64_t row_bytes = kernels.row_bytes(problem.dtype, problem.channels);
  const int64_t pixels = grid.window_rows * grid.window_columns;
  const int64_t num_components = int64_t(problem.plan.components.size());
  const bool few = grid.strips() * grid.across() * num_components < kFewTiles;
  work.max_window_pixels = pixels;
  for (int32_t c = 0; c < num_components; ++c) {
    const int64_t window_bytes = problem.plan.components[c].num_nodes * pixels * row_bytes;
    if (window_bytes > kWindowBytes || (few && pixels >= kManyPixels)) {
      add_streamed(work, problem, c, backward);
    } else {
      add_tiles(work, problem, c, row_bytes, backward);
    }
  }
  // Neighbours in the map one after the other, whichever component they belong to: the cost is
  // spread evenly, and a cache line that two strips share is still there.
  std::stable_sort(work.tiles.begin(), work.tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.strip < b.strip; });
  return work;
}

}  // namespace salkernels
