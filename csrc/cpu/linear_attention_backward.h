// Backward of linear attention for one cell and head, on transposed features, [features][tokens]: they are operand
// A of dS += P^T g without a transposition, and as operand B of dq^T += W^T dP^T.
//
// With p the features without their floor, g = dO / weight and e = -(dO . out) / weight, weight = phi(q) z:
//   over the queries  dP^T = P^T (S g^T + z e)     dS = P^T g     dz = P^T e      dq = W^T dP^T - q sum(dP)
//   over the keys     dP^T = P^T (dS V^T + dz)     dv = P dS                      dk = W^T dP^T - k sum(dP)
// The stabilizers are constants: except for the floor they cancel.
#pragma once

#include "attention_backward.h"
#include "linear_attention_forward.h"

namespace {

template <class Engine>
struct LinearAttentionGradBuffers {
  uint32_t *features, *feature_columns;                // W, [M][width] and [width][M]
  uint32_t *summary_rows, *grad_columns;               // S or dS as [M][width]; dS as [width][M]
  uint32_t *rows, *inputs, *others, *other_rows;       // a block of tokens: as rows, and packed
  uint32_t *factor_rows, *factor_panel, *grad_panel;   // P^T as operand A and B, dP^T as operand B
  float *products, *grad_products, *grad_sums, *grad_weights, *transposed, *grad_rows;
  KeySummary summary;
  KeyBuffers<Engine> keys;
  int64_t bytes;

  LinearAttentionGradBuffers(void* scratch, int64_t n_features, int64_t width) : keys(nullptr, n_features, width) {
    const int64_t words = width / Engine::kGroup, row_words = round_up(width, kPanel) / Engine::kGroup;
    const int64_t kTile = n_features * kQueryBlock, kMost = n_features > kQueryBlock ? n_features : kQueryBlock;
    Arena arena{static_cast<char*>(scratch)};
    features = arena.take<uint32_t>(n_features * words);
    feature_columns = arena.take<uint32_t>(n_features * words);
    summary_rows = arena.take<uint32_t>(n_features * words);
    grad_columns = arena.take<uint32_t>(n_features * words);
    rows = arena.take<uint32_t>(kMost * row_words);
    inputs = arena.take<uint32_t>(kQueryBlock * words);
    others = arena.take<uint32_t>(kQueryBlock * words);
    other_rows = arena.take<uint32_t>(kQueryBlock * row_words);
    products = arena.take<float>(kTile);
    grad_products = arena.take<float>(kTile);
    // In float the rows of a tile are its panel.
    const auto tile = [&](float* same) {
      return Engine::kGroup == 1 ? reinterpret_cast<uint32_t*>(same) : arena.take<uint32_t>(kTile / Engine::kGroup);
    };
    factor_rows = tile(products);
    factor_panel = tile(products);
    grad_panel = tile(grad_products);
    grad_sums = arena.take<float>(n_features * width);
    grad_weights = arena.take<float>(n_features);
    transposed = arena.take<float>(width * kQueryBlock);
    grad_rows = arena.take<float>(kQueryBlock * width);
    summary.value_sums = arena.take<float>(n_features * width);
    summary.weights = arena.take<float>(n_features);
    char* rest = arena.take<char>(keys.bytes);
    if (rest != nullptr) keys = KeyBuffers<Engine>(rest, n_features, width);
    bytes = arena.used;
  }
};

// One number per token of a block.
struct TokenBlock {
  float offset[kQueryBlock];     // of the exponents; -inf past the end
  float weight[kQueryBlock];     // phi(q) z
  float effect[kQueryBlock];     // the factor on z in dP^T: e for queries, 1 for keys
  float grad_total[kQueryBlock]; // sum of dP over the features
};

// products <- P^T.
inline void exponentiate(float* products, int64_t n_features, float scale, const TokenBlock& block) {
  for (int64_t m = 0; m < n_features; m++)
    for (int64_t i = 0; i < kQueryBlock; i += Vec::kWidth) {
      float* at = products + m * kQueryBlock + i;
      Vec::store(at, FloatEngine::exp2(Vec::fma(Vec::load(at), Vec::set1(scale), Vec::load(block.offset + i))));
    }
}

inline void subtract_largest(const float* products, int64_t n_features, float scale, TokenBlock& block) {
  for (int64_t i = 0; i < kQueryBlock; i += Vec::kWidth) {
    Vec::Reg top = Vec::set1(-kInfinity);
    for (int64_t m = 0; m < n_features; m++) top = Vec::max(top, Vec::load(products + m * kQueryBlock + i));
    Vec::store(block.offset + i, Vec::sub(Vec::load(block.offset + i), Vec::mul(top, Vec::set1(scale))));
  }
}

// P^T as operands, dP^T = P^T (grad_products + z effect) as a panel, and its sum over the features.
template <class Engine>
void feature_gradients(const LinearAttentionGradBuffers<Engine>& buffers, int64_t n_features, const float* weights,
                       bool as_panel, TokenBlock& block) {
  constexpr int64_t kRowWords = kQueryBlock / Engine::kGroup;
  for (int64_t i = 0; i < kQueryBlock; i += 2 * Vec::kWidth) {
    Vec::Reg total[2] = {Vec::zero(), Vec::zero()}, effect[2];
    for (int64_t j = 0; j < 2; j++) effect[j] = Vec::load(block.effect + i + j * Vec::kWidth);
    for (int64_t m = 0; m < n_features; m += 2) {
      Vec::Reg p[2][2], grad[2][2];
#pragma GCC unroll 2
      for (int64_t r = 0; r < 2; r++)
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; j++) {
          const int64_t at = (m + r) * kQueryBlock + i + j * Vec::kWidth;
          p[r][j] = Vec::load(buffers.products + at);
          grad[r][j] = Vec::mul(
              p[r][j], Vec::fma(Vec::set1(weights[m + r]), effect[j], Vec::load(buffers.grad_products + at)));
          total[j] = Vec::add(total[j], grad[r][j]);
        }
#pragma GCC unroll 2
      for (int64_t r = 0; r < 2; r++)
        if constexpr (Engine::kGroup == 2) {
          Engine::store_row(buffers.factor_rows + (m + r) * kRowWords, i, p[r][0], p[r][1]);
        } else {
          Engine::store_row(buffers.grad_panel + (m + r) * kRowWords, i, grad[r][0], grad[r][1]);
        }
      if constexpr (Engine::kGroup == 2)
        for (int64_t j = 0; j < 2; j++) {
          Engine::store_panel(buffers.grad_panel, m, i + j * Vec::kWidth, grad[0][j], grad[1][j]);
          if (as_panel) Engine::store_panel(buffers.factor_panel, m, i + j * Vec::kWidth, p[0][j], p[1][j]);
        }
    }
    for (int64_t j = 0; j < 2; j++) Vec::store(block.grad_total + i + j * Vec::kWidth, total[j]);
  }
}

// grad_rows <- columns [width][M] times a panel of the block, as rows of tokens.
template <class Engine>
void sum_features(const LinearAttentionGradBuffers<Engine>& buffers, const uint32_t* columns, const uint32_t* panel,
                  int64_t n_features, int64_t width) {
  const int64_t words = n_features / Engine::kGroup;
  Engine::template gemm<false>(width, kQueryBlock, words, columns, words, panel, buffers.transposed, kQueryBlock);
  transpose_words(reinterpret_cast<const uint32_t*>(buffers.transposed), kQueryBlock, width, kQueryBlock,
                  reinterpret_cast<uint32_t*>(buffers.grad_rows), width);
}

// dq or dk of a block: scale (W^T dP^T) - scale^2 sum(dP) x.
template <class Engine, class Source>
void write_input_gradients(const LinearAttentionProblem& problem, const ConstTokens& inputs, const Tokens& grads,
                           int64_t token, int64_t head, int64_t n, int64_t n_features, int64_t width,
                           const LinearAttentionGradBuffers<Engine>& buffers, const TokenBlock& block) {
  float row[kMaxWidth];
  sum_features(buffers, buffers.feature_columns, buffers.grad_panel, n_features, width);
  for (int64_t i = 0; i < n; i++) {
    float* grad = buffers.grad_rows + i * width;
    read_padded<Source>(inputs, token + i, head, problem.head_dim, width, row);
    for (int64_t d = 0; d < width; d++) grad[d] -= problem.scale * block.grad_total[i] * row[d];
    write_row(grad, problem.scale, problem.head_dim, token_row<Source>(grads, token + i, head));
  }
}

// products <- W x^T of a block of tokens; their exponents' offsets <- -|x|^2 / 2.
template <class Engine, class Source>
void multiply_features(const LinearAttentionProblem& problem, const ConstTokens& inputs, int64_t token, int64_t head,
                       int64_t n, int64_t n_features, int64_t width, const LinearAttentionGradBuffers<Engine>& buffers,
                       TokenBlock& block) {
  const int64_t words = width / Engine::kGroup;
  half_norms<Source>(problem, inputs, token, head, n, kQueryBlock, width, block.offset);
  copy_rows<typename Engine::Element, Source>(inputs, token, head, n, kQueryBlock, problem.head_dim, width, buffers.rows);
  panels_of_columns(buffers.rows, kQueryBlock, words, buffers.inputs);
  Engine::template gemm<false>(n_features, kQueryBlock, words, buffers.features, words, buffers.inputs, buffers.products,
                               kQueryBlock);
}

// One block of queries: dq, and what it adds to dS and dz.
template <class Engine, class Source>
void query_gradients(const LinearAttentionProblem& problem, int64_t head, int64_t token, int64_t n, int64_t n_features,
                     int64_t width, float floor_weight, const LinearAttentionGradBuffers<Engine>& buffers,
                     float* grad_total, float& effect_total) {
  using Element = typename Engine::Element;
  const FeatureScale scale(problem);
  const int64_t words = width / Engine::kGroup, row_words = kQueryBlock / Engine::kGroup;
  const ConstTokens outputs{problem.out.data, problem.out.token_stride, problem.out.head_stride};
  TokenBlock block;
  multiply_features<Engine, Source>(problem, problem.q, token, head, n, n_features, width, buffers, block);
  subtract_largest(buffers.products, n_features, scale.product, block);
  exponentiate(buffers.products, n_features, scale.product, block);
  for (int64_t i = 0; i < kQueryBlock; i += Vec::kWidth) {
    Vec::Reg weight = Vec::set1(floor_weight);
    for (int64_t m = 0; m < n_features; m++)
      weight = Vec::fma(Vec::load(buffers.products + m * kQueryBlock + i), Vec::set1(buffers.summary.weights[m]), weight);
    Vec::store(block.weight + i, weight);
  }

  // g = dO / weight as rows, e = -(g . out).
  float out[kMaxWidth];
  for (int64_t i = 0; i < kQueryBlock * width; i++) buffers.grad_rows[i] = 0.f;
  for (int64_t i = 0; i < kQueryBlock; i++) block.effect[i] = 0.f;
  for (int64_t i = 0; i < n; i++) {
    float* grad = buffers.grad_rows + i * width;
    read_padded<Source>(problem.grad_out, token + i, head, problem.head_dim, width, grad);
    read_padded<Source>(outputs, token + i, head, problem.head_dim, width, out);
    for (int64_t d = 0; d < width; d++) grad[d] /= block.weight[i];
    for (int64_t d = 0; d < width; d++) grad_total[d] += grad[d];
    block.effect[i] = -dot(grad, out, width);
    effect_total += block.effect[i];
  }
  convert_rows<Engine>(buffers.grad_rows, kQueryBlock * width, buffers.rows);
  panels_of_columns(buffers.rows, kQueryBlock, words, buffers.others);
  panels_of_rows(reinterpret_cast<const Element*>(buffers.rows), kQueryBlock, width, buffers.other_rows);

  Engine::template gemm<false>(n_features, kQueryBlock, words, buffers.summary_rows, words, buffers.others,
                               buffers.grad_products, kQueryBlock);
  for (int64_t m = 0; m < n_features; m++)
    buffers.grad_weights[m] += dot(buffers.products + m * kQueryBlock, block.effect, kQueryBlock);
  feature_gradients<Engine>(buffers, n_features, buffers.summary.weights, false, block);
  Engine::template gemm<true>(n_features, width, row_words, buffers.factor_rows, row_words, buffers.other_rows,
                              buffers.grad_sums, width);
  write_input_gradients<Engine, Source>(problem, problem.q, problem.grad_q, token, head, n, n_features, width, buffers,
                                        block);
}

// One block of keys: dk and dv.
template <class Engine, class Source>
void key_gradients(const LinearAttentionProblem& problem, int64_t head, int64_t token, int64_t n, int64_t n_features,
                   int64_t width, const float* grad_floor, const LinearAttentionGradBuffers<Engine>& buffers) {
  using Element = typename Engine::Element;
  const FeatureScale scale(problem);
  const int64_t words = width / Engine::kGroup;
  TokenBlock block;
  multiply_features<Engine, Source>(problem, problem.k, token, head, n, n_features, width, buffers, block);
  for (int64_t i = 0; i < kQueryBlock; i++) {
    block.offset[i] -= buffers.summary.stabilizer;
    block.effect[i] = 1.f;
  }
  copy_rows<Element, Source>(problem.v, token, head, n, kQueryBlock, problem.head_dim, width, buffers.rows);
  panels_of_columns(buffers.rows, kQueryBlock, words, buffers.others);
  exponentiate(buffers.products, n_features, scale.product, block);
  Engine::template gemm<false>(n_features, kQueryBlock, words, buffers.summary_rows, words, buffers.others,
                               buffers.grad_products, kQueryBlock);
  feature_gradients<Engine>(buffers, n_features, buffers.grad_weights, true, block);

  sum_features(buffers, buffers.grad_columns, buffers.factor_panel, n_features, width);
  for (int64_t i = 0; i < n; i++) {
    float* grad = buffers.grad_rows + i * width;
    for (int64_t d = 0; d < width; d++) grad[d] += grad_floor[d];
    write_row(grad, 1.f, problem.head_dim, token_row<Source>(problem.grad_v, token + i, head));
  }
  write_input_gradients<Engine, Source>(problem, problem.k, problem.grad_k, token, head, n, n_features, width, buffers,
                                        block);
}

template <class Engine, class Source>
void linear_attention_backward(const LinearAttentionProblem& problem, const Task& task, void* scratch) {
  [[maybe_unused]] const Engine engine;
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t width = round_up(problem.head_dim, Engine::kWidthStep);
  const int64_t n_features = round_up(problem.n_features, kKeyStep), n_sums = n_features * width;
  const int64_t key_end = task.key_begin + task.n_keys;
  if (task.n_keys == 0 || task.query_begin == task.query_end) {  // no query attends to a key
    write_zeros<Source>(problem.grad_q, task.query_begin, task.query_end, task.head, problem.head_dim);
    write_zeros<Source>(problem.grad_k, task.key_begin, key_end, task.head, problem.head_dim);
    write_zeros<Source>(problem.grad_v, task.key_begin, key_end, task.head, problem.head_dim);
    return;
  }
  LinearAttentionGradBuffers<Engine> buffers(scratch, n_features, width);
  copy_features<Engine>(problem, n_features, width, buffers.features);
  transpose_rows<Engine>(buffers.features, n_features, width, buffers.rows, buffers.feature_columns);
  summarize_keys<Engine, Source>(problem, task, buffers.features, n_features, width, buffers.keys, buffers.summary);
  convert_rows<Engine>(buffers.summary.value_sums, n_sums, buffers.summary_rows);

  float floor_weight = 0.f, grad_total[kMaxWidth] = {}, effect_total = 0.f, grad_floor[kMaxWidth];
  for (int64_t m = 0; m < n_features; m++) floor_weight += problem.floor * buffers.summary.weights[m];
  for (int64_t i = 0; i < n_sums; i++) buffers.grad_sums[i] = 0.f;
  for (int64_t m = 0; m < n_features; m++) buffers.grad_weights[m] = 0.f;
  for (int64_t token = task.query_begin; token < task.query_end; token += kQueryBlock)
    query_gradients<Engine, Source>(problem, task.head, token, smaller(kQueryBlock, task.query_end - token), n_features,
                                    width, floor_weight, buffers, grad_total, effect_total);

  add_floor(buffers.grad_sums, buffers.grad_weights, problem.n_features, n_features, width, problem.floor, grad_total,
            effect_total);
  sum_rows(buffers.grad_sums, n_features, width, grad_floor);
  for (int64_t d = 0; d < width; d++) grad_floor[d] *= problem.floor;
  convert_rows<Engine>(buffers.grad_sums, n_sums, buffers.summary_rows);
  transpose_rows<Engine>(buffers.summary_rows, n_features, width, buffers.rows, buffers.grad_columns);
  for (int64_t token = task.key_begin; token < key_end; token += kQueryBlock)
    key_gradients<Engine, Source>(problem, task.head, token, smaller(kQueryBlock, key_end - token), n_features, width,
                                  grad_floor, buffers);
}

template <class Engine>
int64_t linear_attention_backward_scratch(const LinearAttentionProblem& problem) {
  return LinearAttentionGradBuffers<Engine>(nullptr, round_up(problem.n_features, kKeyStep),
                                            round_up(problem.head_dim, Engine::kWidthStep))
      .bytes;
}

}  // namespace
