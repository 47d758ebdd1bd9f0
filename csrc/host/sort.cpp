#include "sort.h"

#include <algorithm>
#include <bit>

namespace scfm::host {
namespace {

constexpr int kDigitBits = 11;
constexpr size_t kDigits = size_t{1} << kDigitBits;
constexpr size_t kSmall = 48;    // below, a comparison sort is as fast
constexpr size_t kLongRun = 24;  // above, a run of equal keys is sorted, not inserted

uint64_t pack(uint32_t key, size_t place) { return (static_cast<uint64_t>(key) << 32) | place; }
uint32_t key_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
uint32_t place_of(uint64_t entry) { return static_cast<uint32_t>(entry); }

// Moves entries from `from` to `to` in order of one digit of their key; stable. `counts` is consumed.
void scatter(const uint64_t* from, uint64_t* to, size_t size, int shift, uint32_t* counts) {
  uint32_t total = 0;
  for (size_t digit = 0; digit < kDigits; ++digit) {
    const uint32_t count = counts[digit];
    counts[digit] = total;
    total += count;
  }
  for (size_t i = 0; i < size; ++i) {
    to[counts[(key_of(from[i]) >> shift) & (kDigits - 1)]++] = from[i];
  }
}

// Sorts entries in `scratch.first` by keys of 22 bits; the result is there again. Stable.
void sort_entries(SortScratch& scratch, size_t size) {
  uint32_t low[kDigits] = {}, high[kDigits] = {};
  const uint64_t* entries = scratch.first.data();
  for (size_t i = 0; i < size; ++i) {
    const uint32_t key = key_of(entries[i]);
    ++low[key & (kDigits - 1)];
    ++high[key >> kDigitBits];
  }
  scatter(scratch.first.data(), scratch.second.data(), size, 0, low);
  scatter(scratch.second.data(), scratch.first.data(), size, kDigitBits, high);
}

void reserve(SortScratch& scratch, size_t size) {
  if (scratch.first.size() < size) {
    scratch.first.resize(size);
    scratch.second.resize(size);
  }
}

}  // namespace

void order_by_score(const double* scores, const int32_t* tokens, size_t size, uint32_t* order, SortScratch& scratch) {
  const auto before = [&](uint32_t a, uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : tokens[a] < tokens[b];
  };
  if (size <= kSmall) {
    for (size_t i = 0; i < size; ++i) order[i] = static_cast<uint32_t>(i);
    std::sort(order, order + size, before);
    return;
  }
  // The bits of positive doubles rise with their value, so the distance from the largest, cut to 22 bits, is a key: it
  // orders all but near-equal scores, which end up side by side.
  uint64_t least = ~uint64_t{0}, most = 0;
  for (size_t i = 0; i < size; ++i) {
    const uint64_t bits = std::bit_cast<uint64_t>(scores[i]);
    least = std::min(least, bits);
    most = std::max(most, bits);
  }
  const int shift = std::max(0, static_cast<int>(std::bit_width(most - least)) - 2 * kDigitBits);
  reserve(scratch, size);
  for (size_t i = 0; i < size; ++i) {
    const uint64_t distance = most - std::bit_cast<uint64_t>(scores[i]);
    scratch.first[i] = pack(static_cast<uint32_t>(distance >> shift), i);
  }
  sort_entries(scratch, size);
  const uint64_t* entries = scratch.first.data();
  for (size_t i = 0; i < size; ++i) order[i] = place_of(entries[i]);
  for (size_t begin = 0; begin < size;) {
    size_t end = begin + 1;
    while (end < size && key_of(entries[end]) == key_of(entries[begin])) ++end;
    if (end - begin > kLongRun) {
      std::sort(order + begin, order + end, before);
    } else {
      for (size_t i = begin + 1; i < end; ++i) {
        const uint32_t moved = order[i];
        size_t place = i;
        for (; place > begin && before(moved, order[place - 1]); --place) order[place] = order[place - 1];
        order[place] = moved;
      }
    }
    begin = end;
  }
}

void order_by_token(const int32_t* tokens, size_t size, int32_t n_tokens, uint32_t* order, SortScratch& scratch) {
  if (size <= kSmall || n_tokens > (int32_t{1} << (2 * kDigitBits))) {
    for (size_t i = 0; i < size; ++i) order[i] = static_cast<uint32_t>(i);
    std::stable_sort(order, order + size, [&](uint32_t a, uint32_t b) { return tokens[a] < tokens[b]; });
    return;
  }
  reserve(scratch, size);
  for (size_t i = 0; i < size; ++i) scratch.first[i] = pack(static_cast<uint32_t>(tokens[i]), i);
  sort_entries(scratch, size);
  for (size_t i = 0; i < size; ++i) order[i] = place_of(scratch.first[i]);
}

}  // namespace scfm::host
