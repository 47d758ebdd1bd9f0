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
  int64_t work;               // what tasks are sorted by
  // The keys of a long cell are divided among several tasks of the backward, numbered by `part`. Each adds up the gradients
  // of the queries over its keys in floats of its own: `grad_query_size` per part.
  int64_t part, n_parts;
  float* grad_query;
  int64_t grad_query_size;
};

// Upper limit on the queries of a forward task: enough that packing the keys for them costs next to nothing. It is the same
// for every batch and number of threads, so a cell's result is too.
constexpr int64_t kQueriesPerTask = 1024;

// A backward task has all keys of a cell, up to this number.
constexpr int64_t kUndividedKeys = 2048;

// Upper limit on the keys of a part of a longer cell, and what parts are rounded to: a multiple of the blocks of every engine.
// Smaller parts would pack the queries more often.
constexpr int64_t kKeysPerTask = 1152, kKeysOfBlocks = 384;

constexpr int64_t kMaxWidth = 256;  // largest head width

}  // namespace scfm
