// Column sums of probabilities, or the effects of deleting each key, without a matrix of scores. The same loop as the backward,
// with one or two of its five products.
#pragma once

#include "attention_backward.h"

namespace scfm::cuda {

// Deletion: without key g the softmax of query i renormalizes, so its output moves by a / (1 - a) (o_i - v_g), and G_i
// gets a / (1 - a) (G_i . o_i - G_i . v_g). If a rounds to 1, no other key is left: the output, and G_i . o_i with it,
// becomes 0.
SCFM_DEVICE float deletion_effect(float prob, float grad_prob, float delta) {
  return prob < 1.f - 1e-6f ? prob / (1.f - prob) * (delta - grad_prob) : -delta;
}

// `own_column`: the query of this block that is the lane's first key itself; it is deleted with its key and does not count.
template <class Shape>
SCFM_DEVICE void deletion_effects(float (&probs)[Shape::kScoreColumns][4],
                                  const float (&grad_probs)[Shape::kScoreColumns][4], uint32_t delta, int own_column) {
  SCFM_UNROLL
  for (int column = 0; column < Shape::kScoreColumns; column++) {
    const int query = 8 * column + accumulator_column();
    const Pair d = shared_pair(delta + 4 * query);
    float(&prob)[4] = probs[column];
    SCFM_UNROLL
    for (int i = 0; i < 4; i++) {
      const float effect = deletion_effect(prob[i], grad_probs[column][i], i % 2 == 0 ? d.x : d.y);
      prob[i] = query + i % 2 == own_column + 8 * (i / 2) ? 0.f : effect;
    }
  }
}

template <class Element, int kWidth, bool kDeletion>
SCFM_KERNEL(256, 1) attention_key_sums(SCFM_PARAMETER Problem problem) {
  using Shape = BackwardShape<kWidth>;
  const Work work = work_of_block(problem, problem.key_tiles);
  const uint32_t keys = shared_base(), values = keys + Shape::kKeyBytes, stages = values + Shape::kKeyBytes;
  const int n_blocks = divide_up(work.tile.n_other, Shape::kQueries);
  const Pair bias = key_bias_of_lane(problem, work);
  Pair sums{0.f, 0.f};
  if (n_blocks > 0) {
    copy_rows<Shape::kKeys, kWidth, Shape::kThreads>(keys, problem.k, work.tile.begin, work.tile.count, work.head);
    if (kDeletion)
      copy_rows<Shape::kKeys, kWidth, Shape::kThreads>(values, problem.v, work.tile.begin, work.tile.count, work.head);
    copy_queries<Shape, kDeletion>(problem, work, 0, stages);
  }
  for (int block = 0; block < n_blocks; block++) {
    const Stage<Shape> stage(stages + (block & 1) * Shape::kStageBytes);
    copies_wait();
    barrier();
    if (block + 1 < n_blocks)
      copy_queries<Shape, kDeletion>(problem, work, block + 1, stages + (~block & 1) * Shape::kStageBytes);
    float scores[Shape::kScoreColumns][4];
    multiply_tiles<Element, kWidth>(scores, keys, stage.queries);
    probabilities<Shape>(scores, stage.lse, bias, problem.scale * kLog2E, work.tile.n_other - block * Shape::kQueries);
    if (kDeletion) {
      float grad_probs[Shape::kScoreColumns][4];
      multiply_tiles<Element, kWidth>(grad_probs, values, stage.grads);
      const int key = work.tile.begin + 16 * warp_index() + accumulator_row();
      const int own_column = key - (work.tile.other_begin + block * Shape::kQueries);
      // Far outside the block if keys are not queries.
      deletion_effects<Shape>(scores, grad_probs, stage.delta, problem.keys_are_queries ? own_column : -1000000);
    }
    SCFM_UNROLL
    for (int column = 0; column < Shape::kScoreColumns; column++) {
      sums.x += scores[column][0] + scores[column][1];
      sums.y += scores[column][2] + scores[column][3];
    }
  }
  store_key_sums(problem, work, sums);
}

}  // namespace scfm::cuda
