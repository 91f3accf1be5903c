// Uninitialised gradients for the CPU: large ones in memory that was kept from an earlier call, see
// cpu/kept_memory.h, all others as torch makes them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <exception>
#include <memory>
#include <optional>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/kept_memory.h"
#include "register.h"

#ifdef __linux__

// Of torch's stable interface since 2.11. The library serves 2.10 too, where it finds none: a weak
// symbol is null then.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t axes, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace salkernels {

struct GiveBlock {
  void operator()(Block* block) const { give_block(block); }
};
using OwnedBlock = std::unique_ptr<Block, GiveBlock>;

inline void give_storage(void* /*data*/, void* context) {
  give_block(static_cast<Block*>(context));
}

// Whether no two elements share a place and none is left between them: empty_like keeps the strides
// of these, and chooses others for the rest.
inline bool is_dense(const Tensor& x) {
  std::array<std::pair<int64_t, int64_t>, 5> axes;  // stride, size
  for (int i = 0; i < 5; ++i) axes[size_t(i)] = {x.strides()[i], x.sizes()[i]};
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (size == 1) continue;
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The block goes back when the storage of the tensor is freed, whoever holds it until then.
inline Tensor tensor_over(OwnedBlock block, const Tensor& like) {
  int32_t dtype = 0;
  AtenTensorHandle result = nullptr;
  const auto typed = aoti_torch_get_dtype(like.get(), &dtype);
  STD_TORCH_CHECK(typed == AOTI_TORCH_SUCCESS, "features without a dtype");
  void* const data = block->memory;
  // Its own from here on, even if the call fails: whether the block was given back is not known.
  const auto status = torch_from_blob(
      data, like.dim(), like.sizes().data(), like.strides().data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &result, aoti_torch_layout_strided(), nullptr, 0,
      give_storage, block.release());
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "torch made no tensor over a block of memory");
  return Tensor(result);
}

}  // namespace salkernels

#endif

namespace salkernels {

// The reason of a failure does not come through the C interface of every torch; there is but one that
// these arguments can have.
inline Tensor empty_as(const Tensor& like) {
  try {
    return torch::stable::empty_like(like);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "out of memory: no room for a gradient of ",
                    like.numel() * element_size(like), " bytes beside the features");
  }
}

// Tens of thousands of page faults are most of the time of a large gradient that is written for the
// first time: large pages are asked for where the system leaves it to the program.
inline Tensor fresh_gradient(const Tensor& like) {
  Tensor grad = empty_as(like);
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + uintptr_t(grad.numel() * element_size(like))) / kHuge * kHuge;
  // Only a hint: whether it was heard makes no difference to the result.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return grad;
}

inline std::pair<Tensor, std::optional<Tensor>> empty_gradients(const Tensor& query,
                                                                const std::optional<Tensor>& key) {
  const std::array<const Tensor*, kMostBlocks> like{&query, key.has_value() ? &*key : nullptr};
#ifdef __linux__
  std::array<int64_t, kMostBlocks> bytes{};
  for (size_t i = 0; i < like.size(); ++i) {
    if (torch_from_blob == nullptr || like[i] == nullptr || !is_dense(*like[i])) continue;
    bytes[i] = like[i]->numel() * element_size(query);
  }
  std::array<Block*, kMostBlocks> taken{};
  take_blocks(kMostBlocks, bytes.data(), taken.data());
  std::array<OwnedBlock, kMostBlocks> blocks{OwnedBlock(taken[0]), OwnedBlock(taken[1])};
  const auto make = [&](size_t i) {
    return blocks[i] ? tensor_over(std::move(blocks[i]), *like[i]) : fresh_gradient(*like[i]);
  };
#else
  const auto make = [&](size_t i) { return fresh_gradient(*like[i]); };
#endif
  Tensor grad_query = make(0);
  std::optional<Tensor> grad_key;
  if (key.has_value()) grad_key = make(1);
  return {std::move(grad_query), std::move(grad_key)};
}

}  // namespace salkernels
