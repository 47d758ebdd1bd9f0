// Forward of one task: some queries of one cell and head, over all keys that they attend to.
//
// For each block of keys: pack K and V once; then for each few query rows S = Q K^T, online softmax, O += P V, with S and P
// in the first-level cache. An epilogue adds the own key of target queries and divides by the sum.
#pragma once

#include "row_walk.h"

namespace {

template <class Engine>
struct ForwardBuffers {
  uint32_t *query, *key_rows, *key_panels, *value_panels, *probs;
  float *out, *row_max, *row_sum, *bias, *scores;
  int64_t bytes;

  ForwardBuffers(void* scratch, int64_t max_queries, int64_t width) {
    constexpr int64_t kKeys = Engine::kForwardKeys;
    const int64_t rows = round_up(smaller(max_queries, kQueriesPerTask), 16), words = width / Engine::kGroup * Engine::kParts;
    Arena arena{static_cast<char*>(scratch)};
    query = arena.take<uint32_t>(rows * words);
    key_rows = arena.take<uint32_t>(kKeys * words);
    key_panels = arena.take<uint32_t>(kKeys * words);
    value_panels = arena.take<uint32_t>(kKeys / Engine::kGroup * Engine::kParts * round_up(width, kPanel));
    constexpr int64_t kTile = tile_rows<Engine>() * kKeys;
    scores = arena.take<float>(kTile);
    probs = Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(scores) : arena.take<uint32_t>(kTile / Engine::kGroup * Engine::kParts);
    out = arena.take<float>(rows * width);
    row_max = arena.take<float>(rows);
    row_sum = arena.take<float>(rows * Vec::kWidth);
    bias = arena.take<float>(kKeys);
    bytes = arena.used;
  }
};

// Probabilities of one row of scores relative to `reference`, and their sum, lane by lane. `kBiased` adds a bias to each
// key, which also hides the padding of the last block.
template <class Engine, bool kBiased>
inline Vec::Reg probabilities(const float* scores, int64_t n, float scale, const float* bias, float reference,
                              uint32_t* probs) {
  const Vec::Reg factor = Vec::set1(scale), offset = Vec::set1(-reference);
  Vec::Reg sum[2] = {Vec::zero(), Vec::zero()};
  for (int64_t j = 0; j < n; j += 2 * Vec::kWidth) {
    Vec::Reg p[2];
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++) {
      const int64_t key = j + i * Vec::kWidth;
      Vec::Reg x = Vec::fma(Vec::load(scores + key), factor, offset);
      if constexpr (kBiased) x = Vec::add(x, Vec::load(bias + key));
      p[i] = Engine::exp2(x);
      sum[i] = Vec::add(sum[i], p[i]);
    }
    Engine::store_row(probs, j, p[0], p[1]);
  }
  return Vec::add(sum[0], sum[1]);
}

template <bool kBiased>
inline float largest_score(const float* scores, int64_t n, float scale, const float* bias) {
  Vec::Reg top[2] = {Vec::set1(-kInfinity), Vec::set1(-kInfinity)};
  for (int64_t j = 0; j < n; j += 2 * Vec::kWidth)
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++) {
      const int64_t key = j + i * Vec::kWidth;
      const Vec::Reg x = Vec::mul(Vec::load(scores + key), Vec::set1(scale));
      top[i] = Vec::max(top[i], kBiased ? Vec::add(x, Vec::load(bias + key)) : x);
    }
  return Vec::reduce_max(Vec::max(top[0], top[1]));
}

// One row of a task, and its state so far.
struct SoftmaxRow {
  float *scores, *reference, *sum, *out;
  uint32_t* probs;
};

// The reference of a row becomes the largest score so far; sum and output are rescaled to it.
template <class Engine, bool kBiased>
void __attribute__((noinline))
renew_reference(const SoftmaxRow& row, int64_t n, float scale, const float* bias, int64_t width) {
  const float top = largest_score<kBiased>(row.scores, n, scale, bias), before = *row.reference;
  if (!(top > before)) return;
  const Vec::Reg shrink = Engine::exp2(Vec::set1(before == -kInfinity ? -kInfinity : before - top));
  *row.reference = top;
  Vec::store(row.sum, Vec::mul(Vec::load(row.sum), shrink));
  for (int64_t d = 0; d < width; d += Vec::kWidth) Vec::store(row.out + d, Vec::mul(Vec::load(row.out + d), shrink));
}

// Any reference gives the same relative error as long as nothing overflows. So the largest score of the first block is kept
// until later probabilities exceed 1 by far, which saves finding the maximum of each block (as in FlashAttention-4).
constexpr float kRenewAbove = 1048576.f;

// One row of scores becomes probabilities. `again` computes the scores once more if probabilities have overwritten them.
template <class Engine, bool kBiased, class Again>
inline void softmax_row(const SoftmaxRow& row, int64_t n, float scale, const float* bias, int64_t width,
                        const Again& again) {
  if (*row.reference > -kInfinity) {
    const Vec::Reg sum = probabilities<Engine, kBiased>(row.scores, n, scale, bias, *row.reference, row.probs);
    if (__builtin_expect(Vec::all_less(sum, kRenewAbove), 1)) {
      Vec::store(row.sum, Vec::add(Vec::load(row.sum), sum));
      return;
    }
    again();
  }
  renew_reference<Engine, kBiased>(row, n, scale, bias, width);
  // No key so far: any finite reference gives exp2(-inf) = 0, while -inf would give NaN.
  const float reference = *row.reference == -kInfinity ? 0.f : *row.reference;
  const Vec::Reg sum = probabilities<Engine, kBiased>(row.scores, n, scale, bias, reference, row.probs);
  Vec::store(row.sum, Vec::add(Vec::load(row.sum), sum));
}

// The own key of a target query, merged by online softmax.
template <class Engine, class Source>
void add_own_key(const AttentionProblem& problem, int64_t token, int64_t head, int64_t width, float& row_max,
                 float& row_sum, float* out) {
  float query[kMaxWidth], key[kMaxWidth];
  read_padded<Source>(problem.q, token, head, problem.head_dim, width, query);
  read_padded<Source>(problem.k, token, head, problem.head_dim, width, key);
  float score = dot(query, key, width) * exponent_scale(problem.scale);
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

// ln(2^top sum), rounded once. The backward computes its probabilities from it, and adding `top` and the logarithm in float
// would double its error.
inline float log_sum_exp(float top, float sum) {
  if (sum == 0.f) return -kInfinity;
  if (!(sum < kInfinity)) return sum;  // infinite, or not a number
  const uint32_t bits = bits_of_float(sum);
  const double exponent = static_cast<int>(bits >> 23) - 127;
  const float mantissa = float_of_bits((bits & 0x7fffffu) | 0x3f800000u);
  return static_cast<float>((top + exponent + __builtin_log2f(mantissa)) * kLn2Double);
}

// All rows of the task over one packed block of keys.
template <class Engine, bool kBiased>
void attend(const ForwardBuffers<Engine>& buffers, const RowWalk& walk, float scale) {
  walk_rows<Engine>(walk, [&](int64_t row, float* scores, uint32_t* probs, const auto& again) {
    const SoftmaxRow one{scores, buffers.row_max + row, buffers.row_sum + row * Vec::kWidth, walk.out + row * walk.width,
                         probs};
    softmax_row<Engine, kBiased>(one, walk.columns, scale, buffers.bias, walk.width, again);
  });
}

template <class Engine, class Source>
void attention_forward(const AttentionProblem& problem, const Task& task, void* scratch) {
  using Element = typename Engine::Element;
  constexpr int64_t kKeys = Engine::kForwardKeys;
  [[maybe_unused]] const Engine engine;  // AMX configures its tiles for the duration of a task
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t n_rows = task.query_end - task.query_begin, n_padded = round_up(n_rows, Engine::kRowStep);
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), words = width / Engine::kGroup;
  const float scale = exponent_scale(problem.scale);
  ForwardBuffers<Engine> buffers(scratch, n_rows, width);

  copy_rows<Element, Source>(problem.q, task.query_begin, task.head, n_rows, n_padded, problem.head_dim, width,
                             buffers.query);
  for (int64_t i = 0; i < n_rows; i++) buffers.row_max[i] = -kInfinity;
  for (int64_t i = 0; i < n_rows * Vec::kWidth; i++) buffers.row_sum[i] = 0.f;
  for (int64_t i = 0; i < n_padded * width; i++) buffers.out[i] = 0.f;

  for (int64_t begin = 0; begin < task.n_keys; begin += kKeys) {
    const int64_t n = smaller(kKeys, task.n_keys - begin), n_keys = round_up(n, kKeyStep);
    const bool biased = problem.key_bias.data != nullptr || n != n_keys || !(scale > 0.f);
    copy_rows<Element, Source>(problem.k, task.key_begin + begin, task.head, n, n_keys, problem.head_dim, width,
                               buffers.key_rows);
    panels_of_columns(buffers.key_rows, n_keys, words * Engine::kParts, buffers.key_panels);
    pack_values<Engine, Source>(problem.v, task.key_begin + begin, task.head, n, n_keys, problem.head_dim, width,
                                buffers.key_rows, buffers.value_panels);
    if (biased) copy_bias(problem.key_bias, task.key_begin + begin, task.head, n, n_keys, buffers.bias);

    const RowWalk walk{n_rows,         n_padded,           words,         n_keys, width, buffers.query, buffers.key_panels,
                       buffers.value_panels, buffers.scores, buffers.probs, kKeys,  buffers.out};
    (biased ? attend<Engine, true> : attend<Engine, false>)(buffers, walk, scale);
  }

  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t token = task.query_begin + row;
    float &top = buffers.row_max[row], *out = buffers.out + row * width;
    float sum = Vec::reduce_add(Vec::load(buffers.row_sum + row * Vec::kWidth));
    if (token >= task.own_begin) add_own_key<FloatEngine, Source>(problem, token, task.head, width, top, sum, out);
    // A query that attends to no key: output 0, log-sum-exp -inf.
    write_row(out, sum == 0.f ? 0.f : 1.f / sum, problem.head_dim, token_row<Source>(problem.out, token, task.head));
    scalar_at(problem.lse, token, task.head) = log_sum_exp(top, sum);
  }
}

template <class Engine>
int64_t attention_forward_scratch(const AttentionProblem& problem, int64_t max_queries) {
  return ForwardBuffers<Engine>(nullptr, max_queries, round_up(problem.head_dim, Engine::kWidthStep)).bytes;
}

}  // namespace
