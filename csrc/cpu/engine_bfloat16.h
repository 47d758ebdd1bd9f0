// Products of bfloat16 in float: two adjacent elements of the summed axis at a time. Probabilities and their gradients
// are rounded to bfloat16 before a product, sums are float.
#pragma once

#include "convert.h"
#include "gemm_vector.h"

namespace {

// The common part of the vector and the tile engine.
struct BFloat16Base {
  using Element = BFloat16;
  static constexpr int64_t kGroup = 2;       // elements in a 32-bit word
  static constexpr int64_t kParts = 1;       // of an element, see engine_amx_float.h
  static constexpr int64_t kWidthStep = 32;  // head widths are padded to a multiple of this

  // 2^x, relative error 9e-5, a fortieth of that of rounding to bfloat16 (minimax polynomial of degree 3 on [0, 1]).
  static Vec::Reg exp2(Vec::Reg x) {
    const Vec::Reg rest = Vec::fraction(x);
    Vec::Reg p = Vec::set1(7.706705957e-2f);
    p = Vec::fma(p, rest, Vec::set1(2.276449938e-1f));
    p = Vec::fma(p, rest, Vec::set1(6.951167695e-1f));
    p = Vec::fma(p, rest, Vec::set1(1.f));
    return Vec::scale_exp2(p, x);
  }

  // Two adjacent vectors of one row.
  static void store_row(uint32_t* row, int64_t column, Vec::Reg left, Vec::Reg right) {
    _mm512_storeu_si512(row + column / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left)));
  }
  // One vector of two rows that follow each other on the summed axis of a panel.
  static void store_panel(uint32_t* panel, int64_t row, int64_t column, Vec::Reg upper, Vec::Reg lower) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(lower, upper));
    _mm512_storeu_si512(panel + row / 2 * kPanel + column, _mm512_permutexvar_epi16(order, both));
  }
};

struct BFloat16Dot {
  static Vec::Reg broadcast(const uint32_t* word) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*word)));
  }
  static Vec::Reg add(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

struct BFloat16Engine : BFloat16Base {
  static constexpr bool kInSteps = false;
  static constexpr int64_t kRowStep = 1;  // rows of A are padded to a multiple of this
  static constexpr int64_t kForwardRows = 24, kForwardKeys = 256, kBackwardKeys = 96;

  template <bool kAccumulate>
  static void gemm(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, float* c, int64_t c_stride) {
    gemm_vector<BFloat16Dot, kAccumulate>(rows, columns, words, a, a_stride, b, c, c_stride);
  }

  static int64_t burn(int64_t rounds) {
    constexpr int kChains = 12;
    Vec::Reg sum[kChains];
    const Vec::Reg one = _mm512_castsi512_ps(_mm512_set1_epi32(0x3a833a83));
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = Vec::zero();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; i++) sum[i] = BFloat16Dot::add(one, one, sum[i]);
    }
    volatile float kept = 0.f;
    for (int i = 0; i < kChains; i++) kept = kept + Vec::reduce_add(sum[i]);
    return rounds * kChains * Vec::kWidth * kGroup * 2;
  }
};

}  // namespace
