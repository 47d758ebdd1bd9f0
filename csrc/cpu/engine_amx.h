// Products of bfloat16 on the tile unit (AMX): a tile of A is 16 rows x 32 elements, one of B 32 elements x 16 columns, one
// of C 16 x 16 floats. The layouts of gemm_vector.h are those of the tiles, so both engines use the same packing.
#pragma once

#include "engine_bfloat16.h"

namespace {

// 16 rows of C and 32 or 64 columns: C in tiles 0 to 3, A in 4, B in 5 to 7. Every step is between two barriers: the tile
// intrinsics of gcc 12 do not say that they read memory, and stores to the operands would move past them.
template <bool kAccumulate, bool kFour>
inline __attribute__((always_inline)) void begin_tiles(const float* c, int64_t c_bytes) {
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kFour) _tile_loadd(2, c + 32, c_bytes);
    if constexpr (kFour) _tile_loadd(3, c + 48, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kFour) _tile_zero(2);
    if constexpr (kFour) _tile_zero(3);
  }
}
template <bool kFour>
inline __attribute__((always_inline)) void multiply_tiles(const uint32_t* a, int64_t a_bytes, const uint32_t* b) {
  constexpr int64_t kBytes = kPanel * 4;
  _tile_loadd(4, a, a_bytes);
  _tile_loadd(5, b, kBytes);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, b + 16, kBytes);
  _tile_dpbf16ps(1, 4, 6);
  if constexpr (kFour) {
    _tile_loadd(7, b + 32, kBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 48, kBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
}
template <bool kFour>
inline __attribute__((always_inline)) void end_tiles(float* c, int64_t c_bytes) {
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kFour) _tile_stored(2, c + 32, c_bytes);
  if constexpr (kFour) _tile_stored(3, c + 48, c_bytes);
}

// An operand is one piece (see engine_amx_float.h for more).
struct WholeOperand {
  static constexpr int kParts = 1, kProducts = 1;
  static constexpr int8_t kPartOfA[1] = {0}, kPartOfB[1] = {0};
};

// The tile unit works while the vector unit executes other instructions. A product can therefore be computed in steps,
// between which the caller does vector work that does not depend on it. A step is 16 x 64 results over 32 elements each, few
// enough that the processor executes a step and the vector work at the same time. Results stay in tiles from the first
// step of a block to its last, so no other product may come between.
//
// `rows` and `words` (of one piece) are multiples of 16, `columns` of 32.
template <class Pieces>
struct TileProduct {
  int64_t rows, columns, words;
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b;
  float* c;
  int64_t c_stride, row = 0, column = 0, word = 0;
  int product = 0;

  TileProduct(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride, const uint32_t* b,
              float* c, int64_t c_stride)
      : rows(rows), columns(rows == 0 ? 0 : columns), words(words), a(a), a_stride(a_stride), b(b), c(c), c_stride(c_stride) {}

  int64_t steps() const { return (rows / 16) * ((columns + 63) / 64) * (words / 16) * Pieces::kProducts; }

  // False when all is done.
  template <bool kAccumulate>
  inline __attribute__((always_inline)) bool step() {
    if (column >= columns) return false;
    __asm__ volatile("" ::: "memory");
    if (column + 32 < columns)
      tiles<kAccumulate, true>();
    else
      tiles<kAccumulate, false>();
    __asm__ volatile("" ::: "memory");
    if ((word += 16) < words) return true;
    word = 0;
    if (++product < Pieces::kProducts) return true;
    product = 0;
    if ((row += 16) < rows) return true;
    row = 0;
    column += 64;
    return true;
  }

  template <bool kAccumulate, bool kFour>
  inline __attribute__((always_inline)) void tiles() const {
    float* to = c + row * c_stride + column;
    if (word == 0 && product == 0) begin_tiles<kAccumulate, kFour>(to, c_stride * 4);
    const int64_t part_of_a = Pieces::kPartOfA[product], part_of_b = Pieces::kPartOfB[product];
    multiply_tiles<kFour>(a + row * a_stride + part_of_a * (a_stride / Pieces::kParts) + word, a_stride * 4,
                          b + (column * Pieces::kParts + part_of_b * kPanel) * words + word * kPanel);
    if (word + 16 == words && product + 1 == Pieces::kProducts) end_tiles<kFour>(to, c_stride * 4);
  }
};

struct AmxEngine : BFloat16Base {
  static constexpr int64_t kRowStep = 16;  // rows of A are padded to a multiple of this
  static constexpr int64_t kForwardRows = 16, kForwardKeys = 128, kBackwardKeys = 128;

  // Every tile has full size: 16 rows of 64 bytes. A thread holds the tiles for a whole task.
  AmxEngine() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc 12 assumes that only the first bytes are read, and drops the stores to the rest; this keeps them.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~AmxEngine() { _tile_release(); }
  AmxEngine(const AmxEngine&) = delete;
  AmxEngine& operator=(const AmxEngine&) = delete;

  static constexpr bool kInSteps = true;
  using Product = TileProduct<WholeOperand>;

  template <bool kAccumulate>
  static void gemm(int64_t rows, int64_t columns, int64_t words, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, float* c, int64_t c_stride) {
    Product product(rows, columns, words, a, a_stride, b, c, c_stride);
    while (product.step<kAccumulate>()) {
    }
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
};

}  // namespace
