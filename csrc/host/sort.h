// Sorts of a few thousand pairs in two radix passes: comparison sorts would cost ten times the rest of the encoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace scfm::host {

// Working memory of the sorts, one per thread.
struct SortScratch {
  std::vector<uint32_t> narrow_first, narrow_second;
  std::vector<uint64_t> wide_first, wide_second;
};

// Orders 0..size - 1 by descending score, ties by ascending token, into `order`. Scores are positive and finite.
void order_by_score(const double* scores, const int32_t* tokens, size_t size, uint32_t* order, SortScratch& scratch);

// Orders 0..size - 1 by ascending token into `order`; stable.
void order_by_token(const int32_t* tokens, size_t size, int32_t n_tokens, uint32_t* order, SortScratch& scratch);

}  // namespace scfm::host
