// The operators of scfm._C: schemas, checks of everything that memory safety rests on, and the call of the kernels.
// LibTorch stable ABI only: one build serves torch 2.10 and later.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/schedule.h"

namespace {

using scfm::AttentionProblem;
using scfm::Cells;
using scfm::cells_of;
using scfm::Dtype;
using scfm::ScalarType;
using scfm::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "attention: `", name, "` must hold float32, bfloat16 or float16.");
  }
}

void check_tokens(const Tensor& tensor, const Tensor& like, int64_t n_tokens, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "attention: `", name, "` must be on the CPU.");
  scfm::check_shape(tensor, like, n_tokens, name);
}

scfm::ConstTokens read_tokens(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
scfm::Tokens write_tokens(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }
scfm::Scalars write_scalars(const Tensor& t) {
  return {static_cast<float*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)};
}

scfm::ConstScalars read_scalars(const std::optional<Tensor>& t, int64_t n_tokens, int64_t n_heads, const char* name) {
  if (!t) return {nullptr, 0, 0};
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == n_tokens &&
                      t->size(1) == n_heads,
                  "attention: `", name, "` must be float32 of shape (", n_tokens, ", ", n_heads, ") on the CPU.");
  return {static_cast<const float*>(t->const_data_ptr()), t->stride(0), t->stride(1)};
}

AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_bias,
                            double scale) {
  check_tokens(q, q, q.size(0), "q");
  check_tokens(k, q, k.size(0), "k");
  check_tokens(v, q, k.size(0), "v");
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= scfm::kMaxWidth, "attention: the head width is ", q.size(2),
                  "; the kernels serve 1 to ", scfm::kMaxWidth, ".");
  AttentionProblem problem{};
  problem.head_dim = q.size(2);
  problem.scale = static_cast<float>(scale);
  problem.q = read_tokens(q);
  problem.k = read_tokens(k);
  problem.v = read_tokens(v);
  problem.key_bias = read_scalars(key_bias, k.size(0), q.size(1), "key_bias");
  return problem;
}

Tensor new_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
}

// Autograd may hand over an expanded gradient, whose strides are all zero.
Tensor readable(const Tensor& grad) {
  return grad.dim() == 3 && grad.size(2) > 1 && grad.stride(2) != 1 ? torch::stable::contiguous(grad) : grad;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens, std::optional<Tensor> cu_seqlens_k,
                                             std::optional<Tensor> n_known, std::optional<Tensor> key_bias,
                                             double scale) {
  AttentionProblem problem = problem_of(q, k, v, key_bias, scale);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, n_known);
  Tensor out = new_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  problem.out = write_tokens(out);
  problem.lse = write_scalars(lse);
  scfm::run_attention_forward(problem, cells, q.size(1), dtype_of(q, "q"));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> n_known, std::optional<Tensor> key_bias, double scale) {
  AttentionProblem problem = problem_of(q, k, v, key_bias, scale);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, n_known);
  const Tensor grad = readable(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  const scfm::ConstScalars lse_read = read_scalars(lse, q.size(0), q.size(1), "lse");
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  Tensor grad_bias = torch::stable::new_empty(q, {key_bias ? k.size(0) : 0, q.size(1)}, ScalarType::Float);
  problem.grad_out = read_tokens(grad);
  problem.grad_lse = read_scalars(grad_lse, q.size(0), q.size(1), "grad_lse");
  problem.out = {const_cast<void*>(out.const_data_ptr()), out.stride(0), out.stride(1)};
  problem.lse = {const_cast<float*>(lse_read.data), lse_read.token_stride, lse_read.head_stride};
  problem.grad_q = write_tokens(grad_q);
  problem.grad_k = write_tokens(grad_k);
  problem.grad_v = write_tokens(grad_v);
  if (key_bias) problem.grad_bias = write_scalars(grad_bias);
  scfm::run_attention_backward(problem, cells, q.size(1), dtype_of(q, "q"));
  return {grad_q, grad_k, grad_v, grad_bias};
}

// What both walks over the keys share; `v`, `out` and `grad` are those of `q` and `k` for column sums, which do not read them.
AttentionProblem key_problem(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor& lse, const std::optional<Tensor>& key_bias, double scale, Tensor& result) {
  AttentionProblem problem = problem_of(q, k, v, key_bias, scale);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  const scfm::ConstScalars lse_read = read_scalars(lse, q.size(0), q.size(1), "lse");
  result = torch::stable::new_empty(q, {k.size(0), q.size(1)}, ScalarType::Float);
  problem.grad_out = read_tokens(grad);
  problem.out = {const_cast<void*>(out.const_data_ptr()), out.stride(0), out.stride(1)};
  problem.lse = {const_cast<float*>(lse_read.data), lse_read.token_stride, lse_read.head_stride};
  problem.grad_bias = write_scalars(result);
  return problem;
}

Tensor attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens,
                             std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> n_known,
                             std::optional<Tensor> key_bias, double scale) {
  Tensor result = lse;
  const AttentionProblem problem = key_problem(q, q, k, k, q, lse, key_bias, scale, result);
  scfm::run_column_sums(problem, cells_of(q, k, cu_seqlens, cu_seqlens_k, n_known), q.size(1), dtype_of(q, "q"));
  return result;
}

Tensor attention_deletion_effects(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                  std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> n_known,
                                  std::optional<Tensor> key_bias, double scale) {
  Tensor result = lse;
  const AttentionProblem problem = key_problem(grad_out, q, k, v, out, lse, key_bias, scale, result);
  scfm::run_deletion_effects(problem, cells_of(q, k, cu_seqlens, cu_seqlens_k, n_known), q.size(1), dtype_of(q, "q"));
  return result;
}

scfm::LinearAttentionProblem linear_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& projection,
                                            double floor) {
  scfm::LinearAttentionProblem problem{};
  static_cast<AttentionProblem&>(problem) =
      problem_of(q, k, v, std::nullopt, 1.0 / std::sqrt(std::sqrt(static_cast<double>(q.size(2)))));
  STD_TORCH_CHECK(projection.is_cpu() && projection.scalar_type() == ScalarType::Float && projection.dim() == 2 &&
                      projection.size(0) >= 1 && projection.size(1) == q.size(2) && projection.is_contiguous(),
                  "linear_attention: `projection` must be contiguous float32 of shape (features, ", q.size(2),
                  ") on the CPU.");
  problem.projection = static_cast<const float*>(projection.const_data_ptr());
  problem.n_features = projection.size(0);
  problem.floor = static_cast<float>(floor);
  return problem;
}

Tensor linear_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                std::optional<Tensor> cu_seqlens_k, const Tensor& projection, double floor) {
  scfm::LinearAttentionProblem problem = linear_problem(q, k, v, projection, floor);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, std::nullopt);
  Tensor out = new_like(q);
  problem.out = write_tokens(out);
  scfm::run_linear_attention_forward(problem, cells, q.size(1), dtype_of(q, "q"));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out,
                                                             const Tensor& cu_seqlens,
                                                             std::optional<Tensor> cu_seqlens_k,
                                                             const Tensor& projection, double floor) {
  scfm::LinearAttentionProblem problem = linear_problem(q, k, v, projection, floor);
  const Cells cells = cells_of(q, k, cu_seqlens, cu_seqlens_k, std::nullopt);
  const Tensor grad = readable(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  problem.grad_out = read_tokens(grad);
  problem.out = {const_cast<void*>(out.const_data_ptr()), out.stride(0), out.stride(1)};
  problem.grad_q = write_tokens(grad_q);
  problem.grad_k = write_tokens(grad_k);
  problem.grad_v = write_tokens(grad_v);
  scfm::run_linear_attention_backward(problem, cells, q.size(1), dtype_of(q, "q"));
  return {grad_q, grad_k, grad_v};
}

// Rows of a matrix as the tokens of one head.
scfm::ConstTokens read_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == like.scalar_type() && t.size(0) == rows &&
                      t.size(1) == columns && (columns <= 1 || t.stride(1) == 1),
                  "linear: `", name, "` must be (", rows, ", ", columns,
                  ") on the CPU, of the dtype of `input`, with a contiguous last axis.");
  return {t.const_data_ptr(), t.stride(0), 0};
}

Tensor linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              bool relu) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2, "linear: `input` and `weight` must be matrices.");
  scfm::LinearProblem problem{};
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
  scfm::run_linear(problem, dtype_of(input, "input"));
  return out;
}

int64_t cpu_isa() {
  STD_TORCH_CHECK(!scfm::forced_isa_is_missing(),
                  "SCFM_FORCE_ISA names an instruction set that this machine does not have; use one of portable, avx2, "
                  "avx512, avx512_bf16, amx.");
  return static_cast<int64_t>(scfm::active_isa());
}

double cpu_peak_gflops(bool bfloat16) { return scfm::peak_gflops(bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, "
      "Tensor? key_bias, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, Tensor? key_bias, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_column_sums(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, "
      "Tensor? key_bias, float scale) -> Tensor");
  m.def(
      "attention_deletion_effects(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, Tensor? key_bias, float scale) -> Tensor");
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, "
      "Tensor projection, float floor) -> Tensor");
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor cu_seqlens, "
      "Tensor? cu_seqlens_k, Tensor projection, float floor) -> (Tensor, Tensor, Tensor)");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor");
  m.def("cpu_isa() -> int");
  m.def("cpu_peak_gflops(bool bfloat16) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_column_sums", TORCH_BOX(&attention_column_sums));
  m.impl("attention_deletion_effects", TORCH_BOX(&attention_deletion_effects));
  m.impl("linear_attention_forward", TORCH_BOX(&linear_attention_forward));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("linear", TORCH_BOX(&linear));
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_peak_gflops", TORCH_BOX(&cpu_peak_gflops));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
