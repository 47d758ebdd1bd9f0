#include "rows.h"

namespace scfm::host {

Boundaries encode_rank(const CsrTokens& csr, const Frame& frame, const double* medians, const Allocate& allocate) {
  const auto make_encoder = [&] {
    return [&](Workspace& work, int64_t) {
      const size_t size = work.cell.size;
      const int32_t* tokens = work.cell.tokens.data();
      for (size_t i = 0; i < size; ++i) work.scores[i] = work.cell.counts[i] / medians[tokens[i]];
      order_by_score(work.scores.data(), tokens, size, work.order.data(), work.sort);
      work.out_size = std::min(size, frame.max_genes);
      for (size_t i = 0; i < work.out_size; ++i) work.out_tokens[i] = tokens[work.order[i]];
    };
  };
  return encode_rows(csr, frame, Order::any, nullptr, allocate, make_encoder);
}

}  // namespace scfm::host
