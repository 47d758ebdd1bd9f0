// Converts tokens to operands of the products (see gemm_vector.h): contiguous, padded with zeros.
#pragma once

#include <cstddef>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "attention.h"
#include "convert.h"
#include "gemm_vector.h"

namespace {

using namespace scfm;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kKeyStep = 32;  // keys of a block are padded to a multiple: two vectors, and the depth of an AMX tile
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr double kLog2EDouble = 1.4426950408889634, kLn2Double = 0.6931471805599453;

// Scores times this are exponents of 2, rounded once.
inline float exponent_scale(float scale) { return static_cast<float>(scale * kLog2EDouble); }

// Allocates aligned pieces of one block of memory; without a block it only counts bytes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(base + used);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    used += round_up(bytes, 64);
#if defined(__SANITIZE_ADDRESS__)  // to the sanitizer it is one block, so gaps between the pieces are marked as unreadable
    used += 64;
    if (base != nullptr) {
      __asan_unpoison_memory_region(piece, static_cast<std::size_t>(bytes));
      __asan_poison_memory_region(reinterpret_cast<char*>(piece) + bytes,
                                  static_cast<std::size_t>(base + used - reinterpret_cast<char*>(piece) - bytes));
    }
#endif
    return base == nullptr ? nullptr : piece;
  }
};

template <class Source>
inline const Source* token_row(const ConstTokens& tokens, int64_t token, int64_t head) {
  return static_cast<const Source*>(tokens.data) + token * tokens.token_stride + head * tokens.head_stride;
}
template <class Source>
inline Source* token_row(const Tokens& tokens, int64_t token, int64_t head) {
  return static_cast<Source*>(tokens.data) + token * tokens.token_stride + head * tokens.head_stride;
}
template <class Scalars>
inline auto& scalar_at(const Scalars& scalars, int64_t token, int64_t head) {
  return scalars.data[token * scalars.token_stride + head * scalars.head_stride];
}

template <class Element>
inline void convert_row(const Element* from, int64_t n, Element* to) {
  constexpr int64_t kChunk = 64 / static_cast<int64_t>(sizeof(Element));  // a size known at compile time: no call, no loop
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) __builtin_memcpy(to + i, from + i, 64);
  for (; i < n; i++) to[i] = from[i];
}
inline void convert_row(const BFloat16* from, int64_t n, float* to) { read_row(from, n, to); }
inline void convert_row(const Half* from, int64_t n, float* to) { read_row(from, n, to); }

// One row of an operand, zeros from `n` to `width`.
template <class Element, class Source>
inline void copy_row(const Source* from, int64_t n, int64_t width, Element* to) {
  convert_row(from, n, to);
  for (int64_t d = n; d < width; d++) to[d] = Element{};
}

// Rows as operand A: `n` tokens of `head_dim` elements, padded to `n_padded` rows of `width`. Rows past the end are zero;
// masking them is not enough, because 0 times a NaN is NaN.
template <class Element, class Source>
void copy_rows(const ConstTokens& tokens, int64_t begin, int64_t head, int64_t n, int64_t n_padded, int64_t head_dim,
               int64_t width, uint32_t* to_words) {
  Element* to = reinterpret_cast<Element*>(to_words);
  for (int64_t row = 0; row < n; row++) {
    // Rows are kilobytes apart, too far for the hardware prefetcher.
    const char* ahead = reinterpret_cast<const char*>(token_row<Source>(tokens, begin + smaller(row + 8, n - 1), head));
    for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(Source)); byte += 64)
      __builtin_prefetch(ahead + byte);
    copy_row(token_row<Source>(tokens, begin + row, head), head_dim, width, to + row * width);
  }
  for (int64_t i = n * width; i < n_padded * width; i++) to[i] = Element{};
}

// Both sizes are multiples of Vec::kWidth.
inline void transpose_words(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to,
                            int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += Vec::kWidth)
    for (int64_t column = 0; column < columns; column += Vec::kWidth)
      Vec::transpose(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
}

// Operand B whose columns are tokens and whose summed axis is the head width.
inline void panels_of_columns(const uint32_t* rows, int64_t n, int64_t words, uint32_t* to) {
  for (int64_t begin = 0; begin < n; begin += kPanel)
    transpose_words(rows + begin * words, words, smaller(kPanel, n - begin), words, to + begin * words, kPanel);
}

// Operand B whose columns are the head width and whose summed axis is tokens.
inline void panels_of_rows(const float* rows, int64_t n, int64_t width, uint32_t* to_words) {
  float* to = reinterpret_cast<float*>(to_words);
  for (int64_t begin = 0; begin < width; begin += kPanel, to += n * kPanel)
    for (int64_t row = 0; row < n; row++)
      __builtin_memcpy(to + row * kPanel, rows + row * width + begin,
                       static_cast<std::size_t>(smaller(kPanel, width - begin)) * sizeof(float));
}
inline void panels_of_rows(const BFloat16* rows, int64_t n, int64_t width, uint32_t* to) {
  for (int64_t begin = 0; begin < width; begin += kPanel, to += n / 2 * kPanel)
    for (int64_t row = 0; row < n; row += 2) {
      const BFloat16 *upper = rows + row * width + begin, *lower = upper + width;
      uint32_t* words = to + row / 2 * kPanel;
      const int64_t columns = smaller(kPanel, width - begin);
      for (int64_t j = 0; j < columns; j++) words[j] = upper[j].bits | uint32_t{lower[j].bits} << 16;
    }
}

// Rows [n][width] as [width][n], using `panels` as scratch.
template <class Engine>
void transpose_rows(const uint32_t* rows, int64_t n, int64_t width, uint32_t* panels, uint32_t* to) {
  const int64_t words = n / Engine::kGroup;
  panels_of_rows(reinterpret_cast<const typename Engine::Element*>(rows), n, width, panels);
  for (int64_t d = 0; d < width; d += kPanel)
    transpose_words(panels + d * words, kPanel, words, smaller(kPanel, width - d), to + d * words, words);
}

// Values as that operand, using `rows` as scratch.
template <class Engine, class Source>
void pack_values(const ConstTokens& values, int64_t begin, int64_t head, int64_t n, int64_t n_padded, int64_t head_dim,
                 int64_t width, uint32_t* rows, uint32_t* to) {
  if constexpr (Engine::kParts == 1) {
    copy_rows<typename Engine::Element, Source>(values, begin, head, n, n_padded, head_dim, width, rows);
    panels_of_rows(reinterpret_cast<const typename Engine::Element*>(rows), n_padded, width, to);
  } else {
    copy_rows<float, Source>(values, begin, head, n, n_padded, head_dim, width, rows);
    Engine::split_panels(reinterpret_cast<const float*>(rows), n_padded, width, to);
  }
}

// Bias of a block of keys in units of log 2; -inf past the end, so that padding has probability 0.
inline void copy_bias(const ConstScalars& bias, int64_t begin, int64_t head, int64_t n, int64_t n_padded, float* to) {
  for (int64_t key = 0; key < n; key++)
    to[key] = bias.data == nullptr ? 0.f : scalar_at(bias, begin + key, head) * kLog2E;
  for (int64_t key = n; key < n_padded; key++) to[key] = -kInfinity;
}

// Sum of products in an order that depends on `n` only, a multiple of Vec::kWidth.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec::Reg sum = Vec::zero();
  for (int64_t i = 0; i < n; i += Vec::kWidth) sum = Vec::fma(Vec::load(a + i), Vec::load(b + i), sum);
  return Vec::reduce_add(sum);
}

// A row as floats, padded with zeros to `width`.
template <class Source>
inline void read_padded(const ConstTokens& tokens, int64_t token, int64_t head, int64_t head_dim, int64_t width,
                        float* to) {
  read_row(token_row<Source>(tokens, token, head), head_dim, to);
  for (int64_t d = head_dim; d < width; d++) to[d] = 0.f;
}

}  // namespace
