// Tokens for genes without counts, and the choice of those that fit the context.
#pragma once

#include "rows.h"
#include "select.h"

namespace scfm::host {

// Gives each cell all tokens of a list, with value and score 0 for those that it lacks.
class Zeros {
 public:
  // `tokens` ascend; null if cells keep their own tokens only.
  Zeros(const int32_t* tokens, size_t size, int32_t n_tokens) : tokens_(tokens), size_(size) {
    if (tokens == nullptr) return;
    position_of_token_.assign(static_cast<size_t>(n_tokens), 0);
    for (size_t position = 0; position < size; ++position) position_of_token_[static_cast<size_t>(tokens[position])] = position;
  }

  bool any() const { return tokens_ != nullptr; }

  // Spreads `out_*` and `scores`, ascending by token, over the whole list.
  void add(Workspace& work) const {
    if (tokens_ == nullptr) return;
    work.reserve(size_);
    size_t from = work.out_size;
    size_t open = size_;  // positions from here on are filled
    while (from > 0) {
      --from;
      const size_t position = position_of_token_[static_cast<size_t>(work.out_tokens[from])];
      const float value = work.out_values[from];
      const double score = work.scores[from];
      std::fill(work.out_values.begin() + static_cast<std::ptrdiff_t>(position) + 1,
                work.out_values.begin() + static_cast<std::ptrdiff_t>(open), 0.0f);
      std::fill(work.scores.begin() + static_cast<std::ptrdiff_t>(position) + 1,
                work.scores.begin() + static_cast<std::ptrdiff_t>(open), 0.0);
      work.out_values[position] = value;
      work.scores[position] = score;
      open = position;
    }
    std::fill_n(work.out_values.begin(), open, 0.0f);
    std::fill_n(work.scores.begin(), open, 0.0);
    std::copy_n(tokens_, size_, work.out_tokens.begin());
    work.out_size = size_;
  }

 private:
  const int32_t* tokens_;
  size_t size_;
  std::vector<size_t> position_of_token_;
};

// Keeps the `most` tokens of largest score, ties by ascending token, in the order of tokens.
inline void keep_best(Workspace& work, size_t most, Selector& selector) {
  if (work.out_size <= most) return;
  selector.prepare(work.scores.data(), work.out_size, most);
  size_t kept = 0;
  for (size_t i = 0; i < work.out_size; ++i) {
    work.out_tokens[kept] = work.out_tokens[i];
    work.out_values[kept] = work.out_values[i];
    kept += selector.keeps(work.scores[i]);
  }
  work.out_size = kept;
}

}  // namespace scfm::host
