// Keeps the best tokens of a cell that is longer than the context.
#pragma once

#include <cstddef>
#include <vector>

namespace scfm::host {

// Whole numbers below this are tallied; others are sorted.
constexpr size_t kTallied = 4096;

// Whether all of `values` are whole numbers in 0..kTallied - 1.
bool can_tally(const double* values, size_t size);

// Finds what it takes to be among the `most` largest of a list, ties going to those that come first.
class Selector {
 public:
  Selector() : tally_(kTallied, 0) {}

  // Prepares for a list of more than `most` scores.
  void prepare(const double* scores, size_t size, size_t most);

  // Whether the next score, asked in the order of the list, is kept.
  bool keeps(double score) {
    if (score != least_) return score > least_;
    if (ties_left_ == 0) return false;
    --ties_left_;
    return true;
  }

 private:
  std::vector<size_t> tally_;
  std::vector<double> sorted_;
  double least_ = 0;
  size_t ties_left_ = 0;
};

}  // namespace scfm::host
