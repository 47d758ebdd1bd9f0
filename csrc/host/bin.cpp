#include <cmath>

#include "rows.h"
#include "select.h"
#include "zeros.h"

namespace scfm::host {
namespace {

// SplitMix64's finaliser, as scfm/encoding/hashing.py has it.
uint64_t mix(uint64_t state) {
  state += 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

double unit_of(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// What a number is drawn for; the same as in scfm/encoding/bin.py.
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

// Quantile edges of one cell and the span of bins of each of its values.
class Binner {
 public:
  explicit Binner(const BinRule& rule) : rule_(rule), edges_(rule.n_edges), tally_(kTallied, 0), spans_(kTallied) {}

  // Calls use(place, span) for each of the `counts`, which are positive.
  template <typename Use>
  void run(const double* counts, size_t size, const Use& use) {
    if (size == 0) return;
    if (can_tally(counts, size)) {
      run_tallied(counts, size, use);
    } else {
      run_sorted(counts, size, use);
    }
  }

 private:
  template <typename Use>
  void run_tallied(const double* counts, size_t size, const Use& use) {
    size_t most = 0;
    for (size_t i = 0; i < size; ++i) {
      const size_t count = static_cast<size_t>(counts[i]);
      ++tally_[count];
      most = std::max(most, count);
    }
    size_t value = 0, upto = 0;  // `upto` values are at most `value`
    const auto at = [&](size_t place) {
      while (upto <= place) upto += tally_[++value];
      return static_cast<double>(value);
    };
    set_edges(size, at);
    size_t below_edge = 0, upto_edge = 0;
    for (size_t count = 1; count <= most; ++count) {
      if (tally_[count] != 0) spans_[count] = span_of(static_cast<double>(count), below_edge, upto_edge);
      tally_[count] = 0;
    }
    for (size_t i = 0; i < size; ++i) use(i, spans_[static_cast<size_t>(counts[i])]);
  }

  template <typename Use>
  void run_sorted(const double* counts, size_t size, const Use& use) {
    sorted_.assign(counts, counts + size);
    std::sort(sorted_.begin(), sorted_.end());
    set_edges(size, [&](size_t place) { return sorted_[place]; });
    for (size_t i = 0; i < size; ++i) {
      const auto upto = std::upper_bound(edges_.begin(), edges_.end(), counts[i]);
      const auto below = std::lower_bound(edges_.begin(), upto, counts[i]);
      use(i, Span{static_cast<double>(upto - edges_.begin()), static_cast<double>(below - edges_.begin())});
    }
  }

  // Linear interpolation as numpy.quantile rounds it. `at(place)` is asked for rising places.
  template <typename At>
  void set_edges(size_t size, const At& at) {
    for (size_t edge = 0; edge < rule_.n_edges; ++edge) {
      const double place = rule_.quantiles[edge] * static_cast<double>(size - 1);
      const size_t low = static_cast<size_t>(std::floor(place));
      const double step = place - static_cast<double>(low);
      if (edge == 0 || low != low_) {
        a_ = edge > 0 && low == low_ + 1 ? b_ : at(low);
        b_ = at(std::min(low + 1, size - 1));
        low_ = low;
      }
      edges_[edge] = step >= 0.5 ? b_ - (b_ - a_) * (1 - step) : a_ + (b_ - a_) * step;
    }
  }

  // Values are asked for in rising order, so both pointers only move on.
  Span span_of(double value, size_t& below, size_t& upto) const {
    while (below < edges_.size() && edges_[below] < value) ++below;
    upto = std::max(upto, below);
    while (upto < edges_.size() && edges_[upto] <= value) ++upto;
    return {static_cast<double>(upto), static_cast<double>(below)};
  }

  const BinRule& rule_;
  std::vector<double> edges_;
  std::vector<uint32_t> tally_;
  std::vector<Span> spans_;
  std::vector<double> sorted_;
  double a_ = 0, b_ = 0;
  size_t low_ = 0;
};

float bin_of(Span span, double unit) {
  return static_cast<float>(std::ceil(unit * (span.below - span.upto) + span.upto));
}

// One thread's bin encoder.
class BinEncoder {
 public:
  BinEncoder(const BinRule& rule, size_t max_genes, const Zeros& zeros)
      : rule_(rule), max_genes_(max_genes), zeros_(zeros), binner_(rule) {}

  void operator()(Workspace& work, int64_t row) {
    const Cell& cell = work.cell;
    const Draws ties(rule_.draw, row, kTie);
    binner_.run(cell.counts.data(), cell.size, [&](size_t i, Span span) {
      const double unit = rule_.unit != nullptr ? rule_.unit[cell.tokens[i]] : ties(cell.tokens[i]);
      work.out_values[i] = bin_of(span, unit);
    });
    work.out_size = cell.size;
    std::copy_n(cell.tokens.begin(), cell.size, work.out_tokens.begin());
    std::copy_n(cell.counts.begin(), cell.size, work.scores.begin());
    zeros_.add(work);
    if (rule_.unit == nullptr && work.out_size > max_genes_) {
      const Draws samples(rule_.draw, row, kSample);
      for (size_t i = 0; i < work.out_size; ++i) work.scores[i] = samples(work.out_tokens[i]);
    }
    keep_best(work, max_genes_, selector_);
  }

 private:
  const BinRule& rule_;
  size_t max_genes_;
  const Zeros& zeros_;
  Binner binner_;
  Selector selector_;
};

}  // namespace

Encoded encode_bin(const CsrTokens& csr, const Frame& frame, const BinRule& rule) {
  const Zeros zeros(rule.zero_tokens, rule.n_zero_tokens, csr.n_tokens);
  return encode_rows(csr, frame, Order::by_token, true, [&] { return BinEncoder(rule, frame.max_genes, zeros); });
}

}  // namespace scfm::host
