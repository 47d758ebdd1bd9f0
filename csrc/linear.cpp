// A linear layer on the CPU: the operator and its checks. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu_tensors.h"

namespace scfm {
namespace {

// Rows of a matrix as the tokens of one head.
ConstTokens read_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == like.scalar_type() && t.size(0) == rows &&
                      t.size(1) == columns && (columns <= 1 || t.stride(1) == 1),
                  "linear: `", name, "` must be (", rows, ", ", columns,
                  ") on the CPU, of the dtype of `input`, with a contiguous last axis.");
  return {t.const_data_ptr(), t.stride(0), 0};
}

Tensor linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              bool relu) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2, "linear: `input` and `weight` must be matrices.");
  LinearProblem problem{};
  problem.n_rows = input.size(0);
  problem.n_inputs = input.size(1);
  problem.n_outputs = weight.size(0);
  problem.input = read_matrix(input, input, problem.n_rows, problem.n_inputs, "input");
  problem.weight = read_matrix(weight, input, problem.n_outputs, problem.n_inputs, "weight");
  if (residual) problem.residual = read_matrix(*residual, input, problem.n_rows, problem.n_outputs, "residual");
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->scalar_type() == input.scalar_type() &&
                        bias->size(0) == problem.n_outputs && (problem.n_outputs <= 1 || bias->stride(0) == 1),
                    "linear: `bias` must be (", problem.n_outputs, ") on the CPU, contiguous, of the dtype of `input`.");
    problem.bias = {bias->const_data_ptr(), 0, 0};
  }
  Tensor out = torch::stable::new_empty(input, {problem.n_rows, problem.n_outputs});
  problem.out = {out.mutable_data_ptr(), out.stride(0), 0};
  problem.relu = relu;
  run_linear(problem, dtype_of(input, "linear"));
  return out;
}

}  // namespace
}  // namespace scfm

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CPU, m) { m.impl("linear", TORCH_BOX(&scfm::linear)); }
