// The arguments of the kernels: plain structures, no torch.
#pragma once

#include <cstdint>

namespace scfm::cuda {

enum class Dtype { kBFloat16, kHalf };

// (tokens, heads, head width) of a half type in device memory: last axis contiguous, rows on 16-byte boundaries.
// Strides in elements.
struct Tokens {
  void* data;
  int64_t token_stride, head_stride;
};
struct Scalars {  // one float per token and head; `data` is null if there is none
  float* data;
  int64_t token_stride, head_stride;
};

// Up to kTileRows queries (or keys) of one cell, and the keys (or queries) that they are multiplied with. Token numbers count
// from the start of the batch. The list is built on the host once per batch, longest first.
struct Tile {
  int32_t begin, count;
  int32_t other_begin, n_other;
  int32_t own;  // rows of this tile from here on attend to their own key as well; `count` if none does
  int32_t cell;
  int32_t unused[2];
};
static_assert(sizeof(Tile) == 32, "a tile is read as two chunks of 16 bytes");
constexpr int kTileRows = 128;

struct Problem {
  int32_t n_heads;
  int32_t n_query_tiles, n_key_tiles;
  bool keys_are_queries;  // self-attention: a token has one number on both sides
  float scale;
  int64_t n_queries;
  const Tile *query_tiles, *key_tiles;
  Tokens q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  Scalars key_bias, lse, grad_lse;
  Scalars key_sums;  // backward: gradient of the key bias; otherwise column sums or deletion effects
  // Workspace of the backward and of the key sums.
  float* row_lse;     // (heads, queries): log-sum-exp in units of log 2, +inf for a query that attends to no key
  float* row_delta;   // (heads, queries): grad_out . out - grad_lse
  float* grad_q_sum;  // (queries, heads, width): before rounding and scaling
  float* bounds;      // (cells, heads, 4): upper bounds of the gradients of scores, float16 only
};

// Each launches on `stream` and returns null or an error message. `ready` must be called first, before the tiles are copied:
// it makes the device current, and returns an error for a stream that is being captured in a graph.
struct AttentionKernels {
  const char* (*ready)(int32_t device, void* stream);
  const char* (*forward)(const Problem&, void* stream);
  const char* (*backward)(const Problem&, bool deterministic, void* stream);
  const char* (*column_sums)(const Problem&, void* stream);
  const char* (*deletion_effects)(const Problem&, void* stream);
};

// Null if there is no kernel for the head width.
const AttentionKernels* attention_kernels(Dtype, int64_t head_width);

// One unit per head width, so that they compile in parallel.
const AttentionKernels* attention_kernels_d32(Dtype);
const AttentionKernels* attention_kernels_d64(Dtype);
const AttentionKernels* attention_kernels_d128(Dtype);

}  // namespace scfm::cuda
