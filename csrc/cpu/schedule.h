// What the operators call: each function splits a problem into tasks and runs them on torch's threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace scfm {

struct Cells {  // boundaries, already checked
  std::vector<int64_t> query, key;  // B + 1 entries each
  std::vector<int64_t> n_known;     // B entries, or none
  bool keys_are_queries = true;
};

// Those of the active instruction set.
const Kernels& kernels(Dtype);

// Best rate of arithmetic in registers of one core, in 10^9 operations per second.
double peak_gflops(Dtype);

void run_attention_forward(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_attention_backward(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_column_sums(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_deletion_effects(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear_attention_forward(const LinearAttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear_attention_backward(const LinearAttentionProblem&, const Cells&, int64_t n_heads, Dtype);
void run_linear(const LinearProblem&, Dtype);

// `grad_bias` gets the sum over all rows, one element per class; the problem's own is set inside.
void run_cross_entropy(CrossEntropyProblem, float* grad_bias, Dtype);

}  // namespace scfm
