// Backward of one tile of keys: 128 keys of one cell and head, over all queries.
//
// The scores are transposed: a warp owns 16 keys, so that P^T and dS^T are left operands in its registers.
// Gradients of keys and values never leave their warp. Gradients of queries are sums over warps and blocks: dS^T passes
// through shared memory, and its product with the keys is added in global memory, in no fixed order. The deterministic
// form leaves that part to attention_backward_queries, where a warp owns queries and computes the scores again.
#pragma once

#include "attention_rows.h"

namespace scfm::cuda {

template <int kHeadWidth>
struct BackwardShape {
  static constexpr int kWidth = kHeadWidth, kKeys = kTileRows, kQueries = kWidth == 128 ? 32 : 64;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kScoreColumns = kQueries / 8, kOutColumns = kWidth / 8;
  // Shared memory: keys, values, gradients of scores; then two stages of queries, grad_out, log-sum-exp, delta.
  static constexpr int kKeyBytes = kKeys * kRowBytes<kWidth>, kQueryBytes = kQueries * kRowBytes<kWidth>;
  static constexpr int kScoreBytes = kKeys * kRowBytes<kQueries>;
  static constexpr int kStageBytes = 2 * kQueryBytes + 8 * kQueries;
  static constexpr int kSharedBytes = 2 * kKeyBytes + kScoreBytes + 2 * kStageBytes;
};

template <class Shape>
struct Stage {  // addresses in shared memory
  uint32_t queries, grads, lse, delta;
  SCFM_DEVICE explicit Stage(uint32_t base)
      : queries(base), grads(base + Shape::kQueryBytes), lse(grads + Shape::kQueryBytes), delta(lse + 4 * Shape::kQueries) {}
};

// `kGrads`: with grad_out and delta.
template <class Shape, bool kGrads>
SCFM_DEVICE void copy_queries(const Problem& problem, const Work& work, int block, uint32_t base) {
  const Stage<Shape> stage(base);
  const int64_t begin = work.tile.other_begin + static_cast<int64_t>(block) * Shape::kQueries;
  const int n_valid = work.tile.n_other - block * Shape::kQueries;
  const int64_t row = work.head * problem.n_queries + begin;
  copy_rows<Shape::kQueries, Shape::kWidth, Shape::kThreads>(stage.queries, problem.q, begin, n_valid, work.head);
  copy_floats<Shape::kQueries>(stage.lse, address_of(problem.row_lse, row), 1, n_valid);
  if (kGrads) {
    copy_rows<Shape::kQueries, Shape::kWidth, Shape::kThreads>(stage.grads, problem.grad_out, begin, n_valid, work.head);
    copy_floats<Shape::kQueries>(stage.delta, address_of(problem.row_delta, row), 1, n_valid);
  }
  copies_commit();
}

// Bias of this lane's two keys in units of log 2; -inf beyond the tile, whose rows then have probability 0.
SCFM_DEVICE Pair key_bias_of_lane(const Problem& problem, const Work& work) {
  const int row = 16 * warp_index() + accumulator_row();
  const int64_t token = work.tile.begin + static_cast<int64_t>(row);
  Pair bias{-kInfinity, -kInfinity};
  if (row < work.tile.count) bias.x = scalar_or_zero(problem.key_bias, token, work.head) * kLog2E;
  if (row + 8 < work.tile.count) bias.y = scalar_or_zero(problem.key_bias, token + 8, work.head) * kLog2E;
  return bias;
}

// Turns scores into probabilities; those of queries from n_valid on are 0.
template <class Shape>
SCFM_DEVICE void probabilities(float (&scores)[Shape::kScoreColumns][4], uint32_t lse, Pair bias, float scale, int n_valid) {
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const int query = 8 * column + accumulator_column();
    Pair minus = shared_pair(lse + 4 * query);
    if (n_valid < Shape::kQueries) {
      if (query >= n_valid) minus.x = kInfinity;
      if (query + 1 >= n_valid) minus.y = kInfinity;
    }
    float(&score)[4] = scores[column];
    score[0] = exp2_fast(multiply_add(score[0], scale, bias.x - minus.x));
    score[1] = exp2_fast(multiply_add(score[1], scale, bias.x - minus.y));
    score[2] = exp2_fast(multiply_add(score[2], scale, bias.y - minus.x));
    score[3] = exp2_fast(multiply_add(score[3], scale, bias.y - minus.y));
  }
}

// Turns dP into dS = P (dP - delta).
template <class Shape>
SCFM_DEVICE void score_gradients(float (&grads)[Shape::kScoreColumns][4], const float (&probs)[Shape::kScoreColumns][4],
                                 uint32_t delta, Pair& bias_sum) {
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const Pair minus = shared_pair(delta + 4 * (8 * column + accumulator_column()));
    float(&grad)[4] = grads[column];
    grad[0] = probs[column][0] * (grad[0] - minus.x);
    grad[1] = probs[column][1] * (grad[1] - minus.y);
    grad[2] = probs[column][2] * (grad[2] - minus.x);
    grad[3] = probs[column][3] * (grad[3] - minus.y);
    bias_sum.x += grad[0] + grad[1];
    bias_sum.y += grad[2] + grad[3];
  }
}

template <class Element, class Shape>
SCFM_DEVICE void store_score_gradients(const float (&grads)[Shape::kScoreColumns][4], uint32_t tile) {
  const int row = 16 * warp_index() + accumulator_row();
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const uint32_t inside = 2 * accumulator_column();
    store_shared(tile + swizzled<Shape::kQueries>(row, column) + inside, pack<Element>(grads[column][0], grads[column][1]));
    store_shared(tile + swizzled<Shape::kQueries>(row + 8, column) + inside,
                 pack<Element>(grads[column][2], grads[column][3]));
  }
}

// grad_q[queries of this block] += factor * dS K, spread over the warps: a band of 16 queries and some columns each.
template <class Element, class Shape>
SCFM_DEVICE void add_grad_q(const Problem& problem, const Work& work, int block, uint32_t score_tile, uint32_t keys,
                            float factor) {
  constexpr int kBands = Shape::kQueries / 16, kColumns = Shape::kOutColumns / (Shape::kWarps / kBands);
  static_assert(kColumns % 2 == 0, "columns come in pairs");
  const int band = warp_index() % kBands, first_column = warp_index() / kBands * kColumns;
  float sums[kColumns][4];
  clear(sums);
  SCFM_UNROLL
  for (int step = 0; step < Shape::kKeys / 16; step++) {
    uint32_t left[4];
    load_left_transposed<Shape::kQueries>(left, score_tile, band, 16 * step);
    SCFM_UNROLL
    for (int column = 0; column < kColumns; column += 2) {
      uint32_t right[4];
      load_right_transposed<Shape::kWidth>(right, keys, 16 * step, first_column + column);
      multiply<Element>(sums[column], left, right[0], right[1]);
      multiply<Element>(sums[column + 1], left, right[2], right[3]);
    }
  }
  SCFM_UNROLL
  for (int half = 0; half < 2; half++) {
    const int query = block * Shape::kQueries + 16 * band + 8 * half + accumulator_row();
    if (query >= work.tile.n_other) continue;
    const int64_t row = (work.tile.other_begin + static_cast<int64_t>(query)) * problem.n_heads + work.head;
    SCFM_UNROLL
    for (int column = 0; column < kColumns; column++)
      add_global(address_of(problem.grad_q_sum, row * Shape::kWidth + 8 * (first_column + column) + accumulator_column()),
                 {sums[column][2 * half] * factor, sums[column][2 * half + 1] * factor});
  }
}

template <class Element, class Shape>
SCFM_DEVICE void store_key_rows(const Tokens& tokens, const Work& work, const float (&sums)[Shape::kOutColumns][4],
                                float factor) {
  SCFM_UNROLL
  for (int half = 0; half < 2; half++) {
    const int row = 16 * warp_index() + 8 * half + accumulator_row();
    if (row >= work.tile.count) continue;
    SCFM_UNROLL
    for (int column = 0; column < Shape::kOutColumns; column++)
      store_global(address_of(tokens, work.tile.begin + static_cast<int64_t>(row), work.head, 8 * column + accumulator_column()),
                   pack<Element>(sums[column][2 * half] * factor, sums[column][2 * half + 1] * factor));
  }
}

// One float per key, from the sums of the four lanes that share its row.
SCFM_DEVICE void store_key_sums(const Problem& problem, const Work& work, Pair sums) {
  sums.x = row_sum(sums.x);
  sums.y = row_sum(sums.y);
  const int row = 16 * warp_index() + accumulator_row();
  const int64_t token = work.tile.begin + static_cast<int64_t>(row);
  if (accumulator_column() != 0) return;
  if (row < work.tile.count) store_global(address_of(problem.key_sums, token, work.head), sums.x);
  if (row + 8 < work.tile.count) store_global(address_of(problem.key_sums, token + 8, work.head), sums.y);
}

template <int kCount>
SCFM_DEVICE void scale_all(float (&values)[kCount][4], float factor) {
  SCFM_UNROLL
  for (int i = 0; i < kCount; i++) {
    SCFM_UNROLL
    for (int j = 0; j < 4; j++) values[i][j] *= factor;
  }
}

template <class Element, int kWidth, bool kAddGradQ>
SCFM_KERNEL(256, 1) attention_backward_keys(SCFM_PARAMETER Problem problem) {
  using Shape = BackwardShape<kWidth>;
  const Work work = work_of_block(problem, problem.key_tiles);
  const uint32_t keys = shared_base(), values = keys + Shape::kKeyBytes, score_tile = values + Shape::kKeyBytes;
  const uint32_t stages = score_tile + Shape::kScoreBytes;
  const int n_blocks = divide_up(work.tile.n_other, Shape::kQueries);
  const float factor = kNarrow<Element> ? gradient_factor(problem, work) : 1.f, undo = 1.f / factor;
  const Pair bias = key_bias_of_lane(problem, work);
  float grad_k[Shape::kOutColumns][4], grad_v[Shape::kOutColumns][4];
  Pair bias_sum{0.f, 0.f};
  clear(grad_k);
  clear(grad_v);
  if (n_blocks > 0) {
    copy_rows<Shape::kKeys, kWidth, Shape::kThreads>(keys, problem.k, work.tile.begin, work.tile.count, work.head);
    copy_rows<Shape::kKeys, kWidth, Shape::kThreads>(values, problem.v, work.tile.begin, work.tile.count, work.head);
    copy_queries<Shape, true>(problem, work, 0, stages);
  }
  for (int block = 0; block < n_blocks; block++) {
    const Stage<Shape> stage(stages + (block & 1) * Shape::kStageBytes);
    copies_wait();
    // After it, this block has arrived for all threads, and all are done with the scores and with the buffer that is filled next.
    barrier();
    if (block + 1 < n_blocks)
      copy_queries<Shape, true>(problem, work, block + 1, stages + (~block & 1) * Shape::kStageBytes);
    float probs[Shape::kScoreColumns][4], grads[Shape::kScoreColumns][4];
    multiply_tiles<Element, kWidth>(probs, keys, stage.queries);
    multiply_tiles<Element, kWidth>(grads, values, stage.grads);
    probabilities<Shape>(probs, stage.lse, bias, problem.scale * kLog2E, work.tile.n_other - block * Shape::kQueries);
    score_gradients<Shape>(grads, probs, stage.delta, bias_sum);
    if (kNarrow<Element>) scale_all(grads, factor);
    add_product<Element>(grad_v, probs, stage.grads);
    add_product<Element>(grad_k, grads, stage.queries);
    if (kAddGradQ) {
      store_score_gradients<Element, Shape>(grads, score_tile);
      barrier();
      add_grad_q<Element, Shape>(problem, work, block, score_tile, keys, undo);
    }
  }
  store_key_rows<Element, Shape>(problem.grad_k, work, grad_k, problem.scale * undo);
  store_key_rows<Element, Shape>(problem.grad_v, work, grad_v, 1.f);
  if (problem.key_sums.data != nullptr) store_key_sums(problem, work, bias_sum);
}

constexpr int kRoundThreads = 256;

// grad_q = scale * grad_q_sum, eight elements per thread.
template <class Element, int kWidth>
SCFM_KERNEL(kRoundThreads, 4) attention_round_queries(SCFM_PARAMETER Problem problem) {
  constexpr int kChunks = kWidth / 8;
  const int64_t index = block_index() * kRoundThreads + thread_index(), row = index / kChunks;
  if (row >= problem.n_queries * problem.n_heads) return;
  const Chunk low = global_chunk(address_of(problem.grad_q_sum, 8 * index));
  const Chunk high = global_chunk(address_of(problem.grad_q_sum, 8 * index + 4));
  Chunk rounded;
  SCFM_UNROLL
  for (int i = 0; i < 2; i++) {
    rounded.words[i] =
        pack<Element>(as_float(low.words[2 * i]) * problem.scale, as_float(low.words[2 * i + 1]) * problem.scale);
    rounded.words[2 + i] =
        pack<Element>(as_float(high.words[2 * i]) * problem.scale, as_float(high.words[2 * i + 1]) * problem.scale);
  }
  const int64_t token = row / problem.n_heads;
  store_global(address_of(problem.grad_q, token, row - token * problem.n_heads, 8 * static_cast<int>(index % kChunks)), rounded);
}

}  // namespace scfm::cuda
