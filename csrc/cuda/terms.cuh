// Backward: V of a row is a sum over the rows it was matched with, in both roles. Which these are
// is found here, window by window and sample by sample, before any feature is read.
//
// sort_pairs    where the pairs of each query begin in the list, and the pairs of each key, which
//               stand apart in the list, in an order of their own
// list_terms    for each row of the maps the list of its terms, a counting sort of the matches of
//               one sample in one window by the row that they belong to
//
//   matches of a sample:  as a query, pair by pair: row = its pixel
//                         as a key, pair by pair:   row = the pixel that was chosen
//   lists:                row 0: q q q k | row 1: q q q | row 2: q q q k k k | ...
//
// The matches come in one order, and a list keeps it: sums do not depend on who runs first. A warp
// takes 32 matches at a time; lanes with the same row know each other by __match_any_sync.
#pragma once

#include "stream.cuh"

namespace salkernels {
namespace cuda {

// A warp for each query, then for each key; the last of either writes the end of the list.
__device__ inline void sort_pairs(const Problem& p) {
  const int lane = threadIdx.x % 32;
  const int64_t queries = p.groups * p.maps[0].samples, keys = p.maps[1].samples;
  const int64_t table = p.maps[0].samples * keys, warp = warp_index();
  if (warp <= queries) {
    const int64_t before = pairs_before(p, warp * keys);
    if (lane == 0) p.query_begin[warp] = int32_t(before);
    return;
  }
  const int64_t row = warp - queries - 1;
  if (row > p.groups * keys) return;
  const int64_t group = row / keys, key = row % keys;
  const int64_t from = pairs_before(p, group * table);
  const int64_t to = row == p.groups * keys ? from : pairs_before(p, (group + 1) * table);
  int64_t begin = from;
  const auto key_of = [&](int64_t i) {
    return i < to ? uint32_t(pair_place(p, i) - group * table) % uint32_t(keys) : ~0u;
  };
  for (int64_t first = from; first < to; first += 32) {
    begin += __popc(__ballot_sync(kAllLanes, key_of(first + lane) < uint32_t(key)));
  }
  if (lane == 0) p.key_begin[row] = int32_t(begin);
  for (int64_t first = from; first < to; first += 32) {
    const bool own = key_of(first + lane) == uint32_t(key);
    const uint32_t all = __ballot_sync(kAllLanes, own);
    if (own) {
      const int64_t at = begin + __popc(all & ((1u << lane) - 1)), i = first + lane;
      p.by_key[at] = int32_t(i);
      p.by_key_query[at] = int32_t(uint32_t(pair_place(p, i) - group * table) / uint32_t(keys));
    }
    begin += __popc(all);
  }
}

// One sample of a group in one window, and its pairs.
struct NodeWindow {
  Unit unit;
  int node;                 // in the group
  int query_first, query_count;  // its pairs as a query, in the list
  int key_first, key_count;      // and as a key, in by_key

  __device__ static NodeWindow of(const Problem& p, const Unit& unit, int node) {
    NodeWindow at{unit, node, 0, 0, 0, 0};
    const int queries = int(p.maps[0].samples), keys = int(p.maps[1].samples);
    const int key = p.set_form ? node : node - queries;
    if (node < queries) {
      const int32_t* begin = p.query_begin + unit.group * queries + node;
      at.query_first = begin[0];
      at.query_count = begin[1] - begin[0];
    }
    if (key >= 0) {
      const int32_t* begin = p.key_begin + unit.group * keys + key;
      at.key_first = begin[0];
      at.key_count = begin[1] - begin[0];
    }
    return at;
  }
  // Where its rows and terms stand in the lists: window after window, so that each is contiguous.
  __device__ int64_t first_row(const Problem& p) const {
    return (unit.group * p.group_nodes() + node) * p.grid.pixels() + before(p);
  }
  __device__ int64_t first_term(const Problem& p) const {
    // A sample before this one has all its terms before them.
    const int64_t pairs = p.set_form ? int64_t(query_first) + key_first
                          : node < p.maps[0].samples ? int64_t(query_first)
                                                     : p.num_pairs + key_first;
    return pairs * p.grid.pixels() + int64_t(query_count + key_count) * before(p);
  }
  // Pixels of the windows before this one.
  __device__ int64_t before(const Problem& p) const {
    return unit.row * p.grid.width + int64_t(unit.column) * unit.rows;
  }
};

// ∂L/∂max_sim of a match: as given, or that of the mean of |1 - max_sim|, in which nobody has to
// write a number for each match first. NaN stays NaN.
template <class F>
__device__ inline F gradient_of_match(const Problem& p, int64_t place, F max_sim) {
  if (p.grad_sim != nullptr) return static_cast<const F*>(p.grad_sim)[place];
  const F scale = *static_cast<const F*>(p.grad_mean) * F(p.mean_share), beyond = max_sim - F(1);
  return beyond > 0 ? scale : beyond < 0 ? -scale : beyond * scale;
}

// A match in the role of one of its two rows.
template <class F>
struct RoleMatch {
  int row;      // pixel of the node; -1: none
  int partner;  // row of the unit
  F gradient, max_sim;
  F scale;      // of the partner to a unit vector; 0 of one that has none
};

// The matches of a node in a window, 32 lanes at a time: `first` counts from 0 to count(), first
// those as a query. Roles do not share 32 lanes.
template <class F>
struct MatchWalk {
  const Problem& p;
  const NodeWindow& at;
  const int32_t* planes;  // of the pixels of the window; null: to be computed
  int pixels, stride;     // of the window, and of a nominal one, by which rows are numbered
  int lane_pair, lane_pixel;  // of this lane's match

  __device__ MatchWalk(const Problem& problem, const NodeWindow& window, const int32_t* plane)
      : p(problem), at(window), planes(plane), pixels(window.unit.pixels()),
        stride(int(problem.window_pixels())) {}

  __device__ int64_t plane(int pixel) const {
    return planes == nullptr ? plane_index(p, at.unit, pixel) : planes[pixel];
  }
  __device__ int chunks(bool as_key) const {
    return ((as_key ? at.key_count : at.query_count) * pixels + 31) / 32;
  }
  __device__ void start(int chunk) {
    const int index = chunk * 32 + threadIdx.x % 32;
    lane_pair = index / pixels;
    lane_pixel = index % pixels;
  }
  __device__ void next() {
    lane_pair += 32 / pixels;
    lane_pixel += 32 % pixels;
    if (lane_pixel >= pixels) {
      lane_pixel -= pixels;
      ++lane_pair;
    }
  }
  // The row of this lane's match alone, with the place of the match in the outputs.
  __device__ int row(bool as_key, int64_t& place, int& match) const {
    if (lane_pair >= (as_key ? at.key_count : at.query_count)) return -1;
    const int slot = as_key ? p.by_key[at.key_first + lane_pair] : at.query_first + lane_pair;
    place = match_index(p, slot, plane(lane_pixel));
    match = load_match(p, at.unit, place);
    return as_key || match < 0 ? match : lane_pixel;
  }
  __device__ RoleMatch<F> load(bool as_key) const {
    int64_t place = 0;
    int match = -1;
    RoleMatch<F> found{row(as_key, place, match), 0, 0, 0, 0};
    if (found.row < 0) return found;
    int node, pixel = match;
    if (as_key) {
      node = p.by_key_query[at.key_first + lane_pair];
      pixel = lane_pixel;
    } else {
      const int queries = int(p.maps[0].samples), keys = int(p.maps[1].samples);
      const int64_t place_in_list = pair_place(p, at.query_first + lane_pair);
      node = int(place_in_list - (at.unit.group * queries + at.node) * keys) +
             (p.set_form ? 0 : queries);
    }
    found.partner = node * stride + pixel;
    found.max_sim = static_cast<const F*>(p.max_sim)[place];
    found.gradient = gradient_of_match(p, place, found.max_sim);
    const F norm =
        static_cast<const F*>(p.norm)[norm_index(p, at.unit.group, node, plane(pixel))];
    found.scale = is_finite(norm) ? unit_scale(norm, F(p.eps)) : F(0);
    return found;
  }
};

// Adds what each lane brought to sums[row], in the order of lanes. `same`: the lanes of that row.
template <class F>
__device__ inline void add_by_row(F* sums, int row, uint32_t same, F value, F* exchange) {
  const int lane = threadIdx.x % 32;
  exchange[lane] = value;
  __syncwarp();
  if (row >= 0 && (same & ((1u << lane) - 1)) == 0) {
    F sum = sums[row];
    for (uint32_t left = same; left != 0; left &= left - 1) sum += exchange[__ffs(int(left)) - 1];
    sums[row] = sum;
  }
  __syncwarp();
}

// The same for windows of at most four pixels: each lane has a sum for each row, and these are
// added up at the end.
template <class F>
struct FewRows {
  static constexpr int kRows = 4;
  F sums[kRows] = {};

  __device__ static bool suffice(int pixels) { return pixels <= kRows; }
  __device__ void add(int row, F value) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i] += row == i ? value : F(0);
  }
  __device__ void store(F* to, int pixels) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const F sum = sum_of_warp(sums[i]);
      if (lane == i && i < pixels) to[i] = sum;
    }
    __syncwarp();
  }
};

// What a team of warps needs of shared memory, for each warp: how many terms each row has (then
// where the next one goes) and its part of x̂·V; for the team, places of pixels.
__host__ __device__ constexpr int64_t terms_shared_bytes(int64_t pixels, int64_t team,
                                                         int64_t wide) {
  return kWarps * 32 * wide + kWarps * pixels * (4 + wide) + kWarps / team * pixels * 4;
}

// Turns the counts of all warps of a team into where each begins, and writes where each row ends.
template <class F>
__device__ inline void place_terms(const Problem& p, const NodeWindow& at, int32_t* counts,
                                   int team) {
  const int lane = threadIdx.x % 32, pixels = at.unit.pixels(), stride = int(p.window_pixels());
  int32_t* const ends = p.term_end + at.first_row(p);
  int before = 0;
  for (int first = 0; first < pixels; first += 32) {
    const int row = first + lane;
    int own = 0;
    for (int w = 0; w < team && row < pixels; ++w) own += counts[w * stride + row];
    int sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (row < pixels) {
      ends[row] = before + sum;
      int next = before + sum - own;
      for (int w = 0; w < team; ++w) {
        const int count = counts[w * stride + row];
        counts[w * stride + row] = next;
        next += count;
      }
    }
    before += __shfl_sync(kAllLanes, sum, 31);
  }
}

// What the warps of a team share of memory.
template <class F>
struct TermCounts {
  int team, member;    // warps of the team, and which one this is
  F* exchange;         // (32,) of this warp
  F* along;            // (window,) of this warp
  int32_t* counts;     // (window,) of this warp; those of the next follow
  int32_t* planes;     // (window,) of the team
  int32_t* all_counts;

  __device__ static TermCounts of(const Problem& p, unsigned char* memory) {
    const int warp = threadIdx.x / 32, team = int(p.tiling.team);
    const int64_t stride = p.tiling.lists_in_memory ? 0 : p.window_pixels();
    F* const first = reinterpret_cast<F*>(memory);
    int32_t* const counts = reinterpret_cast<int32_t*>(first + kWarps * (32 + stride));
    return {team,
            warp % team,
            first + warp * 32,
            first + kWarps * 32 + warp * stride,
            counts + warp * stride,
            stride == 0 ? nullptr : counts + kWarps * stride + warp / team * stride,
            counts + warp / team * team * stride};
  }
  __device__ void sync() const {
    if (team == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Calls use(as a key) for this warp's part of the matches, in order.
template <class F, class Use>
__device__ inline void for_chunks(MatchWalk<F>& walk, const TermCounts<F>& team, const Use& use) {
  const int as_query = walk.chunks(false), chunks = as_query + walk.chunks(true);
  const int begin = int(int64_t(chunks) * team.member / team.team);
  const int end = int(int64_t(chunks) * (team.member + 1) / team.team);
  for (int role = 0; role < 2; ++role) {
    const int first = role == 0 ? begin : (begin > as_query ? begin : as_query);
    const int last = role == 1 ? end : (end < as_query ? end : as_query);
    if (first < last) walk.start(first - role * as_query);
    for (int chunk = first; chunk < last; ++chunk, walk.next()) use(role == 1);
  }
}

// Teams of one warp, or of all of a block where a window has many pixels: each warp of a team takes
// a part of the matches, and has counts of its own. Where these are too many for shared memory, a
// team is one warp, and counts in what it is to write: there, the counts end as the ends of lists.
template <class F>
__device__ void list_terms(const Problem& p) {
  SALKERNELS_SHARED(memory);
  TermCounts<F> team = TermCounts<F>::of(p, memory);
  const int lane = threadIdx.x % 32, stride = int(p.window_pixels());
  const int64_t index = warp_index() / team.team, nodes = p.group_nodes();
  if (index >= p.units() * nodes) return;
  const NodeWindow at = NodeWindow::of(p, unit_of(p, index / nodes), int(index % nodes));
  const int pixels = at.unit.pixels();
  F* const sums = static_cast<F*>(p.along) + at.first_row(p);
  const bool in_memory = p.tiling.lists_in_memory;
  if (in_memory) {
    team.along = sums;
    team.counts = team.all_counts = p.term_end + at.first_row(p);
  } else {
    for (int i = lane + team.member * 32; i < pixels; i += 32 * team.team) {
      team.planes[i] = int32_t(plane_index(p, at.unit, i));
    }
  }
  for (int i = lane; i < pixels; i += 32) {
    team.counts[i] = 0;
    team.along[i] = 0;
  }
  team.sync();
  MatchWalk<F> walk(p, at, team.planes);
  for_chunks(walk, team, [&](bool as_key) {
    int64_t place;
    int match;
    const int row = walk.row(as_key, place, match);
    if (row >= 0) atomicAdd(&team.counts[row], 1);
  });
  team.sync();
  if (team.member == 0) place_terms<F>(p, at, team.all_counts, team.team);
  team.sync();
  Term<F>* const terms = static_cast<Term<F>*>(p.terms) + at.first_term(p);
  FewRows<F> few;
  for_chunks(walk, team, [&](bool as_key) {
    const RoleMatch<F> found = walk.load(as_key);
    const uint32_t same = __match_any_sync(kAllLanes, found.row);
    const uint32_t earlier = same & ((1u << lane) - 1);
    if (found.row >= 0) {
      terms[team.counts[found.row] + __popc(earlier)] = {found.partner,
                                                         found.gradient * found.scale};
    }
    __syncwarp();
    if (found.row >= 0 && earlier == 0) team.counts[found.row] += __popc(same);
    if (FewRows<F>::suffice(stride)) {
      few.add(found.row, found.gradient * found.max_sim);
      __syncwarp();  // the next lanes read what was counted
    } else {
      add_by_row(team.along, found.row, same, found.gradient * found.max_sim, team.exchange);
    }
  });
  if (FewRows<F>::suffice(stride)) few.store(team.along, pixels);
  team.sync();
  if (in_memory) return;
  for (int i = lane + team.member * 32; i < pixels; i += 32 * team.team) {
    F sum = 0;
    for (int w = 0; w < team.team; ++w) sum += team.along[(w - team.member) * stride + i];
    sums[i] = sum;
  }
}

}  // namespace cuda
}  // namespace salkernels
