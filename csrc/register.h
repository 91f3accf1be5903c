// What the registrations of all devices share: dtypes, and the checks of an operator's arguments.
// Below them, kernels trust what they are given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace salkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Largest window whose offsets are kept as uint8, 255 standing for no match; beyond it they are
// int32, and -1 does.
constexpr int64_t kBytePixels = 255;

inline bool wide_index(Sizes window) { return window[0] * window[1] > kBytePixels; }

inline ScalarType index_type(Sizes window) {
  return wide_index(window) ? ScalarType::Int : ScalarType::Byte;
}

// Of losses, maxima and sums.
inline ScalarType accumulate_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t element_size(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    default: return 2;
  }
}

// Uninitialised, on the device of `like`. torch::stable::new_empty finds the operator by its name at
// each call, which takes longer than the allocation. The reason of a failure does not come through
// the C interface of every torch; there is but one that these arguments can have.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  const auto status = aoti_torch_aten_new_empty(like.get(), shape.begin(), int64_t(shape.size()),
                                                &type, nullptr, nullptr, 0, nullptr, &result);
  double elements = 1;  // a product of extents may not fit an integer
  for (int64_t side : shape) elements *= double(side);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "out of memory: no room for a result of ", elements,
                  " elements beside the features");
  return Tensor(result);
}

// P: how many pairs the outputs have room for.
inline int64_t count_pairs(const Tensor& query, const std::optional<Tensor>& key,
                           const std::optional<Tensor>& pairs) {
  if (pairs.has_value()) return pairs->numel();
  const auto sizes = query.sizes();
  return sizes[0] * sizes[1] * (key.has_value() ? key->sizes()[1] : sizes[1]);
}

// Extents that are larger, which only an expanded tensor can have, overflow the arithmetic of sizes.
constexpr int64_t kLargestExtent = INT32_MAX;

inline void check_extents(const Tensor& query, const std::optional<Tensor>& key) {
  const auto sizes = query.sizes();
  const int64_t keys = key.has_value() ? key->sizes()[1] : sizes[1];
  bool small = keys <= kLargestExtent;
  for (int i = 0; i < 5; ++i) small &= sizes[i] <= kLargestExtent;
  small = small && sizes[3] * sizes[4] <= kLargestExtent && sizes[0] * sizes[1] <= kLargestExtent &&
          sizes[0] * sizes[1] * keys <= kLargestExtent;
  STD_TORCH_CHECK(small, "there must be fewer than 2^31 samples, pairs, channels and pixels of a map");
}

inline void check_features(const Tensor& query, const std::optional<Tensor>& key, Sizes window) {
  STD_TORCH_CHECK(query.dim() == 5, "query must be (G, N, C, H, W), got ", query.dim(), " axes");
  STD_TORCH_CHECK(window.size() == 2, "window must be (rows, columns)");
  const auto sizes = query.sizes();
  STD_TORCH_CHECK(sizes[2] >= 1 && sizes[3] >= 1 && sizes[4] >= 1,
                  "features need at least one channel and one pixel, got (G, N, C, H, W) = (",
                  sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], ", ", sizes[4], ")");
  check_extents(query, key);
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(window[i] >= 1 && window[i] <= sizes[3 + i],
                    "window must lie between 1 and the map's extent");
  }
  if (!key.has_value()) return;
  STD_TORCH_CHECK(key->dim() == 5, "key must be (G, M, C, H, W)");
  const auto other = key->sizes();
  STD_TORCH_CHECK(other[0] == sizes[0] && other[2] == sizes[2] && other[3] == sizes[3] &&
                      other[4] == sizes[4],
                  "query and key must agree in all but the number of samples");
  STD_TORCH_CHECK(key->scalar_type() == query.scalar_type(), "query and key must share a dtype");
  STD_TORCH_CHECK(key->device() == query.device(), "query and key must be on one device");
}

inline void check_arguments(const Tensor& query, const std::optional<Tensor>& key,
                            const std::optional<Tensor>& pairs, const std::optional<Tensor>& valid,
                            Sizes window) {
  check_features(query, key, window);
  if (pairs.has_value()) {
    STD_TORCH_CHECK(pairs->scalar_type() == ScalarType::Long && pairs->dim() == 1 &&
                        pairs->is_contiguous(),
                    "pairs must be (P,) int64 and contiguous");
    STD_TORCH_CHECK(pairs->device() == query.device(), "pairs must be on the device of query");
  }
  if (valid.has_value()) {
    const auto sizes = query.sizes();
    const int64_t samples = sizes[1] + (key.has_value() ? key->sizes()[1] : 0);
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->is_contiguous(),
                    "valid must be bool and contiguous");
    STD_TORCH_CHECK(valid->device() == query.device(), "valid must be on the device of query");
    STD_TORCH_CHECK(valid->dim() == 4 && valid->sizes()[0] == sizes[0] &&
                        valid->sizes()[1] == samples && valid->sizes()[2] == sizes[3] &&
                        valid->sizes()[3] == sizes[4],
                    "valid must be (G, samples, H, W): queries, then keys that are not the queries");
  }
}

// What the forward kept, and the gradient of the maxima.
inline void check_saved(const Tensor& query, const std::optional<Tensor>& key,
                        const std::optional<Tensor>& pairs, Sizes window, const Tensor& max_sim,
                        const Tensor& argmax, const Tensor& grad_sim) {
  const auto sizes = query.sizes();
  const int64_t count = count_pairs(query, key, pairs);
  for (const Tensor* x : {&max_sim, &argmax, &grad_sim}) {
    STD_TORCH_CHECK(x->is_contiguous(), "max_sim, argmax and grad_sim must be contiguous");
    STD_TORCH_CHECK(x->dim() == 3 && x->sizes()[0] == count && x->sizes()[1] == sizes[3] &&
                        x->sizes()[2] == sizes[4],
                    "max_sim, argmax and grad_sim must be (pairs, H, W)");
    STD_TORCH_CHECK(x->device() == query.device(), "all tensors must be on one device");
  }
  STD_TORCH_CHECK(argmax.scalar_type() == index_type(window),
                  "argmax must be uint8 for windows of at most 255 pixels, else int32");
  const ScalarType wide = accumulate_type(query);
  STD_TORCH_CHECK(max_sim.scalar_type() == wide && grad_sim.scalar_type() == wide,
                  "max_sim and grad_sim must be float32, or float64 for float64 features");
}

}  // namespace salkernels
