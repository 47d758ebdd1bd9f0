// Softmax attention on the CPU: operators, and the checks that memory safety depends on. LibTorch stable ABI only: one build
// runs with torch 2.10 and later.
#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_tensors.h"

namespace scfm {
namespace {

ConstScalars read_scalars(const std::optional<Tensor>& t, int64_t n_tokens, int64_t n_heads, const char* name) {
  if (!t) return {nullptr, 0, 0};
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == n_tokens &&
                      t->size(1) == n_heads,
                  "attention: `", name, "` must be float32 of shape (", n_tokens, ", ", n_heads, ") on the CPU.");
  return {static_cast<const float*>(t->const_data_ptr()), t->stride(0), t->stride(1)};
}

Scalars read_lse(const Tensor& lse, const Tensor& q) {
  const ConstScalars read = read_scalars(lse, q.size(0), q.size(1), "lse");
  return {const_cast<float*>(read.data), read.token_stride, read.head_stride};
}

AttentionProblem problem_of(const AttentionOptions& options, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_qkv(q, k, v);
  AttentionProblem problem{};
  problem.head_dim = q.size(2);
  problem.scale = static_cast<float>(options.scale);
  problem.q = read_tokens(q);
  problem.k = read_tokens(k);
  problem.v = read_tokens(v);
  problem.key_bias = read_scalars(options.key_bias, k.size(0), q.size(1), "key_bias");
  return problem;
}

std::tuple<Tensor, Tensor> attention_forward(const AttentionOptions& options, const Tensor& q, const Tensor& k,
                                             const Tensor& v) {
  AttentionProblem problem = problem_of(options, q, k, v);
  const Cells cells = cells_of(options, q, k);
  Tensor out = new_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  problem.out = write_tokens(out);
  problem.lse = write_scalars(lse);
  run_attention_forward(problem, cells, q.size(1), dtype_of(q, "attention"));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionOptions& options, const Tensor& grad_out,
                                                              std::optional<Tensor> grad_lse, const Tensor& q,
                                                              const Tensor& k, const Tensor& v, const Tensor& out,
                                                              const Tensor& lse) {
  AttentionProblem problem = problem_of(options, q, k, v);
  const Cells cells = cells_of(options, q, k);
  const Tensor grad = readable(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  const int64_t n_biases = options.key_bias ? k.size(0) : 0;
  Tensor grad_bias = torch::stable::new_empty(q, {n_biases, q.size(1)}, ScalarType::Float);
  problem.grad_out = read_tokens(grad);
  problem.grad_lse = read_scalars(grad_lse, q.size(0), q.size(1), "grad_lse");
  problem.out = as_written(out);
  problem.lse = read_lse(lse, q);
  problem.grad_q = write_tokens(grad_q);
  problem.grad_k = write_tokens(grad_k);
  problem.grad_v = write_tokens(grad_v);
  if (options.key_bias) problem.grad_bias = write_scalars(grad_bias);
  run_attention_backward(problem, cells, q.size(1), dtype_of(q, "attention"));
  return {grad_q, grad_k, grad_v, grad_bias};
}

using Run = void (*)(const AttentionProblem&, const Cells&, int64_t n_heads, Dtype);

// Column sums and deletion effects; the former do not read `v`, `out` and `grad`.
Tensor sum_over_queries(const AttentionOptions& options, const Tensor& grad, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, Run run) {
  AttentionProblem problem = problem_of(options, q, k, v);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  Tensor result = torch::stable::new_empty(q, {k.size(0), q.size(1)}, ScalarType::Float);
  problem.grad_out = read_tokens(grad);
  problem.out = as_written(out);
  problem.lse = read_lse(lse, q);
  problem.grad_bias = write_scalars(result);
  run(problem, cells_of(options, q, k), q.size(1), dtype_of(q, "attention"));
  return result;
}

Tensor attention_column_sums(const AttentionOptions& options, const Tensor& q, const Tensor& k, const Tensor& lse) {
  return sum_over_queries(options, q, q, k, k, q, lse, run_column_sums);
}

Tensor attention_deletion_effects(const AttentionOptions& options, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& out, const Tensor& lse) {
  return sum_over_queries(options, grad_out, q, k, v, out, lse, run_deletion_effects);
}

}  // namespace
}  // namespace scfm

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def("attention_forward" SCFM_ATTENTION_FORWARD);
  m.def("attention_backward" SCFM_ATTENTION_BACKWARD);
  m.def("attention_column_sums" SCFM_ATTENTION_COLUMN_SUMS);
  m.def("attention_deletion_effects" SCFM_ATTENTION_DELETION_EFFECTS);
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CPU, m) {
  m.impl("attention_forward", SCFM_BOX_ATTENTION(scfm::attention_forward));
  m.impl("attention_backward", SCFM_BOX_ATTENTION(scfm::attention_backward));
  m.impl("attention_column_sums", SCFM_BOX_ATTENTION(scfm::attention_column_sums));
  m.impl("attention_deletion_effects", SCFM_BOX_ATTENTION(scfm::attention_deletion_effects));
}
