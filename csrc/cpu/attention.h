// What the scheduler and the kernels of each instruction set agree on. No torch here, and no standard-library inlines:
// these types are compiled once for each instruction set, and the linker keeps one copy of an inline function.
#pragma once

#include <cstdint>

namespace scfm {

enum class Dtype { kFloat, kBFloat16, kHalf };

// (tokens, heads, head width) somewhere in memory, last axis contiguous; strides in elements.
struct ConstTokens {
  const void* data;
  int64_t token_stride, head_stride;
};
struct Tokens {
  void* data;
  int64_t token_stride, head_stride;
};
struct ConstScalars {  // one float a token and head; data is null where there is none
  const float* data;
  int64_t token_stride, head_stride;
};
struct Scalars {
  float* data;
  int64_t token_stride, head_stride;
};

struct AttentionProblem {
  int64_t head_dim;
  float scale;
  ConstTokens q, k, v;
  ConstScalars key_bias;
  // Forward: written. Backward: read.
  Tokens out;
  Scalars lse;
  // Backward only.
  ConstTokens grad_out;
  ConstScalars grad_lse;
  Tokens grad_q, grad_k, grad_v;
  Scalars grad_bias;
};

// Random features in place of the softmax: `scale` is that of queries and keys, head width ** -0.25. No bias, no
// log-sum-exp.
struct LinearAttentionProblem : AttentionProblem {
  const float* projection;  // [n_features][head_dim]
  int64_t n_features;
  float floor;  // added to every feature
};

// One piece of work: some queries of one cell, one head. Token numbers count from the start of the batch.
struct AttentionTask {
  int64_t head;
  int64_t query_begin, query_end;
  int64_t key_begin, n_keys;  // keys that every query sees
  int64_t own_begin;          // queries from here on see their own key as well
  bool keys_are_queries;      // self-attention: a token has one number on both sides
};

// A forward task holds at most this many queries: enough that packing the keys for them costs next to nothing. It is
// the same for every batch and number of threads, so a cell's result is too.
constexpr int64_t kQueriesPerTask = 1024;

constexpr int64_t kMaxWidth = 256;  // widest head

// Rows times a matrix: out = activation(input weight^T + bias) + residual. Each row is a "token" of one head.
struct LinearProblem {
  int64_t n_rows, n_inputs, n_outputs;
  ConstTokens input, weight, bias, residual;  // the data of `bias` and `residual` are null where there is none
  Tokens out;
  bool relu;
};

constexpr int64_t kLinearRows = 96;  // rows of one task: a multiple of all register tiles

struct AttentionKernels {
  int64_t (*forward_scratch)(const AttentionProblem&, int64_t max_queries);
  void (*forward)(const AttentionProblem&, const AttentionTask&, void* scratch);
  int64_t (*backward_scratch)(const AttentionProblem&, int64_t max_queries);
  void (*backward)(const AttentionProblem&, const AttentionTask&, void* scratch);
  // Operations done by `rounds` of arithmetic in registers: the roofline.
  int64_t (*burn)(int64_t rounds);
  // These take a backward task and its scratch.
  void (*column_sums)(const AttentionProblem&, const AttentionTask&, void* scratch);
  void (*deletion_effects)(const AttentionProblem&, const AttentionTask&, void* scratch);

  int64_t (*linear_attention_scratch)(const LinearAttentionProblem&);
  void (*linear_attention_forward)(const LinearAttentionProblem&, const AttentionTask&, void* scratch);
  int64_t (*linear_attention_backward_scratch)(const LinearAttentionProblem&);
  void (*linear_attention_backward)(const LinearAttentionProblem&, const AttentionTask&, void* scratch);

  int64_t (*linear_panel_bytes)(const LinearProblem&);
  int64_t (*linear_scratch)(const LinearProblem&);
  void (*pack_weight)(const LinearProblem&, uint32_t* panels, void* scratch);
  void (*linear)(const LinearProblem&, int64_t row, const uint32_t* panels, void* scratch);
};

// Each is compiled in a unit of its own; null where the unit holds no kernel for the dtype.
const AttentionKernels* attention_kernels_portable(Dtype);
const AttentionKernels* attention_kernels_avx2(Dtype);
const AttentionKernels* attention_kernels_avx512(Dtype);
const AttentionKernels* attention_kernels_avx512_bf16(Dtype);
const AttentionKernels* attention_kernels_amx(Dtype);

}  // namespace scfm
