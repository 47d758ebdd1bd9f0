// What the backward and the key sums need of each query before they start: its log-sum-exp in units of log 2, and delta =
// grad_out . out - grad_lse. No other query attends to the own key of a target query, so its whole gradient is written here.
//
// Four lanes share a row, each holds every fourth chunk of 16 bytes.
#pragma once

#include "tiles.h"

namespace scfm::cuda {

enum class Purpose { kGradients, kColumnSums, kDeletionEffects };

// Half types of five exponent bits: gradients of scores may leave their range, see gradient_factor.
template <class Element>
constexpr bool kNarrow = false;
template <>
inline constexpr bool kNarrow<Half> = true;

constexpr int kRowThreads = 128;

template <int kWidth>
struct RowSlice {
  Chunk chunks[kWidth / 32];
};

template <int kWidth>
SCFM_DEVICE RowSlice<kWidth> load_slice(const Tokens& tokens, int64_t token, int64_t head, bool valid) {
  RowSlice<kWidth> slice;
  SCFM_UNROLL
  for (int i = 0; i < kWidth / 32; i++)
    slice.chunks[i] = valid ? global_chunk(at(tokens, token, head, 8 * (4 * i + (lane_index() & 3)))) : Chunk{{0, 0, 0, 0}};
  return slice;
}

// Every lane of the warp must take part.
template <class Element, int kWidth>
SCFM_DEVICE float dot(const RowSlice<kWidth>& a, const RowSlice<kWidth>& b) {
  float sum = 0.f;
  SCFM_UNROLL
  for (int i = 0; i < kWidth / 32; i++) {
    SCFM_UNROLL
    for (int word = 0; word < 4; word++) {
      const Pair x = unpack<Element>(a.chunks[i].words[word]), y = unpack<Element>(b.chunks[i].words[word]);
      sum = multiply_add(x.x, y.x, multiply_add(x.y, y.y, sum));
    }
  }
  return row_sum(sum);
}

// Write factor * row.
template <class Element, int kWidth>
SCFM_DEVICE void store_multiple(const Tokens& tokens, int64_t token, int64_t head, const RowSlice<kWidth>& row,
                                float factor) {
  SCFM_UNROLL
  for (int i = 0; i < kWidth / 32; i++) {
    Chunk chunk;
    SCFM_UNROLL
    for (int word = 0; word < 4; word++) {
      const Pair pair = unpack<Element>(row.chunks[i].words[word]);
      chunk.words[word] = pack<Element>(pair.x * factor, pair.y * factor);
    }
    store_global(address_of(tokens, token, head, 8 * (4 * i + (lane_index() & 3))), chunk);
  }
}

// Initializes the gradient of a query with the term of its own key: factor * row as floats.
template <class Element, int kWidth>
SCFM_DEVICE void start_grad_q(float* grad_q_sum, int64_t row_index, const RowSlice<kWidth>& row, float factor) {
  SCFM_UNROLL
  for (int i = 0; i < kWidth / 32; i++) {
    SCFM_UNROLL
    for (int part = 0; part < 2; part++) {
      const Pair a = unpack<Element>(row.chunks[i].words[2 * part]), b = unpack<Element>(row.chunks[i].words[2 * part + 1]);
      const Chunk sums{{as_bits(a.x * factor), as_bits(a.y * factor), as_bits(b.x * factor), as_bits(b.y * factor)}};
      store_global(address_of(grad_q_sum, row_index * kWidth + 8 * (4 * i + (lane_index() & 3)) + 4 * part), sums);
    }
  }
}

// Largest value of the warp into bounds[cell, head, which].
SCFM_DEVICE void raise_bound(const Problem& problem, const Work& work, int which, float value) {
  SCFM_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) value = larger(value, shuffle_xor(value, mask));
  if (lane_index() == 0)
    raise_global(address_of(problem.bounds, 4 * (static_cast<int64_t>(work.tile.cell) * problem.n_heads + work.head) + which),
                 value);
}

// The largest power of two that keeps every gradient of a score of this cell and head below 2^15. From
// |P (dP - delta)| <= |grad_out| |v| + |delta|; a factor of two allows for the roundings. Powers of two are exact (exp2 is
// approximate, so the bits are written), and the factor depends on the cell only.
SCFM_DEVICE float gradient_factor(const Problem& problem, const Work& work) {
  const int64_t index = 4 * (static_cast<int64_t>(work.tile.cell) * problem.n_heads + work.head);
  const float grad = global_float(address_of(problem.bounds, index)), delta = global_float(address_of(problem.bounds, index + 1));
  const float value = global_float(address_of(problem.bounds, index + 2));
  const float bound = square_root(grad) * square_root(value) + delta;
  const float exponent = round_down(14.f - log2_fast(bound));
  // 0, inf and nan: nothing to keep in range.
  if (!(exponent > -100.f && exponent < 100.f)) return 1.f;
  return as_float(static_cast<uint32_t>(static_cast<int>(exponent) + 127) << 23);
}

// Largest squared norm of the values, float16 only.
template <class Element, int kWidth>
SCFM_KERNEL(kRowThreads, 4) attention_bounds(SCFM_PARAMETER Problem problem) {
  const Work work = work_of_block(problem, problem.key_tiles);
  float largest = 0.f;
  for (int first = 0; first < work.tile.count; first += kRowThreads / 4) {
    const int row = first + (thread_index() >> 2);
    const RowSlice<kWidth> value =
        load_slice<kWidth>(problem.v, work.tile.begin + static_cast<int64_t>(row), work.head, row < work.tile.count);
    largest = larger(largest, dot<Element>(value, value));
  }
  raise_bound(problem, work, 2, largest);
}

// Writes the results of the own key of query `token`. Rows without one take part in the sums and write nothing.
template <class Element, int kWidth, Purpose kPurpose>
SCFM_DEVICE void write_own_key(const Problem& problem, const Work& work, int64_t token, bool valid, bool own, float lse,
                               float delta, const RowSlice<kWidth>& grad) {
  const RowSlice<kWidth> query = load_slice<kWidth>(problem.q, token, work.head, own);
  const RowSlice<kWidth> key = load_slice<kWidth>(problem.k, token, work.head, own);
  const float bias = own ? scalar_or_zero(problem.key_bias, token, work.head) : 0.f;
  const float score = multiply_add(dot<Element>(query, key), problem.scale * kLog2E, bias * kLog2E);
  const float prob = exp2_fast(score - lse);
  if (kPurpose == Purpose::kGradients) {
    const RowSlice<kWidth> value = load_slice<kWidth>(problem.v, token, work.head, own);
    const float grad_score = prob * (dot<Element>(grad, value) - delta);
    if (valid) start_grad_q<Element>(problem.grad_q_sum, token * problem.n_heads + work.head, key, own ? grad_score : 0.f);
    if (!own) return;
    store_multiple<Element>(problem.grad_k, token, work.head, query, grad_score * problem.scale);
    store_multiple<Element>(problem.grad_v, token, work.head, grad, prob);
    if (problem.key_sums.data != nullptr && (lane_index() & 3) == 0)
      store_global(address_of(problem.key_sums, token, work.head), grad_score);
  } else if (own && (lane_index() & 3) == 0) {
    store_global(address_of(problem.key_sums, token, work.head), kPurpose == Purpose::kColumnSums ? prob : 0.f);
  }
}

template <class Element, int kWidth, Purpose kPurpose>
SCFM_KERNEL(kRowThreads, 4) attention_rows(SCFM_PARAMETER Problem problem) {
  const Work work = work_of_block(problem, problem.query_tiles);
  float largest_grad = 0.f, largest_delta = 0.f;
  for (int first = 0; first < work.tile.count; first += kRowThreads / 4) {
    const int row = first + (thread_index() >> 2);
    const bool valid = row < work.tile.count, own = valid && row >= work.tile.own;
    const int64_t token = work.tile.begin + static_cast<int64_t>(row);
    const float natural = valid ? global_float(address_of(problem.lse, token, work.head)) : -kInfinity;
    // +inf for a query that attends to no key: all its probabilities are 0.
    const float lse = natural == -kInfinity ? kInfinity : natural * kLog2E;
    float delta = 0.f;
    RowSlice<kWidth> grad;
    if (kPurpose != Purpose::kColumnSums) {
      grad = load_slice<kWidth>(problem.grad_out, token, work.head, valid);
      delta = dot<Element>(grad, load_slice<kWidth>(problem.out, token, work.head, valid));
      if (kPurpose == Purpose::kGradients && valid) delta -= scalar_or_zero(problem.grad_lse, token, work.head);
      if (natural == -kInfinity) delta = 0.f;
    }
    write_own_key<Element, kWidth, kPurpose>(problem, work, token, valid, own, lse, delta, grad);
    if (kPurpose == Purpose::kGradients && kNarrow<Element>) {
      largest_grad = larger(largest_grad, dot<Element>(grad, grad));
      largest_delta = larger(largest_delta, absolute(delta));
    }
    if (!valid || (lane_index() & 3) != 0) continue;
    store_global(address_of(problem.row_lse, work.head * problem.n_queries + token), lse);
    if (kPurpose != Purpose::kColumnSums)
      store_global(address_of(problem.row_delta, work.head * problem.n_queries + token), delta);
  }
  if (kPurpose == Purpose::kGradients && kNarrow<Element>) {
    raise_bound(problem, work, 0, largest_grad);
    raise_bound(problem, work, 1, largest_delta);
  }
}

}  // namespace scfm::cuda
