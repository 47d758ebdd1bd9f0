// Forward of one tile: up to 128 queries of one cell and head, over all keys that they attend to.
//
// A warp owns two bands of 16 queries: their scores, running maxima, sums and outputs stay in its registers. Blocks of keys
// and values are copied to two buffers in shared memory; while one is used, the other is filled.
#pragma once

#include "tiles.h"

namespace scfm::cuda {

template <int kHeadWidth>
struct ForwardShape {
  static constexpr int kWidth = kHeadWidth, kRows = kTileRows, kKeys = kWidth == 128 ? 32 : 64;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBands = kRows / kWarps / 16;
  static constexpr int kScoreColumns = kKeys / 8, kOutColumns = kWidth / 8;
  // Shared memory: queries, then two stages of keys, values, bias.
  static constexpr int kQueryBytes = kRows * kRowBytes<kWidth>, kKeyBytes = kKeys * kRowBytes<kWidth>;
  static constexpr int kStageBytes = 2 * kKeyBytes + 4 * kKeys;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
};

template <class Shape>
struct ForwardRows {  // the part of one lane; [..][2]: rows accumulator_row() and that + 8 of a band
  float scores[Shape::kBands][Shape::kScoreColumns][4];
  float out[Shape::kBands][Shape::kOutColumns][4];
  float top[Shape::kBands][2], sum[Shape::kBands][2];
};

template <class Shape, bool kBiased>
SCFM_DEVICE void copy_keys(const Problem& problem, const Work& work, int block, uint32_t stage) {
  constexpr int kWidth = Shape::kWidth, kKeys = Shape::kKeys;
  const int64_t begin = work.tile.other_begin + static_cast<int64_t>(block) * kKeys;
  const int n_valid = work.tile.n_other - block * kKeys;
  copy_rows<kKeys, kWidth, Shape::kThreads>(stage, problem.k, begin, n_valid, work.head);
  copy_rows<kKeys, kWidth, Shape::kThreads>(stage + Shape::kKeyBytes, problem.v, begin, n_valid, work.head);
  if (kBiased && problem.key_bias.data != nullptr)
    copy_floats<kKeys>(stage + 2 * Shape::kKeyBytes, address_of(problem.key_bias, begin, work.head),
                       problem.key_bias.token_stride, n_valid);
  copies_commit();
}

template <class Element, class Shape>
SCFM_DEVICE void score_keys(ForwardRows<Shape>& rows, uint32_t queries, uint32_t keys) {
  constexpr int kWidth = Shape::kWidth;
  SCFM_UNROLL
  for (int band = 0; band < Shape::kBands; band++) clear(rows.scores[band]);
  SCFM_UNROLL
  for (int step = 0; step < kWidth / 16; step++) {
    uint32_t left[Shape::kBands][4];
    SCFM_UNROLL
    for (int band = 0; band < Shape::kBands; band++)
      load_left<kWidth>(left[band], queries, 16 * (warp_index() * Shape::kBands + band), step);
    SCFM_UNROLL
    for (int column = 0; column < Shape::kScoreColumns; column += 2) {
      uint32_t right[4];
      load_right<kWidth>(right, keys, 8 * column, step);
      SCFM_UNROLL
      for (int band = 0; band < Shape::kBands; band++) {
        multiply<Element>(rows.scores[band][column], left[band], right[0], right[1]);
        multiply<Element>(rows.scores[band][column + 1], left[band], right[2], right[3]);
      }
    }
  }
}

// Scale and add the bias, in units of log 2 (without bias the scale is applied with the exponential); hide keys from n_valid on.
template <class Shape, bool kBiased>
SCFM_DEVICE void bias_scores(ForwardRows<Shape>& rows, uint32_t bias, bool has_bias, float scale, int n_valid) {
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const int key = 8 * column + accumulator_column();
    Pair offset{0.f, 0.f};
    if (kBiased && has_bias) offset = shared_pair(bias + 4 * key);
    SCFM_UNROLL
    for (int band = 0; band < Shape::kBands; band++) {
      float(&score)[4] = rows.scores[band][column];
      if (kBiased) {
        score[0] = multiply_add(score[0], scale, offset.x * kLog2E);
        score[1] = multiply_add(score[1], scale, offset.y * kLog2E);
        score[2] = multiply_add(score[2], scale, offset.x * kLog2E);
        score[3] = multiply_add(score[3], scale, offset.y * kLog2E);
      }
      if (n_valid < Shape::kKeys) {
        if (key >= n_valid) score[0] = score[2] = -kInfinity;
        if (key + 1 >= n_valid) score[1] = score[3] = -kInfinity;
      }
    }
  }
}

// Turns scores into probabilities relative to the running maximum, and rescales earlier sums and outputs to that maximum.
// `factor` converts scores and maxima to units of log 2.
template <class Shape>
SCFM_DEVICE void soften(ForwardRows<Shape>& rows, float factor) {
  SCFM_UNROLL
  for (int band = 0; band < Shape::kBands; band++) {
    SCFM_UNROLL
    for (int half = 0; half < 2; half++) {
      float top = rows.top[band][half];
      SCFM_UNROLL
      for (int column = 0; column < Shape::kScoreColumns; column++) {
        const float(&score)[4] = rows.scores[band][column];
        top = larger(top, larger(score[2 * half], score[2 * half + 1]));
      }
      top = row_max(top);
      // No key so far: any finite reference gives exp2(-inf) = 0, while -inf would give NaN.
      const float reference = top == -kInfinity ? 0.f : top * factor;
      const float shrink = exp2_fast(multiply_add(rows.top[band][half], factor, -reference));
      rows.top[band][half] = top;
      float sum = rows.sum[band][half] * shrink;
      SCFM_UNROLL
      for (int column = 0; column < Shape::kScoreColumns; column++) {
        float(&score)[4] = rows.scores[band][column];
        score[2 * half] = exp2_fast(multiply_add(score[2 * half], factor, -reference));
        score[2 * half + 1] = exp2_fast(multiply_add(score[2 * half + 1], factor, -reference));
        sum += score[2 * half] + score[2 * half + 1];
      }
      rows.sum[band][half] = sum;
      SCFM_UNROLL
      for (int column = 0; column < Shape::kOutColumns; column++) {
        rows.out[band][column][2 * half] *= shrink;
        rows.out[band][column][2 * half + 1] *= shrink;
      }
    }
  }
}

template <class Element, class Shape>
SCFM_DEVICE void mix_values(ForwardRows<Shape>& rows, uint32_t values) {
  SCFM_UNROLL
  for (int step = 0; step < Shape::kKeys / 16; step++) {
    uint32_t left[Shape::kBands][4];
    SCFM_UNROLL
    for (int band = 0; band < Shape::kBands; band++)
      as_left<Element>(left[band], rows.scores[band][2 * step], rows.scores[band][2 * step + 1]);
    SCFM_UNROLL
    for (int column = 0; column < Shape::kOutColumns; column += 2) {
      uint32_t right[4];
      load_right_transposed<Shape::kWidth>(right, values, 16 * step, column);
      SCFM_UNROLL
      for (int band = 0; band < Shape::kBands; band++) {
        multiply<Element>(rows.out[band][column], left[band], right[0], right[1]);
        multiply<Element>(rows.out[band][column + 1], left[band], right[2], right[3]);
      }
    }
  }
}

// The own key of a target query, merged by online softmax. Every lane takes part in the sums, also those of rows
// without an own key, whose result is dropped.
template <class Element, class Shape>
SCFM_DEVICE void add_own_key(ForwardRows<Shape>& rows, const Problem& problem, const Work& work, int band, int half,
                             int row, float scale) {
  const bool own = row >= work.tile.own && row < work.tile.count;
  const int64_t token = work.tile.begin + static_cast<int64_t>(own ? row : 0);
  float product = 0.f;
  SCFM_UNROLL
  for (int column = 0; column < Shape::kOutColumns; column++) {
    const int element = 8 * column + accumulator_column();
    if (!own) continue;
    const Pair query = unpack<Element>(global_word(at(problem.q, token, work.head, element)));
    const Pair key = unpack<Element>(global_word(at(problem.k, token, work.head, element)));
    product = multiply_add(query.x, key.x, multiply_add(query.y, key.y, product));
  }
  product = row_sum(product);
  if (!own) return;
  const float score = multiply_add(product, scale, scalar_or_zero(problem.key_bias, token, work.head) * kLog2E);
  const float before = rows.top[band][half], top = larger(before, score), reference = top == -kInfinity ? 0.f : top;
  const float shrink = exp2_fast(before - reference), prob = exp2_fast(score - reference);
  rows.top[band][half] = top;
  rows.sum[band][half] = multiply_add(rows.sum[band][half], shrink, prob);
  SCFM_UNROLL
  for (int column = 0; column < Shape::kOutColumns; column++) {
    const int element = 8 * column + accumulator_column();
    const Pair value = unpack<Element>(global_word(at(problem.v, token, work.head, element)));
    float(&out)[4] = rows.out[band][column];
    out[2 * half] = multiply_add(out[2 * half], shrink, prob * value.x);
    out[2 * half + 1] = multiply_add(out[2 * half + 1], shrink, prob * value.y);
  }
}

template <class Element, class Shape>
SCFM_DEVICE void finish_rows(ForwardRows<Shape>& rows, const Problem& problem, const Work& work, float factor,
                             float scale) {
  SCFM_UNROLL
  for (int band = 0; band < Shape::kBands; band++) {
    SCFM_UNROLL
    for (int half = 0; half < 2; half++) {
      const int row = 16 * (warp_index() * Shape::kBands + band) + 8 * half + accumulator_row();
      rows.sum[band][half] = row_sum(rows.sum[band][half]);
      rows.top[band][half] *= factor;
      if (work.tile.own < work.tile.count) add_own_key<Element>(rows, problem, work, band, half, row, scale);
      if (row >= work.tile.count) continue;
      const int64_t token = work.tile.begin + static_cast<int64_t>(row);
      // A query that attends to no key has sum 0: output 0 and log-sum-exp -inf. A NaN must stay NaN.
      const float sum = rows.sum[band][half], inverse = sum == 0.f ? 0.f : 1.f / sum;
      SCFM_UNROLL
      for (int column = 0; column < Shape::kOutColumns; column++) {
        const float(&out)[4] = rows.out[band][column];
        store_global(address_of(problem.out, token, work.head, 8 * column + accumulator_column()),
                     pack<Element>(out[2 * half] * inverse, out[2 * half + 1] * inverse));
      }
      if (accumulator_column() == 0)
        store_global(address_of(problem.lse, token, work.head),
                     sum == 0.f ? -kInfinity : (rows.top[band][half] + log2_fast(sum)) * kLn2);
    }
  }
}

// Without a bias the scale must be positive, so that the largest raw score is the largest scaled one.
template <class Element, int kWidth, bool kBiased>
SCFM_KERNEL(128, 2) attention_forward(SCFM_PARAMETER Problem problem) {
  using Shape = ForwardShape<kWidth>;
  const Work work = work_of_block(problem, problem.query_tiles);
  const float scale = problem.scale * kLog2E, factor = kBiased ? 1.f : scale;
  const uint32_t queries = shared_base(), stages = queries + Shape::kQueryBytes;
  const int n_blocks = divide_up(work.tile.n_other, Shape::kKeys);
  const bool has_bias = problem.key_bias.data != nullptr;

  ForwardRows<Shape> rows;
  SCFM_UNROLL
  for (int band = 0; band < Shape::kBands; band++) {
    clear(rows.out[band]);
    rows.top[band][0] = rows.top[band][1] = -kInfinity;
    rows.sum[band][0] = rows.sum[band][1] = 0.f;
  }
  if (n_blocks > 0) {
    copy_rows<Shape::kRows, kWidth, Shape::kThreads>(queries, problem.q, work.tile.begin, work.tile.count, work.head);
    copy_keys<Shape, kBiased>(problem, work, 0, stages);
  }
  for (int block = 0; block < n_blocks; block++) {
    const uint32_t stage = stages + (block & 1) * Shape::kStageBytes;
    copies_wait();
    // After it, this block has arrived for all threads, and all are done with the buffer that is filled next.
    barrier();
    if (block + 1 < n_blocks) copy_keys<Shape, kBiased>(problem, work, block + 1, stages + (~block & 1) * Shape::kStageBytes);
    score_keys<Element>(rows, queries, stage);
    const int n_valid = work.tile.n_other - block * Shape::kKeys;
    if (kBiased || n_valid < Shape::kKeys)
      bias_scores<Shape, kBiased>(rows, stage + 2 * Shape::kKeyBytes, has_bias, scale, n_valid);
    soften(rows, factor);
    mix_values<Element>(rows, stage + Shape::kKeyBytes);
  }
  finish_rows<Element>(rows, problem, work, factor, scale);
}

}  // namespace scfm::cuda
