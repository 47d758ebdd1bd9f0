// Products of float on the tile unit (AMX), which multiplies bfloat16: a float is the exact sum of three bfloat16, 24 bits in
// pieces of 8, and six of the nine products of pieces are summed in float (Henry, Tang and Heinecke 2019, "Leveraging the
// bfloat16 artificial intelligence datatype for higher-precision computations"). The three left out are 2^-21 of a product at
// most, 2^-25 on average, always toward zero; sums are closer to the exact ones than those of one chain of multiply-adds in
// float. Below 2^-110 the lower pieces are denormal, which the unit takes for 0. A sixth of the bfloat16 rate is still above
// that of the vector unit, which is free for other work meanwhile.
//
// An operand is its three parts one after the other on the summed axis: a row of A has `a_stride` / 3 words per part, a panel
// of B `words`. A word holds elements i and i + 16 of each 32 on that axis, the same in both operands, which
// spares every shuffle.
#pragma once

#include "engine_amx.h"
#include "engine_float.h"
#include "pack.h"

namespace {

struct SplitFloat {
  BFloat16 parts[3];  // for its size; the layout of a row is described above
};

// 16 floats and 16 others, as words of each part.
//
// An infinity or NaN becomes the last part, which is multiplied by the first part of the other factor only. Its own first part
// is a one of its sign, in case the other factor is infinite too.
struct SplitPair {
  __m512 left, right;

  static __m512 upper(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
  }
  static __mmask16 not_finite(__m512 x) { return _mm512_fpclass_ps_mask(x, 0x01 | 0x08 | 0x10 | 0x80); }

  static __m512i words(__m512 left, __m512 right) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(left), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(upper(right)));
  }
  static __m512 signed_one(__m512 x) {
    return _mm512_or_ps(_mm512_and_ps(x, _mm512_set1_ps(-0.f)), _mm512_set1_ps(1.f));
  }
  void store(uint32_t* to, int64_t part_stride) const {
    const __mmask16 odd_left = not_finite(left), odd_right = not_finite(right);
    __m512 l = _mm512_mask_mov_ps(left, odd_left, signed_one(left));
    __m512 r = _mm512_mask_mov_ps(right, odd_right, signed_one(right));
    _mm512_storeu_si512(to, words(l, r));
    l = _mm512_sub_ps(l, upper(l)), r = _mm512_sub_ps(r, upper(r));
    _mm512_storeu_si512(to + part_stride, words(l, r));
    // Twice an infinity or NaN is itself, with a NaN's payload in the bits that truncation keeps.
    l = _mm512_mask_add_ps(_mm512_sub_ps(l, upper(l)), odd_left, left, left);
    r = _mm512_mask_add_ps(_mm512_sub_ps(r, upper(r)), odd_right, right, right);
    _mm512_storeu_si512(to + 2 * part_stride, words(l, r));
  }
};

// One row of an operand, zeros from `n` to `width` (see copy_rows).
inline void copy_row(const float* from, int64_t n, int64_t width, SplitFloat* to_row) {
  uint32_t* to = reinterpret_cast<uint32_t*>(to_row);
  for (int64_t d = 0; d < width; d += 32) {
    const auto some = [&](int64_t first) {
      const int64_t left = n - first;
      const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      return _mm512_maskz_loadu_ps(there, from + first);
    };
    SplitPair{some(d), some(d + 16)}.store(to + d / 2, width / 2);
  }
}

// Small products come first: what is added to a small sum is rounded finely.
struct ThreePieces {
  static constexpr int kParts = 3, kProducts = 6;
  static constexpr int8_t kPartOfA[kProducts] = {2, 1, 0, 1, 0, 0}, kPartOfB[kProducts] = {0, 1, 2, 0, 1, 0};
};

struct AmxFloatEngine : AmxEngine {
  using Element = SplitFloat;
  using Product = TileProduct<ThreePieces>;
  static constexpr int64_t kParts = ThreePieces::kParts;

  static Vec::Reg exp2(Vec::Reg x) { return FloatEngine::exp2(x); }

  // Two vectors of one row of probabilities.
  static void store_row(uint32_t* row, int64_t column, Vec::Reg left, Vec::Reg right) {
    SplitPair{left, right}.store(row + column / 2, kForwardKeys / 2);
  }

  // Rows of floats as operand B whose summed axis is the rows (see panels_of_rows).
  static void split_panels(const float* rows, int64_t n, int64_t width, uint32_t* to) {
    for (int64_t begin = 0; begin < width; begin += kPanel, to += n / 2 * kParts * kPanel)
      for (int64_t word = 0; word < n / 2; word++) {
        const float *left = rows + (word / 16 * 32 + word % 16) * width + begin, *right = left + 16 * width;
        for (int64_t j = 0; j < smaller(kPanel, width - begin); j += 16)
          SplitPair{Vec::load(left + j), Vec::load(right + j)}.store(to + word * kPanel + j, n / 2 * kPanel);
      }
  }

  // All at once, a piece of the summed axis at a time, so that 64 columns of it stay in the first-level cache; the small
  // products of all pieces come before the first large one.
  template <bool kAccumulate>
  static void gemm(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, float* c, int64_t c_stride) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      const auto first = column + 32 < columns ? pieces<kAccumulate, true> : pieces<kAccumulate, false>;
      const auto last = column + 32 < columns ? pieces<true, true> : pieces<true, false>;
      const uint32_t* panel = b + column * kParts * words;
      first(0, ThreePieces::kProducts - 1, 32, rows, words, a, a_stride, panel, c + column, c_stride);
      last(ThreePieces::kProducts - 1, ThreePieces::kProducts, 128, rows, words, a, a_stride, panel, c + column, c_stride);
    }
  }
  template <bool kAccumulate, bool kFour>
  static void pieces(int first_product, int end_product, int64_t piece, int64_t rows, int64_t words, const uint32_t* a,
                     int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride) {
    for (int64_t begin = 0; begin < words; begin += piece)
      for (int64_t row = 0; row < rows; row += 16) {
        float* to = c + row * c_stride;
        __asm__ volatile("" ::: "memory");
        if (kAccumulate || begin > 0)
          begin_tiles<true, kFour>(to, c_stride * 4);
        else
          begin_tiles<false, kFour>(to, c_stride * 4);
        for (int product = first_product; product < end_product; product++)
          for (int64_t word = begin; word < smaller(begin + piece, words); word += 16)
            multiply_tiles<kFour>(a + row * a_stride + ThreePieces::kPartOfA[product] * (a_stride / kParts) + word,
                                  a_stride * 4, b + (ThreePieces::kPartOfB[product] * words + word) * kPanel);
        end_tiles<kFour>(to, c_stride * 4);
        __asm__ volatile("" ::: "memory");
      }
  }

  static int64_t burn(int64_t rounds) { return AmxEngine::burn(rounds) / ThreePieces::kProducts; }
};

}  // namespace
