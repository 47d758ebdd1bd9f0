// out += f(A B) V, a few rows of A at a time, with A B and f(A B) in the first- or second-level cache.
#pragma once

#include "pack.h"

namespace {

struct RowWalk {
  int64_t rows, rows_padded;  // of A; padded to a multiple of Engine::kRowStep
  int64_t words;              // of the summed axis of A B (of one part, see engine_amx_float.h)
  int64_t columns;            // of B: rows of V
  int64_t width;              // columns of V
  const uint32_t *a, *b, *values;
  // A B, and f(A B) as an operand (in float the same memory): tile_rows<Engine>() rows of `stride` columns.
  float* products;
  uint32_t* factors;
  int64_t stride;
  float* out;
};

template <class Engine>
constexpr int64_t tile_rows() {
  return Engine::kForwardRows * (Engine::kInSteps ? 2 : 1);
}

// `work(row, products, factors, again)` is f: it turns a row of products into a row of factors. `again` computes the
// products of this row once more if factors have overwritten them.
template <class Engine, class Work>
void walk_row_blocks(RowWalk walk, const Work& work) {
  constexpr int64_t kRows = Engine::kForwardRows;
  const int64_t factor_stride = walk.stride / Engine::kGroup * Engine::kParts, a_stride = walk.words * Engine::kParts;
  for (int64_t row = 0; row < walk.rows_padded; row += kRows) {
    const int64_t rows = smaller(kRows, walk.rows_padded - row), real_rows = smaller(kRows, walk.rows - row);
    const uint32_t* a = walk.a + row * a_stride;
    Engine::template gemm<false>(rows, walk.columns, walk.words, a, a_stride, walk.b, walk.products, walk.stride);
    for (int64_t i = 0; i < real_rows; i++) {
      float* products = walk.products + i * walk.stride;
      work(row + i, products, walk.factors + i * factor_stride, [&] {
        if constexpr (Engine::kGroup == 1)
          Engine::template gemm<false>(1, walk.columns, walk.words, a + i * a_stride, a_stride, walk.b, products,
                                       walk.stride);
      });
    }
    Engine::template gemm<true>(rows, walk.width, walk.columns / Engine::kGroup, walk.factors, factor_stride,
                                walk.values, walk.out + row * walk.width, walk.width);
  }
}

// The same with both products of neighboring rows in flight while the vector unit works on the rows between: turn t does
// While f runs on row block t, f(A B) V is computed for block t - 1 and A B for block t + 1.
template <class Engine, class Work>
void walk_rows_in_steps(RowWalk walk, const Work& work) {
  constexpr int64_t kRows = Engine::kForwardRows;
  using Product = typename Engine::Product;
  const int64_t factor_stride = walk.stride / Engine::kGroup * Engine::kParts, a_stride = walk.words * Engine::kParts;
  const int64_t blocks = (walk.rows_padded + kRows - 1) / kRows;
  const auto rows_of = [&](int64_t block) {
    return block < 0 || block >= blocks ? 0 : smaller(kRows, walk.rows_padded - block * kRows);
  };
  for (int64_t block = -1; block <= blocks; block++) {
    const int64_t first = block * kRows, rows = smaller(rows_of(block), walk.rows - first);
    const int64_t even = (block & 1) * kRows, odd = kRows - even;
    Product ahead(rows_of(block + 1), walk.columns, walk.words, walk.a + (first + kRows) * a_stride, a_stride, walk.b,
                  walk.products + odd * walk.stride, walk.stride);
    Product behind(rows_of(block - 1), walk.width, walk.columns / Engine::kGroup, walk.factors + odd * factor_stride,
                   factor_stride, walk.values, walk.out + (first - kRows) * walk.width, walk.width);
    const int64_t steps = ahead.steps() + behind.steps(), steps_per_row = rows > 0 ? (steps << 16) / rows : 0;
    int64_t done = 0;
    for (int64_t i = 0; i < rows; i++) {
      for (const int64_t due = ((i + 1) * steps_per_row) >> 16; done < due; done++)
        if (!ahead.template step<false>()) behind.template step<true>();
      work(first + i, walk.products + (even + i) * walk.stride, walk.factors + (even + i) * factor_stride, [] {});
    }
    for (; done < steps; done++)
      if (!ahead.template step<false>()) behind.template step<true>();
  }
}

template <class Engine, class Work>
void walk_rows(const RowWalk& walk, const Work& work) {
  if constexpr (Engine::kInSteps)
    walk_rows_in_steps<Engine>(walk, work);
  else
    walk_row_blocks<Engine>(walk, work);
}

}  // namespace
