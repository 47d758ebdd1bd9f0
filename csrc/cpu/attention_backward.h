// Backward of one task: all queries of one cell and head, with all keys or a part of them.
//
// Everything runs on the transposed scores S^T = K Q^T, [keys][queries]: then P^T and dS^T are operand A of
// dV += P^T dO and dK += dS^T Q without a transposition, and dS^T as operand B of dQ^T += K^T dS^T. Queries are packed
// once; for each block of keys, dK and dV are complete when all queries have passed. All sums are in float, in one order.
#pragma once

#include "pack.h"

namespace {

constexpr int64_t kQueryBlock = kPanel;

template <class Engine>
struct BackwardBuffers {
  uint32_t *query_columns, *query_rows, *grad_columns, *grad_rows;          // all queries, block after block
  float *delta, *lse, *correction, *grad_query;                             // the same; grad_query transposed
  uint32_t *rows, *key_rows, *value_rows, *key_columns, *probs, *grad_scores, *grad_scores_panel;
  float *scores, *grad_probs, *bias, *grad_key, *grad_value, *grad_bias;  // one block of keys
  int64_t bytes;

  BackwardBuffers(void* scratch, int64_t max_queries, int64_t width) {
    constexpr int64_t kKeys = Engine::kBackwardKeys, kTile = kKeys * kQueryBlock;
    const int64_t n = round_up(max_queries, kQueryBlock), words = width / Engine::kGroup;
    const int64_t row_words = round_up(width, kPanel) / Engine::kGroup;
    Arena arena{static_cast<char*>(scratch)};
    query_columns = arena.take<uint32_t>(n * words);
    query_rows = arena.take<uint32_t>(n * row_words);
    grad_columns = arena.take<uint32_t>(n * words);
    grad_rows = arena.take<uint32_t>(n * row_words);
    delta = arena.take<float>(n);
    lse = arena.take<float>(n);
    correction = arena.take<float>(n);
    grad_query = arena.take<float>(n * width);
    rows = arena.take<uint32_t>((kKeys > kQueryBlock ? kKeys : kQueryBlock) * row_words);
    key_rows = arena.take<uint32_t>(kKeys * words);
    value_rows = arena.take<uint32_t>(kKeys * words);
    key_columns = arena.take<uint32_t>(kKeys * words);
    scores = arena.take<float>(kTile);
    grad_probs = arena.take<float>(kTile);
    probs = Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(scores) : arena.take<uint32_t>(kTile / Engine::kGroup);
    grad_scores =
        Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(grad_probs) : arena.take<uint32_t>(kTile / Engine::kGroup);
    grad_scores_panel = Engine::kGroup == 1 ? grad_scores : arena.take<uint32_t>(kTile / Engine::kGroup);
    bias = arena.take<float>(kKeys);
    grad_key = arena.take<float>(kKeys * width);
    grad_value = arena.take<float>(kKeys * width);
    grad_bias = arena.take<float>(kKeys * Vec::kWidth);
    bytes = arena.used;
  }
};

// The log-sum-exp of one block of queries as an exponent of 2. Rounded to float it would give every probability of a query
// the same error, often larger than all others. So products in float take its whole part, which is exact, and the rest
// becomes a factor near 1, `correction`, on what is summed over the queries or written for them.
template <class Engine>
void split_lse(const AttentionProblem& problem, int64_t head, int64_t token, int64_t n, float* lse, float* correction) {
  for (int64_t i = 0; i < kQueryBlock; i++) {
    const float value = i < n ? scalar_at(problem.lse, token + i, head) : -kInfinity;
    // A query without keys: a reference of +inf makes each of its probabilities exp2(-inf) = 0.
    const double exact = value == -kInfinity ? kInfinity : value * kLog2EDouble;
    lse[i] = static_cast<float>(exact);
    correction[i] = 0.f;
    if (Engine::kGroup > 1 || !(exact < 1e6 && exact > -1e6)) continue;
    lse[i] = static_cast<float>(static_cast<int>(exact));
    correction[i] = static_cast<float>(lse[i] - exact);
  }
  for (int64_t i = 0; i < kQueryBlock; i += Vec::kWidth)
    Vec::store(correction + i, FloatEngine::exp2(Vec::load(correction + i)));
}

// Each row times its factor.
inline void scale_rows(float* rows, int64_t width, const float* factors) {
  for (int64_t i = 0; i < kQueryBlock; i++)
    for (int64_t d = 0; d < width; d++) rows[i * width + d] *= factors[i];
}
inline void scale_rows(BFloat16*, int64_t, const float*) {}  // each factor is 1

// Pack one block of queries and of their output gradients; delta = dO . O, minus the gradient of the log-sum-exp. `kRows`
// packs what sums over queries need as well.
template <class Engine, class Source, bool kRows>
void pack_queries(const AttentionProblem& problem, const Task& task, int64_t begin, int64_t width,
                  const BackwardBuffers<Engine>& buffers) {
  using Element = typename Engine::Element;
  const int64_t n = smaller(kQueryBlock, task.query_end - task.query_begin - begin), token = task.query_begin + begin;
  const int64_t words = width / Engine::kGroup;
  [[maybe_unused]] const int64_t row_words = round_up(width, kPanel) / Engine::kGroup;
  [[maybe_unused]] Element* rows = reinterpret_cast<Element*>(buffers.rows);
  float* correction = buffers.correction + begin;
  split_lse<Engine>(problem, task.head, token, n, buffers.lse + begin, correction);
  copy_rows<Element, Source>(problem.q, token, task.head, n, kQueryBlock, problem.head_dim, width, buffers.rows);
  panels_of_columns(buffers.rows, kQueryBlock, words, buffers.query_columns + begin * words);
  if constexpr (kRows) {
    scale_rows(rows, width, correction);
    panels_of_rows(rows, kQueryBlock, width, buffers.query_rows + begin * row_words);
  }
  copy_rows<Element, Source>(problem.grad_out, token, task.head, n, kQueryBlock, problem.head_dim, width, buffers.rows);
  panels_of_columns(buffers.rows, kQueryBlock, words, buffers.grad_columns + begin * words);
  if constexpr (kRows) {
    scale_rows(rows, width, correction);
    panels_of_rows(rows, kQueryBlock, width, buffers.grad_rows + begin * row_words);
  }

  float grad[kMaxWidth], out[kMaxWidth];
  const ConstTokens outputs{problem.out.data, problem.out.token_stride, problem.out.head_stride};
  for (int64_t i = 0; i < n; i++) {
    read_padded<Source>(problem.grad_out, token + i, task.head, problem.head_dim, width, grad);
    read_padded<Source>(outputs, token + i, task.head, problem.head_dim, width, out);
    const float grad_lse = problem.grad_lse.data == nullptr ? 0.f : scalar_at(problem.grad_lse, token + i, task.head);
    buffers.delta[begin + i] = dot(grad, out, width) - grad_lse;
  }
  for (int64_t i = n; i < kQueryBlock; i++) buffers.delta[begin + i] = 0.f;
}

template <class Engine, class Source>
void pack_keys(const AttentionProblem& problem, const Task& task, int64_t begin, int64_t n, int64_t n_keys,
               int64_t width, const BackwardBuffers<Engine>& buffers) {
  using Element = typename Engine::Element;
  const int64_t token = task.key_begin + begin;
  copy_rows<Element, Source>(problem.v, token, task.head, n, n_keys, problem.head_dim, width, buffers.value_rows);
  copy_rows<Element, Source>(problem.k, token, task.head, n, n_keys, problem.head_dim, width, buffers.key_rows);
  copy_bias(problem.key_bias, token, task.head, n, n_keys, buffers.bias);
  transpose_rows<Engine>(buffers.key_rows, n_keys, width, buffers.rows, buffers.key_columns);
  for (int64_t i = 0; i < n_keys * width; i++) buffers.grad_key[i] = buffers.grad_value[i] = 0.f;
  for (int64_t i = 0; i < n_keys * Vec::kWidth; i++) buffers.grad_bias[i] = 0.f;
}

// P^T = exp2(S^T), dS^T = P^T (dP^T - delta), two keys at a time.
template <class Engine, bool kGradBias>
void score_gradients(int64_t n_keys, float scale, const float* lse, const float* delta, const float* correction,
                     const BackwardBuffers<Engine>& buffers) {
  constexpr int64_t kRowWords = kQueryBlock / Engine::kGroup, kStep = 2 * Vec::kWidth;
  const Vec::Reg factor = Vec::set1(scale);
  for (int64_t key = 0; key < n_keys; key += 2) {
    Vec::Reg total[2] = {Vec::zero(), Vec::zero()};
    for (int64_t query = 0; query < kQueryBlock; query += kStep) {
      Vec::Reg p[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; j++) {
          const int64_t column = query + j * Vec::kWidth, at = (key + i) * kQueryBlock + column;
          const Vec::Reg offset = Vec::sub(Vec::set1(buffers.bias[key + i]), Vec::load(lse + column));
          p[i][j] = Engine::exp2(Vec::fma(Vec::load(buffers.scores + at), factor, offset));
          ds[i][j] = Vec::mul(p[i][j], Vec::sub(Vec::load(buffers.grad_probs + at), Vec::load(delta + column)));
          if constexpr (kGradBias) total[i] = Vec::fma(ds[i][j], Vec::load(correction + column), total[i]);
        }
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; i++) {
        Engine::store_row(buffers.probs + (key + i) * kRowWords, query, p[i][0], p[i][1]);
        Engine::store_row(buffers.grad_scores + (key + i) * kRowWords, query, ds[i][0], ds[i][1]);
      }
      if constexpr (Engine::kGroup == 2) {  // in float the rows are already the panel
        Engine::store_panel(buffers.grad_scores_panel, key, query, ds[0][0], ds[1][0]);
        Engine::store_panel(buffers.grad_scores_panel, key, query + Vec::kWidth, ds[0][1], ds[1][1]);
      }
    }
    if constexpr (kGradBias)
      for (int64_t i = 0; i < 2; i++) {
        float* sum = buffers.grad_bias + (key + i) * Vec::kWidth;
        Vec::store(sum, Vec::add(Vec::load(sum), total[i]));
      }
  }
}

// A target token's own key: no other query attends to it, so the gradients of its key and value are this one term.
template <class Source>
void own_key_gradients(const AttentionProblem& problem, int64_t token, int64_t head, int64_t width, float lse,
                       float delta, float correction, float* grad_query) {
  float query[kMaxWidth], key[kMaxWidth], grad[kMaxWidth], value[kMaxWidth];
  read_padded<Source>(problem.q, token, head, problem.head_dim, width, query);
  read_padded<Source>(problem.k, token, head, problem.head_dim, width, key);
  read_padded<Source>(problem.v, token, head, problem.head_dim, width, value);
  read_padded<Source>(problem.grad_out, token, head, problem.head_dim, width, grad);
  float score = dot(query, key, width) * exponent_scale(problem.scale);
  if (problem.key_bias.data != nullptr) score += scalar_at(problem.key_bias, token, head) * kLog2E;
  const float prob = Vec::reduce_max(FloatEngine::exp2(Vec::set1(score - lse)));
  const float grad_score = prob * (dot(grad, value, width) - delta);
  for (int64_t d = 0; d < width; d++) grad_query[d] += grad_score * key[d];
  write_row(query, correction * grad_score * problem.scale, problem.head_dim,
            token_row<Source>(problem.grad_k, token, head));
  write_row(grad, correction * prob, problem.head_dim, token_row<Source>(problem.grad_v, token, head));
  if (problem.grad_bias.data != nullptr) scalar_at(problem.grad_bias, token, head) = correction * grad_score;
}

template <class Engine, class Source>
void write_key_gradients(const AttentionProblem& problem, const Task& task, int64_t begin, int64_t n,
                         int64_t width, const BackwardBuffers<Engine>& buffers) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t token = task.key_begin + begin + i;
    write_row(buffers.grad_key + i * width, problem.scale, problem.head_dim,
              token_row<Source>(problem.grad_k, token, task.head));
    write_row(buffers.grad_value + i * width, 1.f, problem.head_dim,
              token_row<Source>(problem.grad_v, token, task.head));
    if (problem.grad_bias.data != nullptr)
      scalar_at(problem.grad_bias, token, task.head) = Vec::reduce_add(Vec::load(buffers.grad_bias + i * Vec::kWidth));
  }
}

template <class Engine, class Source>
void write_query_gradients(const AttentionProblem& problem, const Task& task, int64_t begin, int64_t width,
                           const BackwardBuffers<Engine>& buffers) {
  const int64_t n = smaller(kQueryBlock, task.query_end - task.query_begin - begin);
  float* rows = buffers.grad_query + begin * width;
  alignas(64) float block[kQueryBlock * kMaxWidth];
  transpose_words(reinterpret_cast<const uint32_t*>(rows), kQueryBlock, width, kQueryBlock,
                  reinterpret_cast<uint32_t*>(block), width);
  for (int64_t i = 0; i < n; i++) {
    const int64_t token = task.query_begin + begin + i;
    if (token >= task.own_begin)
      own_key_gradients<Source>(problem, token, task.head, width, buffers.lse[begin + i], buffers.delta[begin + i],
                                buffers.correction[begin + i], block + i * width);
    write_row(block + i * width, buffers.correction[begin + i] * problem.scale, problem.head_dim,
              token_row<Source>(problem.grad_q, token, task.head));
  }
}

template <class Engine, class Source>
void attention_backward(const AttentionProblem& problem, const Task& task, void* scratch) {
  constexpr int64_t kKeys = Engine::kBackwardKeys, kRowWords = kQueryBlock / Engine::kGroup;
  [[maybe_unused]] const Engine engine;  // AMX configures its tiles for the duration of a task
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t n_queries = task.query_end - task.query_begin;
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), words = width / Engine::kGroup;
  const int64_t row_words = round_up(width, kPanel) / Engine::kGroup;
  const float scale = exponent_scale(problem.scale);
  BackwardBuffers<Engine> buffers(scratch, n_queries, width);
  if (task.n_parts > 1) buffers.grad_query = task.grad_query + task.part * task.grad_query_size;

  for (int64_t query = 0; query < n_queries; query += kQueryBlock)
    pack_queries<Engine, Source, true>(problem, task, query, width, buffers);
  for (int64_t i = 0; i < round_up(n_queries, kQueryBlock) * width; i++) buffers.grad_query[i] = 0.f;

  for (int64_t begin = 0; begin < task.n_keys; begin += kKeys) {
    const int64_t n = smaller(kKeys, task.n_keys - begin), n_keys = round_up(n, kKeyStep);
    const int64_t key_words = n_keys / Engine::kGroup;
    pack_keys<Engine, Source>(problem, task, begin, n, n_keys, width, buffers);
    for (int64_t query = 0; query < n_queries; query += kQueryBlock) {
      Engine::template gemm<false>(n_keys, kQueryBlock, words, buffers.key_rows, words,
                                   buffers.query_columns + query * words, buffers.scores, kQueryBlock);
      Engine::template gemm<false>(n_keys, kQueryBlock, words, buffers.value_rows, words,
                                   buffers.grad_columns + query * words, buffers.grad_probs, kQueryBlock);
      const auto gradients =
          problem.grad_bias.data == nullptr ? score_gradients<Engine, false> : score_gradients<Engine, true>;
      gradients(n_keys, scale, buffers.lse + query, buffers.delta + query, buffers.correction + query, buffers);
      Engine::template gemm<true>(n_keys, width, kRowWords, buffers.probs, kRowWords,
                                  buffers.grad_rows + query * row_words, buffers.grad_value, width);
      Engine::template gemm<true>(n_keys, width, kRowWords, buffers.grad_scores, kRowWords,
                                  buffers.query_rows + query * row_words, buffers.grad_key, width);
      Engine::template gemm<true>(width, kQueryBlock, key_words, buffers.key_columns, key_words,
                                  buffers.grad_scores_panel, buffers.grad_query + query * width, kQueryBlock);
    }
    write_key_gradients<Engine, Source>(problem, task, begin, n, width, buffers);
  }
  if (task.n_parts > 1) return;
  for (int64_t query = 0; query < n_queries; query += kQueryBlock)
    write_query_gradients<Engine, Source>(problem, task, query, width, buffers);
}

// The sums of all parts are added in the order of the keys, whichever part was the last to run.
template <class Engine, class Source>
void join_attention_backward(const AttentionProblem& problem, const Task& task, void* scratch) {
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t n_queries = task.query_end - task.query_begin;
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), size = round_up(n_queries, kQueryBlock) * width;
  BackwardBuffers<Engine> buffers(scratch, n_queries, width);
  buffers.grad_query = task.grad_query;
  for (int64_t part = 1; part < task.n_parts; part++) {
    const float* other = task.grad_query + part * task.grad_query_size;
    for (int64_t i = 0; i < size; i += Vec::kWidth)
      Vec::store(buffers.grad_query + i, Vec::add(Vec::load(buffers.grad_query + i), Vec::load(other + i)));
  }
  for (int64_t query = 0; query < n_queries; query += kQueryBlock)
    write_query_gradients<Engine, Source>(problem, task, query, width, buffers);
}

template <class Engine>
int64_t attention_backward_scratch(const AttentionProblem& problem, int64_t max_queries) {
  return BackwardBuffers<Engine>(nullptr, max_queries, round_up(problem.head_dim, Engine::kWidthStep)).bytes;
}

}  // namespace
