// The options and schemas of the attention operators, written once for every device.
//
// To add an option: a word in SCFM_ATTENTION_OPTIONS, a field of AttentionOptions, and a parameter of WithOptions. Then the
// problem that each kernel reads (cpu/attention.h, cuda/attention.h), and scfm/ops/options.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"

#define SCFM_ATTENTION_OPTIONS "Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, Tensor? key_bias, float scale"

#define SCFM_ATTENTION_FORWARD "(Tensor q, Tensor k, Tensor v, " SCFM_ATTENTION_OPTIONS ") -> (Tensor, Tensor)"
#define SCFM_ATTENTION_BACKWARD                                                                        \
  "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "         \
  SCFM_ATTENTION_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)"
#define SCFM_ATTENTION_COLUMN_SUMS "(Tensor q, Tensor k, Tensor lse, " SCFM_ATTENTION_OPTIONS ") -> Tensor"
#define SCFM_ATTENTION_DELETION_EFFECTS                                                                \
  "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " SCFM_ATTENTION_OPTIONS ") -> Tensor"

namespace scfm {

// Hidden like torch's tensors, of which it holds references.
struct __attribute__((visibility("hidden"))) AttentionOptions {
  const Tensor& cu_seqlens;  // boundaries of the queries, and of the keys without `cu_seqlens_k`
  const std::optional<Tensor>& cu_seqlens_k;
  const std::optional<Tensor>& n_known;  // the generative mask
  const std::optional<Tensor>& key_bias;
  double scale;
};

// Turns a function of options and tensors into one that takes its arguments in the order of the schema.
template <auto kFunction>
struct WithOptions;
template <class Result, class... Tensors, Result (*kFunction)(const AttentionOptions&, Tensors...)>
struct WithOptions<kFunction> {
  static Result call(Tensors... tensors, const Tensor& cu_seqlens,
                     std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> n_known,
                     std::optional<Tensor> key_bias, double scale) {
    return kFunction({cu_seqlens, cu_seqlens_k, n_known, key_bias, scale}, tensors...);
  }
};

inline Cells cells_of(const AttentionOptions& options, const Tensor& q, const Tensor& k) {
  return cells_of(q, k, options.cu_seqlens, options.cu_seqlens_k, options.n_known);
}

}  // namespace scfm

#define SCFM_BOX_ATTENTION(function) TORCH_BOX(&(scfm::WithOptions<&function>::call))
