// Products of bfloat16 on the tile unit (AMX): a tile of A is 16 rows x 32 elements, one of B 32 elements x 16 columns, one
// of C 16 x 16 floats. The layouts of gemm_vector.h are those of the tiles, so both engines share all packing.
#pragma once

#include "engine_bfloat16.h"

namespace {

struct AmxEngine : BFloat16Base {
  static constexpr int64_t kRowStep = 16;  // rows of A are padded to a multiple of this
  static constexpr int64_t kForwardRows = 32, kForwardKeys = 128, kBackwardKeys = 128;

  // Every tile has full size: 16 rows of 64 bytes. A thread holds the tiles from one end of a task to the other.
  AmxEngine() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc 12 believes that only the first bytes are read, and drops the rest: make it give up all of them.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~AmxEngine() { _tile_release(); }
  AmxEngine(const AmxEngine&) = delete;
  AmxEngine& operator=(const AmxEngine&) = delete;

  // `rows` and `columns` are multiples of 16, so is `words`.
  template <bool kAccumulate>
  static void gemm(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, float* c, int64_t c_stride) {
    for (int64_t step = 0; step < gemm_steps(rows, columns); step++)
      gemm_step<kAccumulate>(step, rows, columns, words, a, a_stride, b, c, c_stride);
  }

  // The tile unit works while the vector unit goes on with other instructions. A product can therefore be asked for in
  // steps, one block of 32 x 32 each, between which the caller does vector work that does not depend on it.
  static constexpr bool kInSteps = true;
  static int64_t gemm_steps(int64_t rows, int64_t columns) { return (rows + 31) / 32 * ((columns + 31) / 32); }

  template <bool kAccumulate>
  static void gemm_step(int64_t step, int64_t rows, int64_t columns, int64_t words, const uint32_t* a,
                        int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride) {
    const int64_t row_steps = (rows + 31) / 32, row = step % row_steps * 32, column = step / row_steps * 32;
    const uint32_t *left = a + row * a_stride, *panel = b + column / kPanel * words * kPanel + column % kPanel;
    float* to = c + row * c_stride + column;
    const bool two_rows = row + 16 < rows, two_columns = column + 16 < columns;
    // The tile intrinsics of gcc 12 do not say that they read memory: without this, stores to the operands move past them.
    __asm__ volatile("" ::: "memory");
    if (two_rows && two_columns)
      tiles<kAccumulate, true, true>(words, left, a_stride, panel, to, c_stride);
    else if (two_rows)
      tiles<kAccumulate, true, false>(words, left, a_stride, panel, to, c_stride);
    else if (two_columns)
      tiles<kAccumulate, false, true>(words, left, a_stride, panel, to, c_stride);
    else
      tiles<kAccumulate, false, false>(words, left, a_stride, panel, to, c_stride);
    __asm__ volatile("" ::: "memory");
  }

  static int64_t burn(int64_t rounds) {
    const AmxEngine engine;
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t round = 0; round < rounds; round++) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    return rounds * 4 * (16 * 16 * 32 * 2);
  }

 private:
  // C in tiles 0 to 3 (row by row), A in 4 and 5, B in 6 and 7.
  template <bool kAccumulate, bool kTwoRows, bool kTwoColumns>
  static inline __attribute__((always_inline)) void tiles(int64_t words, const uint32_t* a, int64_t a_stride,
                                                          const uint32_t* b, float* c, int64_t c_stride) {
    const int64_t a_bytes = a_stride * 4, b_bytes = kPanel * 4, c_bytes = c_stride * 4;
    float* lower = c + 16 * c_stride;
    if constexpr (kAccumulate) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kTwoColumns) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (kTwoRows) _tile_loadd(2, lower, c_bytes);
      if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, lower + 16, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (kTwoColumns) _tile_zero(1);
      if constexpr (kTwoRows) _tile_zero(2);
      if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
    }
    for (int64_t word = 0; word < words; word += 16) {
      _tile_loadd(4, a + word, a_bytes);
      _tile_loadd(6, b + word * kPanel, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwoColumns) {
        _tile_loadd(7, b + word * kPanel + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTwoRows) {
        _tile_loadd(5, a + 16 * a_stride + word, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_stored(1, c + 16, c_bytes);
    if constexpr (kTwoRows) _tile_stored(2, lower, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, lower + 16, c_bytes);
  }
};

}  // namespace
