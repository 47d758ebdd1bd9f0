// The arguments of the cross-entropy kernel.
#pragma once

#include "tensors.h"

namespace scfm {

// loss = -log softmax(logits + bias)[target] of each row; its gradient overwrites the logits.
struct CrossEntropyProblem {
  int64_t n_rows, n_classes;
  Tokens logits;     // each row is a "token" of one head
  const float* bias;  // null where there is none
  const int64_t* target;
  float* loss;           // one per row
  float* grad_bias;      // one row per task: the sum over its rows
  int64_t grad_stride;   // between rows of `grad_bias`, in elements: the classes, padded
};

// Rows per task. It is the same for every number of threads, so the sums over rows are too.
constexpr int64_t kCrossEntropyRows = 16;

// Classes are padded to a multiple of this: two of the widest vectors.
constexpr int64_t kClassStep = 32;

}  // namespace scfm
