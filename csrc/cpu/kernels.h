// The table of kernels of one dtype. Each instruction set has one per dtype, in a unit of its own.
#pragma once

#include "cross_entropy.h"
#include "linear.h"
#include "linear_attention.h"

namespace scfm {

struct Kernels {
  // Operations done by `rounds` of arithmetic in registers, to measure the peak rate.
  int64_t (*burn)(int64_t rounds);

  int64_t (*attention_forward_scratch)(const AttentionProblem&, int64_t max_queries);
  void (*attention_forward)(const AttentionProblem&, const Task&, void* scratch);
  int64_t (*attention_backward_scratch)(const AttentionProblem&, int64_t max_queries);
  void (*attention_backward)(const AttentionProblem&, const Task&, void* scratch);
  // After the last part of a divided task: writes the gradients of the queries. Its scratch is that of this last part.
  void (*join_attention_backward)(const AttentionProblem&, const Task&, void* scratch);
  // These take a task and the scratch of the backward.
  void (*column_sums)(const AttentionProblem&, const Task&, void* scratch);
  void (*deletion_effects)(const AttentionProblem&, const Task&, void* scratch);

  int64_t (*linear_attention_forward_scratch)(const LinearAttentionProblem&);
  void (*linear_attention_forward)(const LinearAttentionProblem&, const Task&, void* scratch);
  int64_t (*linear_attention_backward_scratch)(const LinearAttentionProblem&);
  void (*linear_attention_backward)(const LinearAttentionProblem&, const Task&, void* scratch);

  int64_t (*linear_panel_bytes)(const LinearProblem&);
  int64_t (*linear_scratch)(const LinearProblem&);
  void (*pack_weight)(const LinearProblem&, uint32_t* panels, void* scratch);
  void (*linear)(const LinearProblem&, int64_t row, const uint32_t* panels, void* scratch);

  int64_t (*cross_entropy_scratch)(const CrossEntropyProblem&);
  void (*cross_entropy)(const CrossEntropyProblem&, int64_t row, void* scratch);
};

// Null where the instruction set adds no kernel for the dtype.
const Kernels* kernels_portable(Dtype);
const Kernels* kernels_avx2(Dtype);
const Kernels* kernels_avx512(Dtype);
const Kernels* kernels_avx512_bf16(Dtype);
const Kernels* kernels_amx(Dtype);

}  // namespace scfm
