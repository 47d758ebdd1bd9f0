// Products and probabilities in float, for every dtype on every machine: half types are converted.
#pragma once

#include "convert.h"
#include "gemm_vector.h"

namespace {

struct FloatDot {
  static Vec::Reg broadcast(const uint32_t* word) { return Vec::set1(*reinterpret_cast<const float*>(word)); }
  static Vec::Reg add(Vec::Reg a, Vec::Reg b, Vec::Reg c) { return Vec::fma(a, b, c); }
};

struct FloatEngine {
  using Element = float;
  static constexpr int64_t kGroup = 1;      // elements in a 32-bit word
  static constexpr int64_t kParts = 1;      // of an element, see engine_amx_float.h
  static constexpr int64_t kWidthStep = 16;  // head widths are padded to a multiple of this
  static constexpr bool kInSteps = false;     // see engine_amx.h
  static constexpr int64_t kRowStep = 1;    // rows of A likewise
  static constexpr int64_t kForwardRows = 48, kForwardKeys = 128, kBackwardKeys = 96;

  template <bool kAccumulate>
  static void gemm(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, float* c, int64_t c_stride) {
    gemm_vector<FloatDot, kAccumulate>(rows, columns, words, a, a_stride, b, c, c_stride);
  }

  static int64_t burn(int64_t rounds) { return burn_vector<FloatDot>(rounds, kGroup); }

  // 2^x, relative error 2e-7, 2^0 = 1 exactly (minimax polynomial of degree 5 on [0, 1], error 6.5e-8).
  static Vec::Reg exp2(Vec::Reg x) {
    const Vec::Reg rest = Vec::fraction(x);
    Vec::Reg p = Vec::set1(1.874512779e-3f);
    p = Vec::fma(p, rest, Vec::set1(9.000798421e-3f));
    p = Vec::fma(p, rest, Vec::set1(5.581164994e-2f));
    p = Vec::fma(p, rest, Vec::set1(2.401615281e-1f));
    p = Vec::fma(p, rest, Vec::set1(6.931513804e-1f));
    p = Vec::fma(p, rest, Vec::set1(1.f));
    return Vec::scale_exp2(p, x);
  }

  // Two adjacent vectors of one row.
  static void store_row(uint32_t* row, int64_t column, Vec::Reg left, Vec::Reg right) {
    float* to = reinterpret_cast<float*>(row) + column;
    Vec::store(to, left);
    Vec::store(to + Vec::kWidth, right);
  }
  // One vector of each of two rows that are adjacent on the summed axis of a panel.
  static void store_panel(uint32_t* panel, int64_t row, int64_t column, Vec::Reg upper, Vec::Reg lower) {
    float* to = reinterpret_cast<float*>(panel) + row * kPanel + column;
    Vec::store(to, upper);
    Vec::store(to + kPanel, lower);
  }
};

}  // namespace
