#include "select.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace scfm::host {

bool can_tally(const double* values, size_t size) {
  bool fits = true;
  for (size_t i = 0; i < size; ++i) {
    fits &= (values[i] >= 0.0) & (values[i] < static_cast<double>(kTallied));
  }
  for (size_t i = 0; fits && i < size; ++i) {
    fits = values[i] == static_cast<double>(static_cast<int>(values[i]));
  }
  return fits;
}

void Selector::prepare(const double* scores, size_t size, size_t most) {
  if (can_tally(scores, size)) {
    size_t value = 0;
    for (size_t i = 0; i < size; ++i) {
      const size_t score = static_cast<size_t>(scores[i]);
      ++tally_[score];
      value = std::max(value, score);
    }
    const size_t largest = value;
    size_t above = 0;
    while (above + tally_[value] < most) above += tally_[value--];
    least_ = static_cast<double>(value);
    ties_left_ = most - above;
    std::fill_n(tally_.begin(), largest + 1, 0);
    return;
  }
  sorted_.assign(scores, scores + size);
  const auto nth = sorted_.begin() + static_cast<std::ptrdiff_t>(most - 1);
  std::nth_element(sorted_.begin(), nth, sorted_.end(), std::greater<>());
  least_ = *nth;
  const auto above = std::count_if(sorted_.begin(), nth, [this](double score) { return score > least_; });
  ties_left_ = most - static_cast<size_t>(above);
}

}  // namespace scfm::host
