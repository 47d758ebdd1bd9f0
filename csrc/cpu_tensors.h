// Tensors of the CPU operators, checked, as the kernels take them.
#pragma once

#include "checks.h"

namespace scfm {

inline Dtype dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, op, ": tensors must hold float32, bfloat16 or float16.");
  }
}

inline void check_tokens(const Tensor& tensor, const Tensor& like, int64_t n_tokens, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "attention: `", name, "` must be on the CPU.");
  check_shape(tensor, like, n_tokens, name);
}

// Queries, keys and values, and the head width.
inline void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_tokens(q, q, q.size(0), "q");
  check_tokens(k, q, k.size(0), "k");
  check_tokens(v, q, k.size(0), "v");
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= kMaxWidth, "attention: the head width is ", q.size(2),
                  "; the kernels support 1 to ", kMaxWidth, ".");
}

inline ConstTokens read_tokens(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
inline Tokens write_tokens(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }
inline Scalars write_scalars(const Tensor& t) {
  return {static_cast<float*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)};
}

// For a field that the forward writes and the backward only reads.
inline Tokens as_written(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)}; }

inline Tensor new_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
}

// Autograd may pass an expanded gradient, whose strides are all zero.
inline Tensor readable(const Tensor& grad) {
  return grad.dim() == 3 && grad.size(2) > 1 && grad.stride(2) != 1 ? torch::stable::contiguous(grad) : grad;
}

}  // namespace scfm
