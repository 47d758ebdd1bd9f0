#include <cmath>

#include "rows.h"
#include "select.h"
#include "zeros.h"

namespace scfm::host {
namespace {

// One step of SplitMix64, as in scfm/encoding/hashing.py.
uint64_t mix(uint64_t state) {
  state += 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

double unit_of(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// Purposes of random numbers; the same as in scfm/encoding/bin.py.
constexpr uint64_t kTie = 1, kSample = 2;

// A number in [0, 1) of (draw, row, purpose, token).
class Draws {
 public:
  Draws(uint64_t draw, int64_t row, uint64_t purpose)
      : state_(mix(mix(draw) ^ (static_cast<uint64_t>(row) * 4 + purpose))) {}
  double operator()(int32_t token) const { return unit_of(mix(state_ ^ static_cast<uint64_t>(token))); }

 private:
  uint64_t state_;
};

// The bins that a value may take: above `below`, up to `upto`.
struct Span {
  double upto, below;
};

// Quantile edges of one cell, and the span of bins of a value.
class Binner {
 public:
  explicit Binner(const BinRule& rule) : rule_(rule), edges_(rule.n_edges), spans_(kTallied) {}

  // Prepares for a cell with these positive counts, at least one.
  void prepare(const double* counts, size_t size) {
    largest_ = tally_limit(counts, size);
    if (is_tallied()) {
      tally_.clear();
      tally_.count(counts, size, largest_);
      prepare_tallied(size);
    } else {
      sorted_.assign(counts, counts + size);
      std::sort(sorted_.begin(), sorted_.end());
      set_edges(size, [&](size_t position) { return sorted_[position]; });
    }
  }

  Span operator()(double count) const {
    if (is_tallied()) return spans_[static_cast<size_t>(static_cast<int>(count))];
    const auto upto = std::upper_bound(edges_.begin(), edges_.end(), count);
    const auto below = std::lower_bound(edges_.begin(), upto, count);
    return {static_cast<double>(upto - edges_.begin()), static_cast<double>(below - edges_.begin())};
  }

  // Prepares the choice of the `most` largest counts of the cell.
  void prepare(Selector& selector, const double* counts, size_t size, size_t most) const {
    if (is_tallied()) {
      selector.prepare(tally_, largest_, most);
    } else {
      selector.prepare(counts, size, most);
    }
  }

 private:
  bool is_tallied() const { return largest_ < kTallied; }

  void prepare_tallied(size_t size) {
    size_t value = 0, upto = 0;  // `upto` counts are at most `value`
    set_edges(size, [&](size_t position) {
      while (upto <= position) upto += tally_[++value];
      return static_cast<double>(value);
    });
    size_t below_edge = 0, upto_edge = 0;
    for (size_t count = 1; count <= largest_; ++count) {
      if (tally_[count] != 0) spans_[count] = span_of(static_cast<double>(count), below_edge, upto_edge);
    }
  }

  // Linear interpolation as numpy.quantile rounds it. `at` is called with ascending positions.
  template <typename At>
  void set_edges(size_t size, const At& at) {
    for (size_t edge = 0; edge < rule_.n_edges; ++edge) {
      const double position = rule_.quantiles[edge] * static_cast<double>(size - 1);
      const size_t low = static_cast<size_t>(std::floor(position));
      const double step = position - static_cast<double>(low);
      if (edge == 0 || low != low_) {
        a_ = edge > 0 && low == low_ + 1 ? b_ : at(low);
        b_ = at(std::min(low + 1, size - 1));
        low_ = low;
      }
      edges_[edge] = step >= 0.5 ? b_ - (b_ - a_) * (1 - step) : a_ + (b_ - a_) * step;
    }
  }

  // Values come in ascending order, so both pointers only advance.
  Span span_of(double value, size_t& below, size_t& upto) const {
    while (below < edges_.size() && edges_[below] < value) ++below;
    upto = std::max(upto, below);
    while (upto < edges_.size() && edges_[upto] <= value) ++upto;
    return {static_cast<double>(upto), static_cast<double>(below)};
  }

  const BinRule& rule_;
  std::vector<double> edges_;
  Tally tally_;
  std::vector<Span> spans_;
  std::vector<double> sorted_;
  double a_ = 0, b_ = 0;
  size_t low_ = 0;
  size_t largest_ = 0;
};

// ceil(unit (below - upto) + upto), whose argument is in 0..n_edges, without a call.
float bin_of(Span span, double unit) {
  const double position = unit * (span.below - span.upto) + span.upto;
  const int whole = static_cast<int>(position);
  return static_cast<float>(whole + (position > static_cast<double>(whole)));
}

// One thread's bin encoder.
class BinEncoder {
 public:
  BinEncoder(const BinRule& rule, size_t max_genes, const Zeros& zeros)
      : rule_(rule), max_genes_(max_genes), zeros_(zeros), binner_(rule) {}

  void operator()(Workspace& work, int64_t row) {
    const Cell& cell = work.cell;
    if (cell.size > 0) binner_.prepare(cell.counts.data(), cell.size);
    if (zeros_.any()) {
      std::copy_n(cell.tokens.begin(), cell.size, work.out_tokens.begin());
      std::copy_n(cell.counts.begin(), cell.size, work.scores.begin());
      bin(work, cell.size, row);
      zeros_.add(work);
      if (rule_.unit == nullptr && work.out_size > max_genes_) draw_scores(work, row);
      keep_best(work, max_genes_, selector_);
    } else {
      bin(work, keep(work, row), row);
    }
  }

 private:
  // Copies the tokens and counts that fit the context; returns how many.
  size_t keep(Workspace& work, int64_t row) {
    const Cell& cell = work.cell;
    work.out_size = cell.size;
    std::copy_n(cell.tokens.begin(), cell.size, work.out_tokens.begin());
    if (cell.size <= max_genes_) {
      std::copy_n(cell.counts.begin(), cell.size, work.scores.begin());
      return cell.size;
    }
    const double* scores = cell.counts.data();
    if (rule_.unit != nullptr) {
      binner_.prepare(selector_, scores, cell.size, max_genes_);
    } else {
      draw_scores(work, row);
      selector_.prepare_even(work.scores.data(), cell.size, max_genes_);
      scores = work.scores.data();
    }
    size_t kept = 0;
    for (size_t i = 0; i < cell.size; ++i) {
      const bool keeps = selector_.keeps(scores[i]);
      work.out_tokens[kept] = cell.tokens[i];
      work.scores[kept] = cell.counts[i];
      kept += keeps;
    }
    return kept;
  }

  // Scores of a random sample, for `out_tokens`.
  void draw_scores(Workspace& work, int64_t row) const {
    const Draws samples(rule_.draw, row, kSample);
    for (size_t i = 0; i < work.out_size; ++i) work.scores[i] = samples(work.out_tokens[i]);
  }

  // Bins the counts in `scores` of the first `size` of `out_tokens`.
  void bin(Workspace& work, size_t size, int64_t row) const {
    const Draws ties(rule_.draw, row, kTie);
    for (size_t i = 0; i < size; ++i) {
      const int32_t token = work.out_tokens[i];
      const double unit = rule_.unit != nullptr ? rule_.unit[token] : ties(token);
      work.out_values[i] = bin_of(binner_(work.scores[i]), unit);
    }
    work.out_size = size;
  }

  const BinRule& rule_;
  size_t max_genes_;
  const Zeros& zeros_;
  Binner binner_;
  Selector selector_;
};

}  // namespace

Boundaries encode_bin(const CsrTokens& csr, const Frame& frame, const BinRule& rule, const Allocate& allocate) {
  const Zeros zeros(rule.zero_tokens, rule.n_zero_tokens, csr.n_tokens);
  return encode_rows(csr, frame, Order::by_token, rule.zero_tokens != nullptr ? &rule.n_zero_tokens : nullptr, allocate,
                     [&] { return BinEncoder(rule, frame.max_genes, zeros); });
}

}  // namespace scfm::host
