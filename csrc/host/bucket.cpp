#include <cmath>

#include "rows.h"
#include "zeros.h"

namespace scfm::host {
namespace {

// One thread's bucket encoder.
class BucketEncoder {
 public:
  BucketEncoder(const BucketRule& rule, size_t max_genes, const Zeros& zeros)
      : rule_(rule), max_genes_(max_genes), zeros_(zeros) {
    // Bucket k starts at log2(1 + x) = k.
    for (int bucket = 1; bucket < rule.n_buckets; ++bucket) borders_.push_back(std::exp2(bucket) - 1.0);
  }

  void operator()(Workspace& work, int64_t row) {
    const Cell& cell = work.cell;
    double total = 0.0;
    if (rule_.totals != nullptr) {
      total = rule_.totals[row];
    } else {
      for (size_t i = 0; i < cell.size; ++i) total += cell.counts[i];
    }
    if (!(total > 0.0)) total = 1.0;
    for (size_t i = 0; i < cell.size; ++i) {
      const double value = cell.counts[i] / total * rule_.target_sum;
      int bucket = 0;
      for (const double border : borders_) bucket += value >= border;
      work.out_values[i] = static_cast<float>(bucket);
    }
    work.out_size = cell.size;
    std::copy_n(cell.tokens.begin(), cell.size, work.out_tokens.begin());
    std::copy_n(cell.counts.begin(), cell.size, work.scores.begin());
    zeros_.add(work);
    keep_best(work, max_genes_, selector_);
  }

 private:
  const BucketRule& rule_;
  size_t max_genes_;
  const Zeros& zeros_;
  std::vector<double> borders_;
  Selector selector_;
};

}  // namespace

Boundaries encode_bucket(const CsrTokens& csr, const Frame& frame, const BucketRule& rule, const Allocate& allocate) {
  const Zeros zeros(rule.zero_tokens, rule.n_zero_tokens, csr.n_tokens);
  return encode_rows(csr, frame, Order::by_token, rule.zero_tokens != nullptr ? &rule.n_zero_tokens : nullptr, allocate,
                     [&] { return BucketEncoder(rule, frame.max_genes, zeros); });
}

}  // namespace scfm::host
