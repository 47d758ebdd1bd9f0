// Tallies of small whole numbers, and the choice of the best tokens of a cell that is longer than the context.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace scfm::host {

// Whole numbers below this are tallied; others are sorted.
constexpr size_t kTallied = 4096;

// How often each small whole number occurs. Four separate tallies, because most counts of a cell are 1 and each
// increment would wait for the one before.
class Tally {
 public:
  Tally() : lanes_(kLanes * kTallied, 0) {}

  // Counts `values`, which are whole, not negative and at most `largest` < kTallied.
  void count(const double* values, size_t size, size_t largest) {
    largest_ = largest;
    size_t i = 0;
    // Through int: before AVX-512 there is no instruction that converts to size_t.
    const auto position = [&](size_t at) { return static_cast<size_t>(static_cast<int>(values[at])); };
    for (; i + kLanes <= size; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) ++lanes_[lane * kTallied + position(i + lane)];
    }
    for (; i < size; ++i) ++lanes_[position(i)];
    for (size_t value = 0; value <= largest; ++value) {
      for (size_t lane = 1; lane < kLanes; ++lane) lanes_[value] += lanes_[lane * kTallied + value];
    }
  }

  uint32_t operator[](size_t value) const { return lanes_[value]; }

  void clear() {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      std::fill_n(lanes_.begin() + static_cast<std::ptrdiff_t>(lane * kTallied), largest_ + 1, 0);
    }
  }

 private:
  static constexpr size_t kLanes = 4;
  std::vector<uint32_t> lanes_;
  size_t largest_ = 0;
};

// The largest of `values`, if all are whole, not negative and below kTallied; otherwise kTallied.
size_t tally_limit(const double* values, size_t size);

// Finds the threshold of the `most` largest of a list; of equal scores the first ones are kept.
class Selector {
 public:
  // Prepares for a list of more than `most` scores.
  void prepare(const double* scores, size_t size, size_t most);

  // The same from a tally of the scores, of which `largest` is the largest.
  void prepare(const Tally& tally, size_t largest, size_t most);

  // The same for scores that are spread evenly over [0, 1), without sorting them.
  void prepare_even(const double* scores, size_t size, size_t most);

  // Whether the next score is kept; must be called in the order of the list.
  bool keeps(double score) {
    const bool tie = score == least_;
    const bool kept = (score > least_) | (tie & (ties_left_ > 0));
    ties_left_ -= tie & kept;
    return kept;
  }

 private:
  // Finds the last of the best among `sorted_`; `above` better scores are not in it.
  void choose(size_t above, size_t most);

  Tally tally_;
  std::vector<double> sorted_;
  double least_ = 0;
  size_t ties_left_ = 0;
};

}  // namespace scfm::host
