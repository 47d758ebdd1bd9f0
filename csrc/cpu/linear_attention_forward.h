// Linear attention by random features (FAVOR+) of one cell and head, in two walks. The features are never all in memory.
//
// With features phi(x) = exp(W x - |x|^2 / 2 - c) + floor of M rows of W:
//   over the keys     S = phi(K)^T V, z = phi(K)^T 1   rows of W are the queries of an attention whose keys have the bias
//                                                      -|k|^2 / 2; each row has its own reference until the end
//   over the queries  out = phi(q) S / phi(q) z        rows of W are the keys
// The floor is never part of a product: it adds the same row, floor times the sum of V (or of S), to all.
#pragma once

#include "attention_forward.h"
#include "linear_attention.h"

namespace {

constexpr int64_t kLinearQueries = 192;  // queries at a time: a multiple of all row tiles

// Exponents are counted in units of log 2.
struct FeatureScale {
  float product, half_norm;
  explicit FeatureScale(const LinearAttentionProblem& problem)
      : product(problem.scale * kLog2E), half_norm(0.5f * problem.scale * problem.scale * kLog2E) {}
};

// W, with its last row repeated to fill the last tile: copies change no maximum, and their rows of S and z are set to 0.
template <class Engine>
void copy_features(const LinearAttentionProblem& problem, int64_t n_padded, int64_t width, uint32_t* to_words) {
  using Element = typename Engine::Element;
  Element* to = reinterpret_cast<Element*>(to_words);
  for (int64_t m = 0; m < n_padded; m++, to += width) {
    const float* row = problem.projection + smaller(m, problem.n_features - 1) * problem.head_dim;
    for (int64_t d = 0; d < width; d++) from_float(d < problem.head_dim ? row[d] : 0.f, to[d]);
  }
}

// -|x|^2 / 2 of tokens, -inf past the end.
template <class Source>
void half_norms(const LinearAttentionProblem& problem, const ConstTokens& tokens, int64_t token, int64_t head, int64_t n,
                int64_t n_padded, int64_t width, float* to) {
  const float factor = -FeatureScale(problem).half_norm;
  float row[kMaxWidth];
  for (int64_t i = 0; i < n_padded; i++) to[i] = -kInfinity;
  for (int64_t i = 0; i < n; i++) {
    read_padded<Source>(tokens, token + i, head, problem.head_dim, width, row);
    to[i] = factor * dot(row, row, width);
  }
}

// The sums over the keys of a cell and head.
struct KeySummary {
  float *value_sums, *weights;  // S [M][width], z [M]
  float stabilizer;             // c, in units of log 2
};

template <class Engine>
struct KeyBuffers {
  uint32_t *rows, *key_panels, *value_panels, *factors;
  float *products, *reference, *sums, *bias;
  int64_t bytes;

  KeyBuffers(void* scratch, int64_t n_features, int64_t width) {
    constexpr int64_t kKeys = Engine::kForwardKeys, kTile = tile_rows<Engine>() * kKeys;
    const int64_t words = width / Engine::kGroup;
    Arena arena{static_cast<char*>(scratch)};
    rows = arena.take<uint32_t>(kKeys * words);
    key_panels = arena.take<uint32_t>(kKeys * words);
    value_panels = arena.take<uint32_t>(kKeys / Engine::kGroup * round_up(width, kPanel));
    products = arena.take<float>(kTile);
    factors = Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(products) : arena.take<uint32_t>(kTile / Engine::kGroup);
    reference = arena.take<float>(n_features);
    sums = arena.take<float>(n_features * Vec::kWidth);
    bias = arena.take<float>(kKeys);
    bytes = arena.used;
  }
};

// The largest of the first `n` products, and of `top`.
inline float largest_product(const float* products, int64_t n, float top) {
  Vec::Reg tops = Vec::set1(top);
  int64_t j = 0;
  for (; j + Vec::kWidth <= n; j += Vec::kWidth) tops = Vec::max(tops, Vec::load(products + j));
  top = Vec::reduce_max(tops);
  for (; j < n; j++) top = products[j] > top ? products[j] : top;
  return top;
}

// Adds `floor` times the sum over tokens to the rows of S and to z; copies of the last feature become 0.
inline void add_floor(float* sums, float* weights, int64_t n_features, int64_t n_padded, int64_t width, float floor,
                      const float* total, float total_weight) {
  for (int64_t m = 0; m < n_padded; m++, sums += width) {
    const bool is_copy = m >= n_features;
    weights[m] = is_copy ? 0.f : weights[m] + floor * total_weight;
    for (int64_t d = 0; d < width; d++) sums[d] = is_copy ? 0.f : sums[d] + floor * total[d];
  }
}

// `features` is operand A, [M][width], M padded.
template <class Engine, class Source>
void summarize_keys(const LinearAttentionProblem& problem, const Task& task, const uint32_t* features,
                    int64_t n_features, int64_t width, const KeyBuffers<Engine>& buffers, KeySummary& summary) {
  using Element = typename Engine::Element;
  constexpr int64_t kKeys = Engine::kForwardKeys;
  const FeatureScale scale(problem);
  float total[kMaxWidth] = {}, row[kMaxWidth], top = -kInfinity;
  for (int64_t m = 0; m < n_features; m++) buffers.reference[m] = -kInfinity;
  for (int64_t i = 0; i < n_features * Vec::kWidth; i++) buffers.sums[i] = 0.f;
  for (int64_t i = 0; i < n_features * width; i++) summary.value_sums[i] = 0.f;

  for (int64_t begin = 0; begin < task.n_keys; begin += kKeys) {
    const int64_t n = smaller(kKeys, task.n_keys - begin), n_keys = round_up(n, kKeyStep), token = task.key_begin + begin;
    copy_rows<Element, Source>(problem.k, token, task.head, n, n_keys, problem.head_dim, width, buffers.rows);
    panels_of_columns(buffers.rows, n_keys, width / Engine::kGroup, buffers.key_panels);
    pack_values<Engine, Source>(problem.v, token, task.head, n, n_keys, problem.head_dim, width, buffers.rows,
                                buffers.value_panels);
    half_norms<Source>(problem, problem.k, token, task.head, n, n_keys, width, buffers.bias);
    for (int64_t i = 0; i < n; i++) {
      read_padded<Source>(problem.v, token + i, task.head, problem.head_dim, width, row);
      for (int64_t d = 0; d < width; d++) total[d] += row[d];
    }
    const RowWalk walk{n_features, n_features, width / Engine::kGroup, n_keys, width,
                       features, buffers.key_panels, buffers.value_panels,
                       buffers.products, buffers.factors, kKeys, summary.value_sums};
    walk_rows<Engine>(walk, [&](int64_t m, float* products, uint32_t* factors, const auto& again) {
      top = largest_product(products, n, top);
      const SoftmaxRow one{products, buffers.reference + m, buffers.sums + m * Vec::kWidth,
                           summary.value_sums + m * width, factors};
      softmax_row<Engine, true>(one, n_keys, scale.product, buffers.bias, width, again);
    });
  }

  summary.stabilizer = top * scale.product;
  for (int64_t m = 0; m < n_features; m++) {  // from the reference of each feature to the common one
    const Vec::Reg factor = FloatEngine::exp2(Vec::set1(buffers.reference[m] - summary.stabilizer));
    summary.weights[m] = Vec::reduce_add(Vec::mul(Vec::load(buffers.sums + m * Vec::kWidth), factor));
    float* sums = summary.value_sums + m * width;
    for (int64_t d = 0; d < width; d += Vec::kWidth) Vec::store(sums + d, Vec::mul(Vec::load(sums + d), factor));
  }
  add_floor(summary.value_sums, summary.weights, problem.n_features, n_features, width, problem.floor, total,
            static_cast<float>(task.n_keys));
}

// Rows in float as rows of elements.
template <class Engine>
void convert_rows(const float* from, int64_t n, uint32_t* to) {
  if constexpr (Engine::kGroup == 1)
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  else
    for (int64_t i = 0; i < n; i += 2 * Vec::kWidth)
      Engine::store_row(to, i, Vec::load(from + i), Vec::load(from + i + Vec::kWidth));
}

template <class Source>
void write_zeros(const Tokens& tokens, int64_t begin, int64_t end, int64_t head, int64_t head_dim) {
  const float zeros[kMaxWidth] = {};
  for (int64_t token = begin; token < end; token++) write_row(zeros, 1.f, head_dim, token_row<Source>(tokens, token, head));
}

// Sum of rows; `n` of them, `width` wide.
inline void sum_rows(const float* rows, int64_t n, int64_t width, float* to) {
  for (int64_t d = 0; d < width; d++) to[d] = 0.f;
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < width; d++) to[d] += rows[i * width + d];
}

template <class Engine>
struct LinearAttentionBuffers {
  uint32_t *features, *feature_panels, *summary_panels, *queries, *factors;
  float *products, *out, *weights;
  KeySummary summary;
  KeyBuffers<Engine> keys;
  int64_t bytes;

  LinearAttentionBuffers(void* scratch, int64_t n_features, int64_t width) : keys(nullptr, n_features, width) {
    const int64_t words = width / Engine::kGroup, kTile = tile_rows<Engine>() * n_features;
    Arena arena{static_cast<char*>(scratch)};
    features = arena.take<uint32_t>(n_features * words);
    feature_panels = arena.take<uint32_t>(round_up(n_features, kPanel) * words);
    summary_panels = arena.take<uint32_t>(n_features / Engine::kGroup * round_up(width, kPanel));
    summary.value_sums = arena.take<float>(n_features * width);
    summary.weights = arena.take<float>(n_features);
    products = arena.take<float>(kTile);
    factors = Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(products) : arena.take<uint32_t>(kTile / Engine::kGroup);
    queries = arena.take<uint32_t>(kLinearQueries * words);
    out = arena.take<float>(kLinearQueries * width);
    weights = arena.take<float>(kLinearQueries);
    char* rest = arena.take<char>(keys.bytes);
    if (rest != nullptr) keys = KeyBuffers<Engine>(rest, n_features, width);
    bytes = arena.used;
  }
};

// exp2(scale * product + offset) of a row as factors; returns their product with z.
template <class Engine>
inline float query_factors(const float* products, int64_t n, float scale, float offset, const float* weights,
                           uint32_t* factors) {
  Vec::Reg sum[2] = {Vec::zero(), Vec::zero()};
  for (int64_t m = 0; m < n; m += 2 * Vec::kWidth) {
    Vec::Reg p[2];
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++) {
      const int64_t column = m + i * Vec::kWidth;
      p[i] = Engine::exp2(Vec::fma(Vec::load(products + column), Vec::set1(scale), Vec::set1(offset)));
      sum[i] = Vec::fma(p[i], Vec::load(weights + column), sum[i]);
    }
    Engine::store_row(factors, m, p[0], p[1]);
  }
  return Vec::reduce_add(Vec::add(sum[0], sum[1]));
}

template <class Engine, class Source>
void linear_attention_forward(const LinearAttentionProblem& problem, const Task& task, void* scratch) {
  using Element = typename Engine::Element;
  [[maybe_unused]] const Engine engine;  // AMX sets up its tiles for the length of a task
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep), words = width / Engine::kGroup;
  const int64_t n_features = round_up(problem.n_features, kKeyStep);
  const FeatureScale scale(problem);
  if (task.n_keys == 0) {
    write_zeros<Source>(problem.out, task.query_begin, task.query_end, task.head, problem.head_dim);
    return;
  }
  LinearAttentionBuffers<Engine> buffers(scratch, n_features, width);
  KeySummary& summary = buffers.summary;
  copy_features<Engine>(problem, n_features, width, buffers.features);
  panels_of_columns(buffers.features, n_features, words, buffers.feature_panels);
  summarize_keys<Engine, Source>(problem, task, buffers.features, n_features, width, buffers.keys, summary);

  float floor_sums[kMaxWidth], floor_weight = 0.f, row[kMaxWidth];
  sum_rows(summary.value_sums, n_features, width, floor_sums);
  for (int64_t m = 0; m < n_features; m++) floor_weight += problem.floor * summary.weights[m];
  // The features are not needed any more: their memory is used for the rows of S.
  convert_rows<Engine>(summary.value_sums, n_features * width, buffers.features);
  panels_of_rows(reinterpret_cast<const Element*>(buffers.features), n_features, width, buffers.summary_panels);

  for (int64_t begin = task.query_begin; begin < task.query_end; begin += kLinearQueries) {
    const int64_t n = smaller(kLinearQueries, task.query_end - begin), n_padded = round_up(n, Engine::kRowStep);
    copy_rows<Element, Source>(problem.q, begin, task.head, n, n_padded, problem.head_dim, width, buffers.queries);
    for (int64_t i = 0; i < n_padded * width; i++) buffers.out[i] = 0.f;
    const RowWalk walk{n, n_padded, words, n_features, width,
                       buffers.queries, buffers.feature_panels, buffers.summary_panels,
                       buffers.products, buffers.factors, n_features, buffers.out};
    walk_rows<Engine>(walk, [&](int64_t i, const float* products, uint32_t* factors, const auto&) {
      read_padded<Source>(problem.q, begin + i, task.head, problem.head_dim, width, row);
      const float top = largest_product(products, n_features, -kInfinity) * scale.product;
      buffers.weights[i] = query_factors<Engine>(products, n_features, scale.product,
                                                 -top - scale.half_norm * dot(row, row, width), summary.weights, factors);
    });
    for (int64_t i = 0; i < n; i++) {
      float* out = buffers.out + i * width;
      const float weight = buffers.weights[i] + floor_weight;
      for (int64_t d = 0; d < width; d++) out[d] += problem.floor * floor_sums[d];
      write_row(out, 1.f / weight, problem.head_dim, token_row<Source>(problem.out, begin + i, task.head));
    }
  }
}

template <class Engine>
int64_t linear_attention_forward_scratch(const LinearAttentionProblem& problem) {
  return LinearAttentionBuffers<Engine>(nullptr, round_up(problem.n_features, kKeyStep),
                                        round_up(problem.head_dim, Engine::kWidthStep))
      .bytes;
}

}  // namespace
