// The arguments of the attention kernels: softmax attention, its gradients, column sums and deletion effects.
#pragma once

#include "tensors.h"

namespace scfm {

struct AttentionProblem {
  int64_t head_dim;
  float scale;
  ConstTokens q, k, v;
  ConstScalars key_bias;
  // Written by the forward, read by the backward.
  Tokens out;
  Scalars lse;
  // Used by the backward only. Column sums and deletion effects are written to `grad_bias`.
  ConstTokens grad_out;
  ConstScalars grad_lse;
  Tokens grad_q, grad_k, grad_v;
  Scalars grad_bias;
};

// One piece of work: some queries of one cell, one head. Token numbers count from the start of the batch.
struct Task {
  int64_t head;
  int64_t query_begin, query_end;
  int64_t key_begin, n_keys;  // keys that every query attends to
  int64_t own_begin;          // queries from here on attend to their own key as well
  bool keys_are_queries;      // self-attention: a token has one number on both sides
};

// Upper limit on the queries of a forward task: enough that packing the keys for them costs next to nothing. It is the same
// for every batch and number of threads, so a cell's result is too.
constexpr int64_t kQueriesPerTask = 1024;

constexpr int64_t kMaxWidth = 256;  // largest head width

}  // namespace scfm
