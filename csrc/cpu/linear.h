// The arguments of the linear layer's kernel.
#pragma once

#include "tensors.h"

namespace scfm {

// out = activation(input weight^T + bias) + residual. Each row is a "token" of one head.
struct LinearProblem {
  int64_t n_rows, n_inputs, n_outputs;
  ConstTokens input, weight, bias, residual;  // `data` of `bias` and `residual` is null where there is none
  Tokens out;
  bool relu;
};

constexpr int64_t kLinearRows = 96;  // rows per task: a multiple of the rows of every register tile

}  // namespace scfm
