// Linear attention on the CPU: operators and their checks. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "cpu_tensors.h"

namespace scfm {
namespace {

LinearAttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& projection,
                                  double floor) {
  check_qkv(q, k, v);
  STD_TORCH_CHECK(projection.is_cpu() && projection.scalar_type() == ScalarType::Float && projection.dim() == 2 &&
                      projection.size(0) >= 1 && projection.size(1) == q.size(2) && projection.is_contiguous(),
                  "linear_attention: `projection` must be contiguous float32 of shape (features, ", q.size(2),
                  ") on the CPU.");
  LinearAttentionProblem problem{};
  problem.head_dim = q.size(2);
  problem.scale = static_cast<float>(1.0 / std::sqrt(std::sqrt(static_cast<double>(q.size(2)))));
  problem.q = read_tokens(q);
  problem.k = read_tokens(k);
  problem.v = read_tokens(v);
  problem.projection = static_cast<const float*>(projection.const_data_ptr());
  problem.n_features = projection.size(0);
  problem.floor = static_cast<float>(floor);
  return problem;
}

Tensor linear_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                std::optional<Tensor> cu_seqlens_k, const Tensor& projection, double floor) {
  LinearAttentionProblem problem = problem_of(q, k, v, projection, floor);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, std::nullopt);
  Tensor out = new_like(q);
  problem.out = write_tokens(out);
  run_linear_attention_forward(problem, cells, q.size(1), dtype_of(q, "linear_attention"));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out,
                                                             const Tensor& cu_seqlens,
                                                             std::optional<Tensor> cu_seqlens_k,
                                                             const Tensor& projection, double floor) {
  LinearAttentionProblem problem = problem_of(q, k, v, projection, floor);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, std::nullopt);
  const Tensor grad = readable(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  problem.grad_out = read_tokens(grad);
  problem.out = as_written(out);
  problem.grad_q = write_tokens(grad_q);
  problem.grad_k = write_tokens(grad_k);
  problem.grad_v = write_tokens(grad_v);
  run_linear_attention_backward(problem, cells, q.size(1), dtype_of(q, "linear_attention"));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace scfm

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, "
      "Tensor projection, float floor) -> Tensor");
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor cu_seqlens, "
      "Tensor? cu_seqlens_k, Tensor projection, float floor) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&scfm::linear_attention_forward));
  m.impl("linear_attention_backward", TORCH_BOX(&scfm::linear_attention_backward));
}
