// Forward of one task: some queries of one cell and head, over all keys that they see.
//
// For each block of keys: pack K and V once; then for each few query rows S = Q K^T, online softmax, O += P V, with S and P
// in the first-level cache. An epilogue adds the own key of unknown queries and divides by the sum.
#pragma once

#include "pack.h"

namespace {

template <class Engine>
struct ForwardBuffers {
  uint32_t *query, *key_rows, *key_panels, *value_panels, *probs;
  float *out, *row_max, *row_sum, *bias, *scores;
  int64_t bytes;

  ForwardBuffers(void* scratch, int64_t max_queries, int64_t width) {
    constexpr int64_t kKeys = Engine::kForwardKeys;
    const int64_t rows = round_up(smaller(max_queries, kQueriesPerTask), 16), words = width / Engine::kGroup;
    Arena arena{static_cast<char*>(scratch)};
    query = arena.take<uint32_t>(rows * words);
    key_rows = arena.take<uint32_t>(kKeys * words);
    key_panels = arena.take<uint32_t>(kKeys * words);
    value_panels = arena.take<uint32_t>(kKeys / Engine::kGroup * round_up(width, kPanel));
    constexpr int64_t kTile = Engine::kForwardRows * kKeys * (Engine::kInSteps ? 2 : 1);
    scores = arena.take<float>(kTile);
    probs = Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(scores) : arena.take<uint32_t>(kTile / Engine::kGroup);
    out = arena.take<float>(rows * width);
    row_max = arena.take<float>(rows);
    row_sum = arena.take<float>(rows);
    bias = arena.take<float>(kKeys);
    bytes = arena.used;
  }
};

// One row of scores becomes probabilities relative to the running maximum; earlier output is brought to that maximum.
// `kBiased` adds a bias to each key, which is also what hides the padding of a last block.
template <class Engine, bool kBiased>
inline void softmax_row(float* scores, int64_t n, float scale, const float* bias, float& row_max, float& row_sum,
                        float* out, int64_t width, uint32_t* probs) {
  constexpr int64_t kStep = 2 * Vec::kWidth;
  const Vec::Reg factor = Vec::set1(scale);
  Vec::Reg top0 = Vec::set1(-kInfinity), top1 = top0;
  for (int64_t j = 0; j < n; j += kStep) {
    Vec::Reg x0 = Vec::load(scores + j), x1 = Vec::load(scores + j + Vec::kWidth);
    if constexpr (kBiased) {
      x0 = Vec::fma(x0, factor, Vec::load(bias + j));
      x1 = Vec::fma(x1, factor, Vec::load(bias + j + Vec::kWidth));
      Vec::store(scores + j, x0);
      Vec::store(scores + j + Vec::kWidth, x1);
    }
    top0 = Vec::max(top0, x0);
    top1 = Vec::max(top1, x1);
  }
  const float block_max = Vec::reduce_max(Vec::max(top0, top1)) * (kBiased ? 1.f : scale);
  if (block_max > row_max) {
    const Vec::Reg shrink = Engine::exp2(Vec::set1(row_max == -kInfinity ? -kInfinity : row_max - block_max));
    row_max = block_max;
    row_sum *= Vec::reduce_max(shrink);
    for (int64_t d = 0; d < width; d += Vec::kWidth) Vec::store(out + d, Vec::mul(Vec::load(out + d), shrink));
  }
  // No key seen so far: any finite reference gives exp2(-inf) = 0, while -inf would give NaN.
  const Vec::Reg minus_max = Vec::set1(row_max == -kInfinity ? 0.f : -row_max);
  Vec::Reg sum0 = Vec::zero(), sum1 = Vec::zero();
  for (int64_t j = 0; j < n; j += kStep) {
    Vec::Reg p[2];
    for (int64_t i = 0; i < 2; i++) {
      const Vec::Reg x = Vec::load(scores + j + i * Vec::kWidth);
      p[i] = Engine::exp2(kBiased ? Vec::add(x, minus_max) : Vec::fma(x, factor, minus_max));
    }
    sum0 = Vec::add(sum0, p[0]);
    sum1 = Vec::add(sum1, p[1]);
    Engine::store_row(probs, j, p[0], p[1]);
  }
  row_sum += Vec::reduce_add(Vec::add(sum0, sum1));
}

// The own key of an unknown query, merged by online softmax.
template <class Engine, class Source>
void add_own_key(const AttentionProblem& problem, int64_t token, int64_t head, int64_t width, float& row_max,
                 float& row_sum, float* out) {
  float query[kMaxWidth], key[kMaxWidth];
  read_padded<Source>(problem.q, token, head, problem.head_dim, width, query);
  read_padded<Source>(problem.k, token, head, problem.head_dim, width, key);
  float score = dot(query, key, width) * (problem.scale * kLog2E);
  if (problem.key_bias.data != nullptr) score += scalar_at(problem.key_bias, token, head) * kLog2E;
  const float top = score > row_max ? score : row_max, reference = top == -kInfinity ? 0.f : top;
  const Vec::Reg shrink = Engine::exp2(Vec::set1(row_max - reference));
  const Vec::Reg prob = Engine::exp2(Vec::set1(score - reference));
  row_max = top;
  row_sum = Vec::reduce_max(Vec::fma(Vec::set1(row_sum), shrink, prob));
  float* value = key;
  read_padded<Source>(problem.v, token, head, problem.head_dim, width, value);
  for (int64_t d = 0; d < width; d += Vec::kWidth)
    Vec::store(out + d, Vec::fma(Vec::load(out + d), shrink, Vec::mul(prob, Vec::load(value + d))));
}

// All rows of the task over one packed block of keys.
template <class Engine>
void attend(const ForwardBuffers<Engine>& buffers, int64_t n_rows, int64_t n_padded, int64_t n_keys, int64_t width,
            float scale, bool biased) {
  constexpr int64_t kKeys = Engine::kForwardKeys, kRows = Engine::kForwardRows, kKeyWords = kKeys / Engine::kGroup;
  const int64_t words = width / Engine::kGroup;
  const auto softmax = biased ? softmax_row<Engine, true> : softmax_row<Engine, false>;
  for (int64_t row = 0; row < n_padded; row += kRows) {
    const int64_t rows = smaller(kRows, n_padded - row), real_rows = smaller(kRows, n_rows - row);
    float* out = buffers.out + row * width;
    Engine::template gemm<false>(rows, n_keys, words, buffers.query + row * words, words, buffers.key_panels,
                                 buffers.scores, kKeys);
    for (int64_t i = 0; i < real_rows; i++)
      softmax(buffers.scores + i * kKeys, n_keys, scale, buffers.bias, buffers.row_max[row + i],
              buffers.row_sum[row + i], out + i * width, width, buffers.probs + i * kKeyWords);
    Engine::template gemm<true>(rows, width, n_keys / Engine::kGroup, buffers.probs, kKeyWords, buffers.value_panels,
                                out, width);
  }
}

// The same with both products of neighbouring rows in flight while the vector unit works on the softmax of these rows:
// turn t does the softmax of row block t, P V of block t - 1 and Q K^T of block t + 1.
template <class Engine>
void attend_in_steps(const ForwardBuffers<Engine>& buffers, int64_t n_rows, int64_t n_padded, int64_t n_keys,
                     int64_t width, float scale, bool biased) {
  constexpr int64_t kKeys = Engine::kForwardKeys, kRows = Engine::kForwardRows, kKeyWords = kKeys / Engine::kGroup;
  const int64_t words = width / Engine::kGroup, blocks = (n_padded + kRows - 1) / kRows;
  const auto softmax = biased ? softmax_row<Engine, true> : softmax_row<Engine, false>;
  const auto rows_of = [=](int64_t block) {
    return block < 0 || block >= blocks ? 0 : smaller(kRows, n_padded - block * kRows);
  };
  for (int64_t block = -1; block <= blocks; block++) {
    const int64_t before = rows_of(block - 1), after = rows_of(block + 1), first = block * kRows;
    const int64_t mix_steps = Engine::gemm_steps(before, width), score_steps = Engine::gemm_steps(after, n_keys);
    const int64_t steps = mix_steps + score_steps, rows = smaller(rows_of(block), n_rows - first);
    const int64_t even = (block & 1) * kRows * kKeys, odd = kRows * kKeys - even;
    int64_t step = 0;
    for (int64_t i = 0; i < rows || step < steps; i++) {
      // Spread over the rows; what is left when there are no more rows follows at once.
      for (const int64_t due = i < rows ? (i + 1) * steps / rows : steps; step < due; step++)
        if (step < score_steps)
          Engine::template gemm_step<false>(step, after, n_keys, words, buffers.query + (first + kRows) * words, words,
                                            buffers.key_panels, buffers.scores + odd, kKeys);
        else
          Engine::template gemm_step<true>(step - score_steps, before, width, n_keys / Engine::kGroup,
                                           buffers.probs + odd / Engine::kGroup, kKeyWords, buffers.value_panels,
                                           buffers.out + (first - kRows) * width, width);
      if (i < rows)
        softmax(buffers.scores + even + i * kKeys, n_keys, scale, buffers.bias, buffers.row_max[first + i],
                buffers.row_sum[first + i], buffers.out + (first + i) * width, width,
                buffers.probs + (even + i * kKeys) / Engine::kGroup);
    }
  }
}

template <class Engine, class Source>
void attention_forward(const AttentionProblem& problem, const AttentionTask& task, void* scratch) {
  using Element = typename Engine::Element;
  constexpr int64_t kKeys = Engine::kForwardKeys;
  [[maybe_unused]] const Engine engine;  // AMX sets up its tiles for the length of a task
  const int64_t n_rows = task.query_end - task.query_begin, n_padded = round_up(n_rows, Engine::kRowStep);
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), words = width / Engine::kGroup;
  const float scale = problem.scale * kLog2E;
  ForwardBuffers<Engine> buffers(scratch, n_rows, width);

  copy_rows<Element, Source>(problem.q, task.query_begin, task.head, n_rows, n_padded, problem.head_dim, width,
                             buffers.query);
  for (int64_t i = 0; i < n_rows; i++) buffers.row_max[i] = -kInfinity;
  for (int64_t i = 0; i < n_rows; i++) buffers.row_sum[i] = 0.f;
  for (int64_t i = 0; i < n_padded * width; i++) buffers.out[i] = 0.f;

  for (int64_t begin = 0; begin < task.n_keys; begin += kKeys) {
    const int64_t n = smaller(kKeys, task.n_keys - begin), n_keys = round_up(n, kKeyStep);
    const bool biased = problem.key_bias.data != nullptr || n != n_keys || !(scale > 0.f);
    copy_rows<Element, Source>(problem.k, task.key_begin + begin, task.head, n, n_keys, problem.head_dim, width,
                               buffers.key_rows);
    panels_of_columns(buffers.key_rows, n_keys, words, buffers.key_panels);
    copy_rows<Element, Source>(problem.v, task.key_begin + begin, task.head, n, n_keys, problem.head_dim, width,
                               buffers.key_rows);
    panels_of_rows(reinterpret_cast<const Element*>(buffers.key_rows), n_keys, width, buffers.value_panels);
    if (biased) copy_bias(problem.key_bias, task.key_begin + begin, task.head, n, n_keys, buffers.bias);

    if constexpr (Engine::kInSteps)
      attend_in_steps(buffers, n_rows, n_padded, n_keys, width, scale, biased);
    else
      attend(buffers, n_rows, n_padded, n_keys, width, scale, biased);
  }

  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t token = task.query_begin + row;
    float &top = buffers.row_max[row], &sum = buffers.row_sum[row], *out = buffers.out + row * width;
    if (token >= task.own_begin) add_own_key<FloatEngine, Source>(problem, token, task.head, width, top, sum, out);
    // A query that saw no key: output 0, log-sum-exp -inf.
    write_row(out, sum == 0.f ? 0.f : 1.f / sum, problem.head_dim, token_row<Source>(problem.out, token, task.head));
    scalar_at(problem.lse, token, task.head) = sum == 0.f ? -kInfinity : (top + __builtin_log2f(sum)) * kLn2;
  }
}

template <class Engine>
int64_t forward_scratch(const AttentionProblem& problem, int64_t max_queries) {
  return ForwardBuffers<Engine>(nullptr, max_queries, round_up(problem.head_dim, Engine::kWidthStep)).bytes;
}

}  // namespace
