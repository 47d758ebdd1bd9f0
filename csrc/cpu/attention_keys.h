// Column sums of probabilities, or the effects of deleting each key, without a matrix of scores. The same walk over S^T as the
// backward, with two of its five products.
#pragma once

#include "attention_backward.h"

namespace {

// One key and one block of queries. `own` is the column of the key's own query, outside 0..63 if it is not in the block.
//
// Deletion: without key g the softmax of query i renormalizes, so its output moves by a / (1 - a) (o_i - v_g), and G_i
// gets a / (1 - a) (G_i . o_i - G_i . v_g). If a rounds to 1, no other key is left: the output, and G_i . o_i with it,
// becomes 0. The key's own query is deleted with it and does not count.
template <bool kDeletion>
Vec::Reg key_sum(float* scores, const float* grad_probs, float scale, float bias, const float* lse, const float* correction,
                 const float* delta, int64_t own) {
  Vec::Reg sum = Vec::zero();
  for (int64_t column = 0; column < kQueryBlock; column += Vec::kWidth) {
    const Vec::Reg offset = Vec::sub(Vec::set1(bias), Vec::load(lse + column));
    const Vec::Reg prob = FloatEngine::exp2(Vec::fma(Vec::load(scores + column), Vec::set1(scale), offset));
    const Vec::Reg factor = Vec::load(correction + column);
    if constexpr (kDeletion)
      Vec::store(scores + column, Vec::mul(prob, factor));
    else
      sum = Vec::fma(prob, factor, sum);
  }
  if constexpr (kDeletion) {
    for (int64_t i = 0; i < kQueryBlock; i++) {
      const float prob = scores[i], effect = prob / (1.f - prob) * (delta[i] - grad_probs[i]);
      scores[i] = prob < 1.f - 1e-6f ? effect : -delta[i];
    }
    if (own >= 0 && own < kQueryBlock) scores[own] = 0.f;
    for (int64_t column = 0; column < kQueryBlock; column += Vec::kWidth)
      sum = Vec::add(sum, Vec::load(scores + column));
  }
  return sum;
}

// Only its own query attends to a target key.
template <class Engine, class Source, bool kDeletion>
void write_own_keys(const AttentionProblem& problem, const Task& task, int64_t width,
                    const BackwardBuffers<Engine>& buffers) {
  float query[kMaxWidth], key[kMaxWidth];
  for (int64_t token = task.own_begin; token < task.query_end; token++) {
    float prob = 0.f;
    if constexpr (!kDeletion) {
      read_padded<Source>(problem.q, token, task.head, problem.head_dim, width, query);
      read_padded<Source>(problem.k, token, task.head, problem.head_dim, width, key);
      const float bias =
          problem.key_bias.data == nullptr ? 0.f : scalar_at(problem.key_bias, token, task.head) * kLog2E;
      const int64_t row = token - task.query_begin;
      const float score = dot(query, key, width) * exponent_scale(problem.scale) + bias;
      prob = buffers.correction[row] * Vec::reduce_max(FloatEngine::exp2(Vec::set1(score - buffers.lse[row])));
    }
    scalar_at(problem.grad_bias, token, task.head) = prob;
  }
}

// Writes `problem.grad_bias`. Column sums read q, k and lse (`grad_out` and `out` may be any tokens; they are not used).
template <class Engine, class Source, bool kDeletion>
void attention_keys(const AttentionProblem& problem, const Task& task, void* scratch) {
  using Element = typename Engine::Element;
  constexpr int64_t kKeys = Engine::kBackwardKeys;
  [[maybe_unused]] const Engine engine;
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t n_queries = task.query_end - task.query_begin;
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), words = width / Engine::kGroup;
  const float scale = exponent_scale(problem.scale);
  BackwardBuffers<Engine> buffers(scratch, n_queries, width);
  for (int64_t query = 0; query < n_queries; query += kQueryBlock)
    pack_queries<Engine, Source, false>(problem, task, query, width, buffers);

  for (int64_t begin = 0; begin < task.n_keys; begin += kKeys) {
    const int64_t n = smaller(kKeys, task.n_keys - begin), n_keys = round_up(n, kKeyStep);
    const int64_t token = task.key_begin + begin;
    copy_rows<Element, Source>(problem.k, token, task.head, n, n_keys, problem.head_dim, width, buffers.key_rows);
    copy_rows<Element, Source>(problem.v, token, task.head, n, n_keys, problem.head_dim, width, buffers.value_rows);
    copy_bias(problem.key_bias, token, task.head, n, n_keys, buffers.bias);
    for (int64_t i = 0; i < n_keys * Vec::kWidth; i++) buffers.grad_bias[i] = 0.f;
    for (int64_t query = 0; query < n_queries; query += kQueryBlock) {
      Engine::template gemm<false>(n_keys, kQueryBlock, words, buffers.key_rows, words,
                                   buffers.query_columns + query * words, buffers.scores, kQueryBlock);
      if constexpr (kDeletion)
        Engine::template gemm<false>(n_keys, kQueryBlock, words, buffers.value_rows, words,
                                     buffers.grad_columns + query * words, buffers.grad_probs, kQueryBlock);
      for (int64_t key = 0; key < n; key++) {
        const int64_t own = task.keys_are_queries ? token + key - (task.query_begin + query) : -1;
        float* sum = buffers.grad_bias + key * Vec::kWidth;
        Vec::store(sum, Vec::add(Vec::load(sum), key_sum<kDeletion>(buffers.scores + key * kQueryBlock,
                                                                   buffers.grad_probs + key * kQueryBlock, scale,
                                                                   buffers.bias[key], buffers.lse + query,
                                                                   buffers.correction + query,
                                                                   buffers.delta + query, own)));
      }
    }
    for (int64_t key = 0; key < n; key++)
      scalar_at(problem.grad_bias, token + key, task.head) =
          Vec::reduce_add(Vec::load(buffers.grad_bias + key * Vec::kWidth));
  }
  if (task.part == 0) write_own_keys<Engine, Source, kDeletion>(problem, task, width, buffers);
}

}  // namespace
