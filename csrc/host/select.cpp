#include "select.h"

#include <cmath>
#include <functional>
#include <numeric>

namespace scfm::host {

size_t tally_limit(const double* values, size_t size) {
  // Separate sums, so that the compiler can vectorize. Adding 1.5 x 2^52 rounds to a whole number.
  constexpr size_t lanes = 8;
  constexpr double round = 0x1.8p52;
  double least[lanes] = {}, most[lanes] = {}, excess[lanes] = {};
  const auto look = [&](double value, size_t lane) {
    least[lane] = value < least[lane] ? value : least[lane];
    most[lane] = value > most[lane] ? value : most[lane];
    excess[lane] += std::fabs((value + round) - round - value);
  };
  size_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    for (size_t lane = 0; lane < lanes; ++lane) look(values[i + lane], lane);
  }
  for (; i < size; ++i) look(values[i], 0);
  const double largest = *std::max_element(most, most + lanes);
  const bool negative = *std::min_element(least, least + lanes) < 0.0;
  const bool whole = std::accumulate(excess, excess + lanes, 0.0) == 0.0;
  return !negative && whole && largest < static_cast<double>(kTallied) ? static_cast<size_t>(largest) : kTallied;
}

void Selector::prepare(const Tally& tally, size_t largest, size_t most) {
  size_t value = largest, above = 0;
  while (above + tally[value] < most) above += tally[value--];
  least_ = static_cast<double>(value);
  ties_left_ = most - above;
}

void Selector::prepare(const double* scores, size_t size, size_t most) {
  const size_t largest = tally_limit(scores, size);
  if (largest < kTallied) {
    tally_.count(scores, size, largest);
    prepare(tally_, largest, most);
    tally_.clear();
    return;
  }
  sorted_.assign(scores, scores + size);
  choose(0, most);
}

void Selector::prepare_even(const double* scores, size_t size, size_t most) {
  // A bucket holds a thousandth of the scores; only the one that holds the last of the best is sorted.
  constexpr size_t n_buckets = 1024;
  uint32_t counts[n_buckets] = {};
  const auto bucket_of = [&](double score) { return static_cast<size_t>(static_cast<int>(score * n_buckets)); };
  for (size_t i = 0; i < size; ++i) ++counts[bucket_of(scores[i])];
  size_t bucket = n_buckets - 1, above = 0;
  while (above + counts[bucket] < most) above += counts[bucket--];
  sorted_.clear();
  for (size_t i = 0; i < size; ++i) {
    if (bucket_of(scores[i]) == bucket) sorted_.push_back(scores[i]);
  }
  choose(above, most);
}

void Selector::choose(size_t above, size_t most) {
  const auto nth = sorted_.begin() + static_cast<std::ptrdiff_t>(most - above - 1);
  std::nth_element(sorted_.begin(), nth, sorted_.end(), std::greater<>());
  least_ = *nth;
  above += static_cast<size_t>(std::count_if(sorted_.begin(), nth, [this](double score) { return score > least_; }));
  ties_left_ = most - above;
}

}  // namespace scfm::host
