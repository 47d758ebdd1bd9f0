// The encoders, from CSR rows to packed tokens. Results are bitwise identical to those of the NumPy code in scfm/encoding.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "csr.h"

namespace scfm::host {

// A special token and its value in every cell.
struct Special {
  int32_t token;
  float value;
};

// Arguments of all encoders.
struct Frame {
  size_t max_genes;  // upper limit on the genes of a cell
  std::optional<Special> front, back;
  int n_threads;
};

// The output; `values` is null if tokens have none.
struct Output {
  int32_t* tokens;
  float* values;
};

// Allocates memory for so many tokens, which may be more than will be needed.
using Allocate = std::function<Output(size_t)>;

// Each encoder fills what `allocate` returns from its start, and returns cell boundaries: first 0, last the tokens used.
using Boundaries = std::vector<int64_t>;

// Rank: by descending count / median, ties by ascending token. `medians` by token; each token of the vocabulary has one.
Boundaries encode_rank(const CsrTokens& csr, const Frame& frame, const double* medians, const Allocate& allocate);

struct BinRule {
  const double* quantiles;  // linspace(0, 1, n_edges)
  size_t n_edges;
  const double* unit;            // by token, in [0, 1): inference. Null in training:
  uint64_t draw;                 // then numbers are hashes of draw, row and token
  const int32_t* zero_tokens;    // tokens that every cell gets, ascending; null to leave zeros out
  size_t n_zero_tokens;
};
Boundaries encode_bin(const CsrTokens& csr, const Frame& frame, const BinRule& rule, const Allocate& allocate);

struct BucketRule {
  double target_sum;
  int n_buckets;
  const double* totals;  // by row; null for the sum over the tokens of the vocabulary
  const int32_t* zero_tokens;
  size_t n_zero_tokens;
};
Boundaries encode_bucket(const CsrTokens& csr, const Frame& frame, const BucketRule& rule, const Allocate& allocate);

}  // namespace scfm::host
