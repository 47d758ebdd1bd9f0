// C = A B or C += A B on the vector unit. Operands consist of 32-bit words: one float each, or two bfloat16 that are
// neighbors on the summed axis.
//
//   A  row-major, `a_stride` words per row
//   B  panels of 64 columns: [column / 64][word of the summed axis][column % 64]
//   C  float, row-major
//
// Each element of C is a sum of chains of multiply-adds over at most kChain words of the summed axis, in the same order in every
// tile. So the result of a row does not depend on the other rows, nor that of a column on the other columns. One chain of n
// terms has a rounding error that grows like n / sqrt(2); chains of 128 and a sum of n / 128 of them like 8 sqrt(n), which
// is what libraries reach. `C += A B` adds to C what A B alone would be.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kChain = 128;

// `Dot` multiplies a broadcast word of A with a vector of words of B and adds.
template <class Dot, bool kAccumulate, int kRows, int kColumns>
inline __attribute__((always_inline)) void gemm_tile(int64_t words, const uint32_t* a, int64_t a_stride,
                                                     const uint32_t* b, float* c, int64_t c_stride) {
  typename Vec::Reg sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j++)
      sum[i][j] = Vec::zero();
  for (int64_t word = 0; word < words; word++) {
    typename Vec::Reg right[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j++)
      right[j] = Vec::load(reinterpret_cast<const float*>(b + word * kPanel + j * Vec::kWidth));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const typename Vec::Reg left = Dot::broadcast(a + i * a_stride + word);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; j++) sum[i][j] = Dot::add(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j++) {
      float* to = c + i * c_stride + j * Vec::kWidth;
      Vec::store(to, kAccumulate ? Vec::add(Vec::load(to), sum[i][j]) : sum[i][j]);
    }
}

template <class Dot, bool kAccumulate, int kColumns>
void gemm_columns(int64_t rows, int64_t words, const uint32_t* a, int64_t a_stride, const uint32_t* b, float* c,
                  int64_t c_stride) {
  int64_t row = 0;
  for (; row + Vec::kTileRows <= rows; row += Vec::kTileRows)
    gemm_tile<Dot, kAccumulate, Vec::kTileRows, kColumns>(words, a + row * a_stride, a_stride, b, c + row * c_stride,
                                                          c_stride);
  for (; row + 2 <= rows; row += 2)
    gemm_tile<Dot, kAccumulate, 2, kColumns>(words, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride);
  if (row < rows)
    gemm_tile<Dot, kAccumulate, 1, kColumns>(words, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride);
}

// One chain of the sum: at most kChain words. `columns` is a multiple of Vec::kWidth, `b_words` the length of a panel.
template <class Dot, bool kAccumulate>
void gemm_chain(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                int64_t b_words, float* c, int64_t c_stride) {
  constexpr int64_t kStep = Vec::kTileColumns * Vec::kWidth;
  for (int64_t column = 0; column < columns; column += kStep) {
    const uint32_t* panel = b + column / kPanel * b_words * kPanel + column % kPanel;
    int64_t vectors = (columns - column) / Vec::kWidth;
    if (vectors >= Vec::kTileColumns) {
      gemm_columns<Dot, kAccumulate, Vec::kTileColumns>(rows, words, a, a_stride, panel, c + column, c_stride);
      continue;
    }
    int64_t done = 0;
    for (; vectors >= 2; vectors -= 2, done += 2 * Vec::kWidth)
      gemm_columns<Dot, kAccumulate, 2>(rows, words, a, a_stride, panel + done, c + column + done, c_stride);
    if (vectors == 1)
      gemm_columns<Dot, kAccumulate, 1>(rows, words, a, a_stride, panel + done, c + column + done, c_stride);
  }
}

template <class Dot, bool kAccumulate>
void gemm_vector(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                 float* c, int64_t c_stride) {
  const int64_t first = words < kChain ? words : kChain;
  gemm_chain<Dot, kAccumulate>(rows, columns, first, a, a_stride, b, words, c, c_stride);
  for (int64_t word = first; word < words; word += kChain)
    gemm_chain<Dot, true>(rows, columns, words - word < kChain ? words - word : kChain, a + word, a_stride,
                          b + word * kPanel, words, c, c_stride);
}

// Independent multiply-adds in registers, for the roofline of the benchmarks: returns how many operations were done.
template <class Dot>
int64_t burn_vector(int64_t rounds, int64_t group) {
  constexpr int kChains = 12;  // enough to hide the latency of two units
  Vec::Reg sum[kChains];
  const Vec::Reg one = Vec::set1(1e-3f);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; i++) sum[i] = Vec::set1(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = Dot::add(sum[i], one, one);
  }
  volatile float kept = 0.f;
  for (int i = 0; i < kChains; i++) kept = kept + Vec::reduce_add(sum[i]);
  return rounds * kChains * Vec::kWidth * group * 2;
}

}  // namespace
