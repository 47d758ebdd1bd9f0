// Checks that every operator makes before it passes memory to a kernel, on the CPU or on a GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/schedule.h"

namespace scfm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& tensor, const Tensor& like, int64_t n_tokens, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, "attention: `", name, "` must be (tokens, heads, head width); it has ", tensor.dim(),
                  " axes.");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "attention: `", name, "` and `q` differ in dtype.");
  STD_TORCH_CHECK(tensor.size(0) == n_tokens && tensor.size(1) == like.size(1) && tensor.size(2) == like.size(2),
                  "attention: `", name, "` has shape (", tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2),
                  "), expected (", n_tokens, ", ", like.size(1), ", ", like.size(2), ").");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(2) == 1 || tensor.stride(2) == 1, "attention: the last axis of `", name,
                  "` must be contiguous.");
}

inline std::vector<int64_t> integers_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1, "attention: `", name, "` must be one axis on the CPU.");
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "attention: `", name,
                  "` must hold int32 or int64.");
  const int64_t n = tensor.size(0), stride = n > 1 ? tensor.stride(0) : 1;
  std::vector<int64_t> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++)
    values[static_cast<size_t>(i)] = type == ScalarType::Int
                                         ? static_cast<const int32_t*>(tensor.const_data_ptr())[i * stride]
                                         : static_cast<const int64_t*>(tensor.const_data_ptr())[i * stride];
  return values;
}

inline std::vector<int64_t> boundaries_of(const Tensor& tensor, int64_t n_tokens, const char* name) {
  std::vector<int64_t> bounds = integers_of(tensor, name);
  STD_TORCH_CHECK(!bounds.empty() && bounds.front() == 0, "attention: `", name, "` must start at 0.");
  for (size_t i = 1; i < bounds.size(); i++)
    STD_TORCH_CHECK(bounds[i - 1] <= bounds[i], "attention: `", name, "` decreases from ", bounds[i - 1], " to ", bounds[i],
                    "; boundaries must not decrease.");
  STD_TORCH_CHECK(bounds.back() == n_tokens, "attention: `", name, "` ends at ", bounds.back(), ", but there are ",
                  n_tokens, " tokens.");
  return bounds;
}

inline Cells cells_of(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, const std::optional<Tensor>& cu_seqlens_k,
               const std::optional<Tensor>& n_known) {
  Cells cells;
  cells.query = boundaries_of(cu_seqlens, q.size(0), "cu_seqlens");
  cells.key = boundaries_of(cu_seqlens_k.value_or(cu_seqlens), k.size(0), cu_seqlens_k ? "cu_seqlens_k" : "cu_seqlens");
  STD_TORCH_CHECK(cells.key.size() == cells.query.size(), "attention: `cu_seqlens_k` must have as many entries as ",
                  "`cu_seqlens`, ", cells.query.size(), "; it has ", cells.key.size(), ".");
  cells.keys_are_queries = !cu_seqlens_k.has_value();
  if (!n_known) return cells;
  STD_TORCH_CHECK(!cu_seqlens_k, "attention: `n_known` needs self-attention; drop `cu_seqlens_k`.");
  cells.n_known = integers_of(*n_known, "n_known");
  STD_TORCH_CHECK(cells.n_known.size() + 1 == cells.query.size(), "attention: `n_known` needs one entry per cell.");
  for (size_t i = 0; i < cells.n_known.size(); i++)
    STD_TORCH_CHECK(cells.n_known[i] >= 0 && cells.n_known[i] <= cells.query[i + 1] - cells.query[i],
                    "attention: `n_known` is ", cells.n_known[i], " for cell ", i, " of ",
                    cells.query[i + 1] - cells.query[i], " tokens.");
  return cells;
}

}  // namespace scfm
