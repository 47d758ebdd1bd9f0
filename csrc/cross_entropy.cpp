// Cross-entropy and its gradient on the CPU: the operator and its checks. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_tensors.h"

namespace scfm {
namespace {

void check_targets(const Tensor& target, int64_t n_rows, int64_t n_classes) {
  STD_TORCH_CHECK(target.is_cpu() && target.dim() == 1 && target.scalar_type() == ScalarType::Long &&
                      target.size(0) == n_rows && (n_rows <= 1 || target.stride(0) == 1),
                  "cross_entropy: `target` must be (", n_rows, ") on the CPU, contiguous int64.");
  const int64_t* classes = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0; i < n_rows; i++)
    STD_TORCH_CHECK(classes[i] >= 0 && classes[i] < n_classes, "cross_entropy: `target` is ", classes[i], " in row ", i,
                    "; it must be at least 0 and below ", n_classes, ", the number of classes.");
}

std::tuple<Tensor, Tensor> cross_entropy_gradient(Tensor logits, std::optional<Tensor> bias, const Tensor& target) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "cross_entropy: `logits` must be a matrix on the CPU with a contiguous last axis.");
  CrossEntropyProblem problem{};
  problem.n_rows = logits.size(0);
  problem.n_classes = logits.size(1);
  check_targets(target, problem.n_rows, problem.n_classes);
  problem.logits = {logits.mutable_data_ptr(), logits.stride(0), 0};
  problem.target = static_cast<const int64_t*>(target.const_data_ptr());
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->scalar_type() == ScalarType::Float &&
                        bias->size(0) == problem.n_classes && (problem.n_classes <= 1 || bias->stride(0) == 1),
                    "cross_entropy: `bias` must be (", problem.n_classes, ") on the CPU, contiguous float32.");
    problem.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  Tensor loss = torch::stable::new_empty(logits, {problem.n_rows}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(logits, {problem.n_classes}, ScalarType::Float);
  problem.loss = static_cast<float*>(loss.mutable_data_ptr());
  run_cross_entropy(problem, static_cast<float*>(grad_bias.mutable_data_ptr()), dtype_of(logits, "cross_entropy"));
  return {loss, grad_bias};
}

}  // namespace
}  // namespace scfm

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def("cross_entropy_gradient(Tensor(a!) logits, Tensor? bias, Tensor target) -> (Tensor loss, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CPU, m) {
  m.impl("cross_entropy_gradient", TORCH_BOX(&scfm::cross_entropy_gradient));
}
