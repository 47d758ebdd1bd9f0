// The kernels of one head width, and the launches of each operator.
#pragma once

#include "attention_backward.h"
#include "attention_backward_queries.h"
#include "attention_forward.h"
#include "attention_keys.h"
#include "launch.h"

namespace scfm::cuda {

template <class Element, int kWidth>
struct Launches {
  using Forward = ForwardShape<kWidth>;
  using Backward = BackwardShape<kWidth>;
  using Queries = QueryShape<kWidth>;

  static int64_t query_blocks(const Problem& p) { return static_cast<int64_t>(p.n_query_tiles) * p.n_heads; }
  static int64_t key_blocks(const Problem& p) { return static_cast<int64_t>(p.n_key_tiles) * p.n_heads; }

  static const char* forward(const Problem& p, void* stream) {
    // The kernel without bias scales after taking the maximum, which is wrong for a negative scale.
    if (p.key_bias.data == nullptr && p.scale > 0.f)
      return launch<attention_forward<Element, kWidth, false>>(query_blocks(p), Forward::kThreads, Forward::kSharedBytes,
                                                               stream, p);
    return launch<attention_forward<Element, kWidth, true>>(query_blocks(p), Forward::kThreads, Forward::kSharedBytes,
                                                            stream, p);
  }

  template <Purpose kPurpose>
  static const char* rows(const Problem& p, void* stream) {
    return launch<attention_rows<Element, kWidth, kPurpose>>(query_blocks(p), kRowThreads, 0, stream, p);
  }

  template <bool kAddGradQ>
  static const char* keys(const Problem& p, void* stream) {
    return launch<attention_backward_keys<Element, kWidth, kAddGradQ>>(key_blocks(p), Backward::kThreads,
                                                                       Backward::kSharedBytes, stream, p);
  }

  static const char* backward(const Problem& p, bool deterministic, void* stream) {
    const char* error = rows<Purpose::kGradients>(p, stream);
    if constexpr (kNarrow<Element>)
      if (error == nullptr) error = launch<attention_bounds<Element, kWidth>>(key_blocks(p), kRowThreads, 0, stream, p);
    if (error == nullptr) error = deterministic ? keys<false>(p, stream) : keys<true>(p, stream);
    if (error != nullptr) return error;
    if (deterministic)
      return launch<attention_backward_queries<Element, kWidth>>(query_blocks(p), Queries::kThreads, Queries::kSharedBytes,
                                                                 stream, p);
    const int64_t chunks = p.n_queries * p.n_heads * (kWidth / 8);
    return launch<attention_round_queries<Element, kWidth>>((chunks + kRoundThreads - 1) / kRoundThreads, kRoundThreads, 0,
                                                            stream, p);
  }

  template <bool kDeletion>
  static const char* key_sums(const Problem& p, void* stream) {
    const char* error = rows<kDeletion ? Purpose::kDeletionEffects : Purpose::kColumnSums>(p, stream);
    if (error != nullptr) return error;
    return launch<attention_key_sums<Element, kWidth, kDeletion>>(key_blocks(p), Backward::kThreads,
                                                                  Backward::kSharedBytes - Backward::kScoreBytes, stream, p);
  }

  static constexpr AttentionKernels table{ready, forward, backward, key_sums<false>, key_sums<true>};
};

template <int kWidth>
const AttentionKernels* kernels_of(Dtype dtype) {
  return dtype == Dtype::kHalf ? &Launches<Half, kWidth>::table : &Launches<BFloat16, kWidth>::table;
}

}  // namespace scfm::cuda
