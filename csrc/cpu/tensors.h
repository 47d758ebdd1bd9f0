// Tensors as the kernels see them. No torch here, and no standard-library inlines: these types are compiled once for each
// instruction set, and the linker keeps one copy of an inline function.
#pragma once

#include <cstdint>

namespace scfm {

enum class Dtype { kFloat, kBFloat16, kHalf };

// Shape (tokens, heads, head width), last axis contiguous; strides in elements.
struct ConstTokens {
  const void* data;
  int64_t token_stride, head_stride;
};
struct Tokens {
  void* data;
  int64_t token_stride, head_stride;
};
struct ConstScalars {  // one float per token and head; `data` is null where there is none
  const float* data;
  int64_t token_stride, head_stride;
};
struct Scalars {
  float* data;
  int64_t token_stride, head_stride;
};

}  // namespace scfm
