// Units of work of the log-sum-exp: tiles as the matches have them, and pieces of what does not fit.
#include <algorithm>

#include "lse.h"
#include "plan.h"

namespace salkernels {

namespace {

// Packed rows of one window: beyond the second-level cache the products still hide the reading,
// which pieces do anew for every 64 rows.
constexpr int64_t kLseWindowBytes = 16 << 20;

// All products of a query are in one piece, so that its sum is complete there; in the backward the
// products of a key as well.
void add_pieces(LseProblem& problem, int32_t index, bool backward) {
  const Component& component = problem.plan.components[index];
  const Grid& grid = problem.grid;
  for (int32_t n = 0; n < component.num_nodes; ++n) {
    const Node& node = problem.plan.nodes[component.first_node + n];
    if (!backward && node.query < 0) continue;
    for (int32_t strip = 0; strip < grid.strips(); ++strip) {
      for (int32_t w = 0; w < grid.across(); ++w) {
        const int64_t pixels = grid.window(strip, w).pixels();
        for (int64_t row = 0; row < pixels; row += kLsePieceRows) {
          problem.pieces.push_back(
              {index, n, strip, w, row, std::min(kLsePieceRows, pixels - row)});
        }
      }
    }
  }
}

// The most directed edges that meet at one sample of a component.
int64_t most_partners(const Plan& plan, const Component& component) {
  std::vector<int64_t> partners(component.num_nodes);
  for (int32_t e = 0; e < component.num_edges; ++e) {
    const Edge& edge = plan.edges[component.first_edge + e];
    ++partners[edge.first];
    if (edge.first != edge.second) ++partners[edge.second];
  }
  return *std::max_element(partners.begin(), partners.end());
}

}  // namespace

void make_lse_work(LseProblem& problem, const Kernels& kernels, bool backward) {
  const int64_t row_bytes = kernels.row_bytes(problem.dtype, problem.channels);
  const int64_t pixels = problem.grid.window_rows * problem.grid.window_columns;
  Work& work = problem.work;
  work.max_window_pixels = pixels;
  for (int32_t c = 0; c < int32_t(problem.plan.components.size()); ++c) {
    const Component& component = problem.plan.components[c];
    problem.max_nodes = std::max<int64_t>(problem.max_nodes, component.num_nodes);
    problem.max_edges = std::max<int64_t>(problem.max_edges, component.num_edges);
    const int64_t window_bytes = component.num_nodes * pixels * row_bytes;
    if (pixels > kLseTilePixels || window_bytes > kLseWindowBytes) {
      add_pieces(problem, c, backward);
      continue;
    }
    add_tiles(work, problem, c, row_bytes, false);
    problem.max_weights = std::max(
        problem.max_weights, most_partners(problem.plan, component) * pixels * pixels);
  }
  std::stable_sort(work.tiles.begin(), work.tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.strip < b.strip; });
}

}  // namespace salkernels
