#include "sort.h"

#include <algorithm>
#include <bit>

namespace scfm::host {
namespace {

constexpr size_t kSmall = 48;    // below, a comparison sort is as fast
constexpr size_t kLongRun = 24;  // above, a run of equal keys is sorted, not inserted

// An entry holds a key in its upper bits and the original position in its lower bits; keys are sorted digit by digit.
struct Narrow {
  using Entry = uint32_t;
  static constexpr int kDigitBits = 8, kPlaceBits = 16;
  static Entry* first(SortScratch& scratch, size_t size) { return grown(scratch.narrow_first, size); }
  static Entry* second(SortScratch& scratch, size_t size) { return grown(scratch.narrow_second, size); }
  template <typename T>
  static T* grown(std::vector<T>& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }
};

struct Wide {
  using Entry = uint64_t;
  static constexpr int kDigitBits = 11, kPlaceBits = 32;
  static Entry* first(SortScratch& scratch, size_t size) { return Narrow::grown(scratch.wide_first, size); }
  static Entry* second(SortScratch& scratch, size_t size) { return Narrow::grown(scratch.wide_second, size); }
};

template <typename Form>
uint32_t key_of(typename Form::Entry entry) {
  return static_cast<uint32_t>(entry >> Form::kPlaceBits);
}

template <typename Form>
uint32_t place_of(typename Form::Entry entry) {
  constexpr auto mask = (typename Form::Entry{1} << Form::kPlaceBits) - 1;
  return static_cast<uint32_t>(entry & mask);
}

// Fills entries by key_at(position), sorts them by key, stably, and returns them.
template <typename Form, typename KeyAt>
const typename Form::Entry* sorted_entries(size_t size, SortScratch& scratch, const KeyAt& key_at) {
  using Entry = typename Form::Entry;
  constexpr size_t n_digits = size_t{1} << Form::kDigitBits;
  Entry* first = Form::first(scratch, size);
  Entry* second = Form::second(scratch, size);
  uint32_t low[n_digits] = {}, high[n_digits] = {};
  for (size_t i = 0; i < size; ++i) {
    const uint32_t key = key_at(i);
    first[i] = (static_cast<Entry>(key) << Form::kPlaceBits) | static_cast<Entry>(i);
    ++low[key & (n_digits - 1)];
    ++high[key >> Form::kDigitBits];
  }
  uint32_t low_total = 0, high_total = 0;
  for (size_t digit = 0; digit < n_digits; ++digit) {
    const uint32_t low_count = low[digit], high_count = high[digit];
    low[digit] = low_total;
    high[digit] = high_total;
    low_total += low_count;
    high_total += high_count;
  }
  for (size_t i = 0; i < size; ++i) second[low[key_of<Form>(first[i]) & (n_digits - 1)]++] = first[i];
  for (size_t i = 0; i < size; ++i) first[high[key_of<Form>(second[i]) >> Form::kDigitBits]++] = second[i];
  return first;
}

template <typename Form>
void order_by_score_as(const double* scores, const int32_t* tokens, size_t size, uint32_t* order,
                       SortScratch& scratch) {
  const auto before = [&](uint32_t a, uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : tokens[a] < tokens[b];
  };
  // The bits of positive doubles rise with their value, so the distance from the largest, cut to two digits, is a key:
  // it orders all but near-equal scores, which end up adjacent.
  uint64_t least = ~uint64_t{0}, most = 0;
  for (size_t i = 0; i < size; ++i) {
    const uint64_t bits = std::bit_cast<uint64_t>(scores[i]);
    least = std::min(least, bits);
    most = std::max(most, bits);
  }
  const int shift = std::max(0, static_cast<int>(std::bit_width(most - least)) - 2 * Form::kDigitBits);
  const auto* entries = sorted_entries<Form>(size, scratch, [&](size_t i) {
    return static_cast<uint32_t>((most - std::bit_cast<uint64_t>(scores[i])) >> shift);
  });
  for (size_t i = 0; i < size; ++i) order[i] = place_of<Form>(entries[i]);
  for (size_t begin = 0; begin + 1 < size; ++begin) {
    if (key_of<Form>(entries[begin + 1]) != key_of<Form>(entries[begin])) continue;
    size_t end = begin + 2;
    while (end < size && key_of<Form>(entries[end]) == key_of<Form>(entries[begin])) ++end;
    if (end - begin > kLongRun) {
      std::sort(order + begin, order + end, before);
    } else {
      for (size_t i = begin + 1; i < end; ++i) {
        const uint32_t moved = order[i];
        size_t position = i;
        for (; position > begin && before(moved, order[position - 1]); --position) order[position] = order[position - 1];
        order[position] = moved;
      }
    }
    begin = end - 1;
  }
}

template <typename Form>
void order_by_token_as(const int32_t* tokens, size_t size, uint32_t* order, SortScratch& scratch) {
  const auto* entries =
      sorted_entries<Form>(size, scratch, [&](size_t i) { return static_cast<uint32_t>(tokens[i]); });
  for (size_t i = 0; i < size; ++i) order[i] = place_of<Form>(entries[i]);
}

template <typename Form>
bool fits(size_t size, uint32_t largest_key) {
  return size <= size_t{1} << Form::kPlaceBits && largest_key < uint32_t{1} << (2 * Form::kDigitBits);
}

}  // namespace

void order_by_score(const double* scores, const int32_t* tokens, size_t size, uint32_t* order, SortScratch& scratch) {
  if (size <= kSmall) {
    for (size_t i = 0; i < size; ++i) order[i] = static_cast<uint32_t>(i);
    std::sort(order, order + size, [&](uint32_t a, uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : tokens[a] < tokens[b];
    });
  } else if (size <= 8192) {
    order_by_score_as<Narrow>(scores, tokens, size, order, scratch);
  } else {
    order_by_score_as<Wide>(scores, tokens, size, order, scratch);
  }
}

void order_by_token(const int32_t* tokens, size_t size, int32_t n_tokens, uint32_t* order, SortScratch& scratch) {
  const uint32_t largest = static_cast<uint32_t>(std::max(n_tokens, int32_t{1}) - 1);
  if (size > kSmall && fits<Narrow>(size, largest)) {
    order_by_token_as<Narrow>(tokens, size, order, scratch);
  } else if (size > kSmall && fits<Wide>(size, largest)) {
    order_by_token_as<Wide>(tokens, size, order, scratch);
  } else {
    for (size_t i = 0; i < size; ++i) order[i] = static_cast<uint32_t>(i);
    std::stable_sort(order, order + size, [&](uint32_t a, uint32_t b) { return tokens[a] < tokens[b]; });
  }
}

}  // namespace scfm::host
