// The arguments of the linear attention kernels.
#pragma once

#include "attention.h"

namespace scfm {

// Random features replace the softmax. `scale` is a factor on queries and on keys, head width ** -0.25. There is no bias and no
// log-sum-exp.
struct LinearAttentionProblem : AttentionProblem {
  const float* projection;  // [n_features][head_dim]
  int64_t n_features;
  float floor;  // added to every feature
};

}  // namespace scfm
