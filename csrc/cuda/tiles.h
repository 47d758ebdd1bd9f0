// Tiles in shared memory and fragments in registers: the addressing of all kernels.
//
// A tile row holds the kWidth elements of a token in chunks of 16 bytes. Chunks are permuted within a row (swizzle), so
// that the eight rows which a matrix load reads at once lie in different banks, without padding.
#pragma once

#include "attention.h"
#include "device.h"

namespace scfm::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int kWidth>
constexpr int kRowBytes = 2 * kWidth;

template <int kWidth>
SCFM_DEVICE uint32_t swizzled(int row, int chunk) {
  constexpr int kChunks = kWidth / 8;
  // 32 wide: two rows fill the 128 bytes that all banks read at once.
  const int mixed = kChunks >= 8 ? chunk ^ (row & 7) : chunk ^ ((row / (8 / kChunks)) & (kChunks - 1));
  return static_cast<uint32_t>(row * kRowBytes<kWidth> + mixed * 16);
}

SCFM_DEVICE int lane_index() { return thread_index() & 31; }
SCFM_DEVICE int warp_index() { return thread_index() >> 5; }

// Row of an accumulator (of 16, the second half 8 further down) and first of its two columns (of 8) that a lane holds.
SCFM_DEVICE int accumulator_row() { return lane_index() >> 2; }
SCFM_DEVICE int accumulator_column() { return 2 * (lane_index() & 3); }

SCFM_DEVICE const void* at(const Tokens& tokens, int64_t token, int64_t head, int element) {
  return static_cast<const char*>(tokens.data) + 2 * (token * tokens.token_stride + head * tokens.head_stride + element);
}
SCFM_DEVICE void* address_of(const Tokens& tokens, int64_t token, int64_t head, int element) {
  return static_cast<char*>(tokens.data) + 2 * (token * tokens.token_stride + head * tokens.head_stride + element);
}
SCFM_DEVICE void* address_of(const Scalars& scalars, int64_t token, int64_t head) {
  return reinterpret_cast<char*>(scalars.data) + 4 * (token * scalars.token_stride + head * scalars.head_stride);
}
SCFM_DEVICE void* address_of(float* workspace, int64_t index) { return reinterpret_cast<char*>(workspace) + 4 * index; }

SCFM_DEVICE float scalar_or_zero(const Scalars& scalars, int64_t token, int64_t head) {
  return scalars.data == nullptr ? 0.f : global_float(address_of(scalars, token, head));
}

// The tile and head of this block; the heads of one tile run at the same time, long tiles first.
struct Work {
  Tile tile;
  int64_t head;
};
SCFM_DEVICE Work work_of_block(const Problem& problem, const Tile* tiles) {
  const int64_t index = block_index() / problem.n_heads;
  const char* address = reinterpret_cast<const char*>(tiles) + index * static_cast<int64_t>(sizeof(Tile));
  const Chunk a = global_chunk(address), b = global_chunk(address + 16);
  Work work;
  work.tile.begin = static_cast<int32_t>(a.words[0]);
  work.tile.count = static_cast<int32_t>(a.words[1]);
  work.tile.other_begin = static_cast<int32_t>(a.words[2]);
  work.tile.n_other = static_cast<int32_t>(a.words[3]);
  work.tile.own = static_cast<int32_t>(b.words[0]);
  work.tile.cell = static_cast<int32_t>(b.words[1]);
  work.head = block_index() - index * problem.n_heads;
  return work;
}

// Start copying kRows tokens into a tile; rows from n_valid on are zeros, because masking is not enough: 0 times NaN is NaN.
template <int kRows, int kWidth, int kThreads>
SCFM_DEVICE void copy_rows(uint32_t shared, const Tokens& tokens, int64_t begin, int n_valid, int64_t head) {
  constexpr int kChunks = kWidth / 8;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
  SCFM_UNROLL
  for (int step = 0; step < kRows * kChunks / kThreads; step++) {
    const int index = step * kThreads + thread_index(), row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < n_valid;
    copy_chunk(shared + swizzled<kWidth>(row, chunk), at(tokens, begin + (valid ? row : 0), head, 8 * chunk), valid);
  }
}

// Start copying one float per row; zero from n_valid on. `first` is the address of row 0, `stride` counts floats.
template <int kRows>
SCFM_DEVICE void copy_floats(uint32_t shared, const void* first, int64_t stride, int n_valid) {
  const int row = thread_index();
  if (row >= kRows) return;
  const bool valid = row < n_valid;
  copy_float(shared + 4 * row, static_cast<const char*>(first) + (valid ? 4 * row * stride : 0), valid);
}

// Left operand: 16 rows of a tile, elements 16 step .. 16 step + 15.
template <int kWidth>
SCFM_DEVICE void load_left(uint32_t (&words)[4], uint32_t tile, int row, int step) {
  const int lane = lane_index();
  load_matrices(words, tile + swizzled<kWidth>(row + (lane & 15), 2 * step + (lane >> 4)));
}

// Left operand, transposed: rows are elements 16 band .. of the tile, the summed axis its rows row .. row + 15.
template <int kWidth>
SCFM_DEVICE void load_left_transposed(uint32_t (&words)[4], uint32_t tile, int band, int row) {
  const int lane = lane_index();
  const int token = row + (lane & 7) + ((lane >> 4) << 3);
  load_matrices_transposed(words, tile + swizzled<kWidth>(token, 2 * band + ((lane >> 3) & 1)));
}

// Right operands of two adjacent products: columns are 16 rows of the tile, the summed axis elements 16 step .. .
// Words 0 and 1 belong to the first eight columns, 2 and 3 to the others.
template <int kWidth>
SCFM_DEVICE void load_right(uint32_t (&words)[4], uint32_t tile, int row, int step) {
  const int lane = lane_index();
  const int token = row + (lane & 7) + ((lane >> 4) << 3);
  load_matrices(words, tile + swizzled<kWidth>(token, 2 * step + ((lane >> 3) & 1)));
}

// Right operands of two adjacent products: columns are elements 8 chunk .. 8 chunk + 15, the summed axis rows.
template <int kWidth>
SCFM_DEVICE void load_right_transposed(uint32_t (&words)[4], uint32_t tile, int row, int chunk) {
  const int lane = lane_index();
  load_matrices_transposed(words, tile + swizzled<kWidth>(row + (lane & 15), chunk + (lane >> 4)));
}

// Accumulators of 16 columns as the left operand of the next product: the two layouts agree.
template <class Element>
SCFM_DEVICE void as_left(uint32_t (&words)[4], const float (&first)[4], const float (&second)[4]) {
  words[0] = pack<Element>(first[0], first[1]);
  words[1] = pack<Element>(first[2], first[3]);
  words[2] = pack<Element>(second[0], second[1]);
  words[3] = pack<Element>(second[2], second[3]);
}

template <int kCount>
SCFM_DEVICE void clear(float (&values)[kCount][4]) {
  SCFM_UNROLL
  for (int i = 0; i < kCount; i++) values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.f;
}

// products[16 rows of this warp][rows of the other tile] = rows . other rows, over the width of both.
template <class Element, int kWidth, int kColumns>
SCFM_DEVICE void multiply_tiles(float (&products)[kColumns][4], uint32_t tile, uint32_t other) {
  clear(products);
  SCFM_UNROLL
  for (int step = 0; step < kWidth / 16; step++) {
    uint32_t left[4];
    load_left<kWidth>(left, tile, 16 * warp_index(), step);
    SCFM_UNROLL
    for (int column = 0; column < kColumns; column += 2) {
      uint32_t right[4];
      load_right<kWidth>(right, other, 8 * column, step);
      multiply<Element>(products[column], left, right[0], right[1]);
      multiply<Element>(products[column + 1], left, right[2], right[3]);
    }
  }
}

// sums[16 rows of this warp][width] += weights[16 rows][rows of the tile] tile.
template <class Element, int kColumns, int kWeights>
SCFM_DEVICE void add_product(float (&sums)[kColumns][4], const float (&weights)[kWeights][4], uint32_t tile) {
  SCFM_UNROLL
  for (int step = 0; step < kWeights / 2; step++) {
    uint32_t left[4];
    as_left<Element>(left, weights[2 * step], weights[2 * step + 1]);
    SCFM_UNROLL
    for (int column = 0; column < kColumns; column += 2) {
      uint32_t right[4];
      load_right_transposed<8 * kColumns>(right, tile, 16 * step, column);
      multiply<Element>(sums[column], left, right[0], right[1]);
      multiply<Element>(sums[column + 1], left, right[2], right[3]);
    }
  }
}

// Over the four lanes that share a row.
SCFM_DEVICE float row_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
SCFM_DEVICE float row_max(float value) {
  value = larger(value, shuffle_xor(value, 1));
  return larger(value, shuffle_xor(value, 2));
}

SCFM_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace scfm::cuda
