// Gradients of queries in a fixed order, for torch.use_deterministic_algorithms: a tile of 128 queries, over all their keys.
// Scores are computed again (seven products in total instead of five), and every sum stays in the registers of one warp.
#pragma once

#include "attention_rows.h"

namespace scfm::cuda {

template <int kHeadWidth>
struct QueryShape {
  static constexpr int kWidth = kHeadWidth, kRows = kTileRows, kKeys = kWidth == 128 ? 32 : 64;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kScoreColumns = kKeys / 8, kOutColumns = kWidth / 8;
  // Shared memory: queries, grad_out; then two stages of keys, values, bias.
  static constexpr int kRowsBytes = kRows * kRowBytes<kWidth>, kKeyBytes = kKeys * kRowBytes<kWidth>;
  static constexpr int kStageBytes = 2 * kKeyBytes + 4 * kKeys;
  static constexpr int kSharedBytes = 2 * kRowsBytes + 2 * kStageBytes;
};

template <class Shape>
SCFM_DEVICE void copy_stage(const Problem& problem, const Work& work, int block, uint32_t stage) {
  const int64_t begin = work.tile.other_begin + static_cast<int64_t>(block) * Shape::kKeys;
  const int n_valid = work.tile.n_other - block * Shape::kKeys;
  copy_rows<Shape::kKeys, Shape::kWidth, Shape::kThreads>(stage, problem.k, begin, n_valid, work.head);
  copy_rows<Shape::kKeys, Shape::kWidth, Shape::kThreads>(stage + Shape::kKeyBytes, problem.v, begin, n_valid, work.head);
  if (problem.key_bias.data != nullptr)
    copy_floats<Shape::kKeys>(stage + 2 * Shape::kKeyBytes, address_of(problem.key_bias, begin, work.head),
                              problem.key_bias.token_stride, n_valid);
  copies_commit();
}

// Turns dP into factor * P (dP - delta); [..].x and .y are the two rows of a lane.
template <class Shape>
SCFM_DEVICE void row_score_gradients(float (&grads)[Shape::kScoreColumns][4],
                                     const float (&scores)[Shape::kScoreColumns][4], Pair lse, Pair delta, uint32_t bias,
                                     bool has_bias, float scale, float factor, int n_valid) {
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const int key = 8 * column + accumulator_column();
    Pair offset{0.f, 0.f};
    if (has_bias) offset = shared_pair(bias + 4 * key);
    offset.x = key < n_valid ? offset.x * kLog2E : -kInfinity;
    offset.y = key + 1 < n_valid ? offset.y * kLog2E : -kInfinity;
    const float(&score)[4] = scores[column];
    float(&grad)[4] = grads[column];
    grad[0] = exp2_fast(multiply_add(score[0], scale, offset.x - lse.x)) * (grad[0] - delta.x) * factor;
    grad[1] = exp2_fast(multiply_add(score[1], scale, offset.y - lse.x)) * (grad[1] - delta.x) * factor;
    grad[2] = exp2_fast(multiply_add(score[2], scale, offset.x - lse.y)) * (grad[2] - delta.y) * factor;
    grad[3] = exp2_fast(multiply_add(score[3], scale, offset.y - lse.y)) * (grad[3] - delta.y) * factor;
  }
}

// grad_q = scale * (sum over keys + term of the own key).
template <class Element, class Shape>
SCFM_DEVICE void store_grad_q(const Problem& problem, const Work& work, const float (&sums)[Shape::kOutColumns][4],
                              float undo) {
  SCFM_UNROLL
  for (int half = 0; half < 2; half++) {
    const int row = 16 * warp_index() + 8 * half + accumulator_row();
    if (row >= work.tile.count) continue;
    const int64_t token = work.tile.begin + static_cast<int64_t>(row);
    const int64_t start = (token * problem.n_heads + work.head) * Shape::kWidth;
    SCFM_UNROLL
    for (int column = 0; column < Shape::kOutColumns; column++) {
      const int element = 8 * column + accumulator_column();
      Pair own{0.f, 0.f};
      if (row >= work.tile.own) {
        own.x = global_float(address_of(problem.grad_q_sum, start + element));
        own.y = global_float(address_of(problem.grad_q_sum, start + element + 1));
      }
      const float x = multiply_add(sums[column][2 * half], undo, own.x) * problem.scale;
      const float y = multiply_add(sums[column][2 * half + 1], undo, own.y) * problem.scale;
      store_global(address_of(problem.grad_q, token, work.head, element), pack<Element>(x, y));
    }
  }
}

template <class Element, int kWidth>
SCFM_KERNEL(256, 1) attention_backward_queries(SCFM_PARAMETER Problem problem) {
  using Shape = QueryShape<kWidth>;
  const Work work = work_of_block(problem, problem.query_tiles);
  const uint32_t queries = shared_base(), out_grads = queries + Shape::kRowsBytes, stages = out_grads + Shape::kRowsBytes;
  const int n_blocks = divide_up(work.tile.n_other, Shape::kKeys);
  const float factor = kNarrow<Element> ? gradient_factor(problem, work) : 1.f;
  const bool has_bias = problem.key_bias.data != nullptr;
  const int row = 16 * warp_index() + accumulator_row();
  const int64_t first = work.head * problem.n_queries + work.tile.begin + row;
  Pair lse{kInfinity, kInfinity}, delta{0.f, 0.f};
  if (row < work.tile.count) {
    lse.x = global_float(address_of(problem.row_lse, first));
    delta.x = global_float(address_of(problem.row_delta, first));
  }
  if (row + 8 < work.tile.count) {
    lse.y = global_float(address_of(problem.row_lse, first + 8));
    delta.y = global_float(address_of(problem.row_delta, first + 8));
  }
  float sums[Shape::kOutColumns][4];
  clear(sums);
  if (n_blocks > 0) {
    copy_rows<Shape::kRows, kWidth, Shape::kThreads>(queries, problem.q, work.tile.begin, work.tile.count, work.head);
    copy_rows<Shape::kRows, kWidth, Shape::kThreads>(out_grads, problem.grad_out, work.tile.begin, work.tile.count, work.head);
    copy_stage<Shape>(problem, work, 0, stages);
  }
  for (int block = 0; block < n_blocks; block++) {
    const uint32_t stage = stages + (block & 1) * Shape::kStageBytes;
    copies_wait();
    barrier();
    if (block + 1 < n_blocks) copy_stage<Shape>(problem, work, block + 1, stages + (~block & 1) * Shape::kStageBytes);
    float scores[Shape::kScoreColumns][4], grads[Shape::kScoreColumns][4];
    multiply_tiles<Element, kWidth>(scores, queries, stage);
    multiply_tiles<Element, kWidth>(grads, out_grads, stage + Shape::kKeyBytes);
    row_score_gradients<Shape>(grads, scores, lse, delta, stage + 2 * Shape::kKeyBytes, has_bias, problem.scale * kLog2E,
                               factor, work.tile.n_other - block * Shape::kKeys);
    add_product<Element>(sums, grads, stage);
  }
  store_grad_q<Element, Shape>(problem, work, sums, 1.f / factor);
}

}  // namespace scfm::cuda
