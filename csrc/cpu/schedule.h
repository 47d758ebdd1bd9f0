// From a batch of cells to tasks, and tasks to threads.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace scfm {

struct Cells {  // boundaries, already checked
  std::vector<int64_t> query, key;  // B + 1 entries each
  std::vector<int64_t> n_known;     // B entries, or none
  bool keys_are_queries = true;
};

const AttentionKernels& attention_kernels(Dtype);

// Best rate of arithmetic in registers of one core, in 10^9 operations a second.
double peak_gflops(Dtype);

void run_attention_forward(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_attention_backward(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_column_sums(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_deletion_effects(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear_attention_forward(const LinearAttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear_attention_backward(const LinearAttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear(const LinearProblem& problem, Dtype dtype);

}  // namespace scfm
