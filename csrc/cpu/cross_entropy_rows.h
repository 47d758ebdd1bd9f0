// Softmax of a few rows of logits, its cross-entropy and its gradient. A row is read from memory once and written once; the
// passes between find it in the second-level cache.
#pragma once

#include "cross_entropy.h"
#include "engine_float.h"
#include "pack.h"

namespace {

struct CrossEntropyBuffers {
  float *row, *bias;
  int64_t bytes;

  CrossEntropyBuffers(void* scratch, const CrossEntropyProblem& problem) {
    Arena arena{static_cast<char*>(scratch)};
    row = arena.take<float>(problem.grad_stride);
    bias = arena.take<float>(problem.grad_stride);
    bytes = arena.used;
  }
};

inline int64_t cross_entropy_scratch(const CrossEntropyProblem& problem) {
  return CrossEntropyBuffers(nullptr, problem).bytes;
}

// row += bias; returns the largest element.
inline float add_bias(const float* bias, int64_t n, float* row) {
  Vec::Reg top[2] = {Vec::set1(-kInfinity), Vec::set1(-kInfinity)};
  for (int64_t j = 0; j < n; j += 2 * Vec::kWidth)
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++) {
      float* at = row + j + i * Vec::kWidth;
      const Vec::Reg x = Vec::add(Vec::load(at), Vec::load(bias + j + i * Vec::kWidth));
      Vec::store(at, x);
      top[i] = Vec::max(top[i], x);
    }
  return Vec::reduce_max(Vec::max(top[0], top[1]));
}

// row = e^(row - top); returns the sum, of chains of at most kChain terms in each lane (see gemm_vector.h).
inline float exponentials(float top, int64_t n, float* row) {
  Vec::Reg sum = Vec::zero();
  for (int64_t begin = 0; begin < n; begin += 2 * kChain * Vec::kWidth) {
    const int64_t end = smaller(n, begin + 2 * kChain * Vec::kWidth);
    Vec::Reg part[2] = {Vec::zero(), Vec::zero()};
    for (int64_t j = begin; j < end; j += 2 * Vec::kWidth)
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; i++) {
        float* at = row + j + i * Vec::kWidth;
        // The difference first: scaling both numbers by log2(e) would round away what they differ by.
        const Vec::Reg x = Vec::mul(Vec::sub(Vec::load(at), Vec::set1(top)), Vec::set1(kLog2E));
        const Vec::Reg p = FloatEngine::exp2(x);
        Vec::store(at, p);
        part[i] = Vec::add(part[i], p);
      }
    sum = Vec::add(sum, Vec::add(part[0], part[1]));
  }
  return Vec::reduce_add(sum);
}

template <class Source>
void cross_entropy_rows(const CrossEntropyProblem& problem, int64_t begin, void* scratch) {
  [[maybe_unused]] const Vec::FlushDenormals flush;
  const int64_t n = problem.n_classes, padded = problem.grad_stride;
  const CrossEntropyBuffers buffers(scratch, problem);
  float *row = buffers.row, *total = problem.grad_bias + begin / kCrossEntropyRows * padded;
  for (int64_t j = 0; j < padded; j++) {
    buffers.bias[j] = problem.bias == nullptr || j >= n ? 0.f : problem.bias[j];
    total[j] = 0.f;
  }
  for (int64_t i = begin; i < smaller(begin + kCrossEntropyRows, problem.n_rows); i++) {
    Source* logits = token_row<Source>(problem.logits, i, 0);
    read_row(logits, n, row);
    for (int64_t j = n; j < padded; j++) row[j] = -kInfinity;
    const float top = add_bias(buffers.bias, padded, row), logit = row[problem.target[i]];
    const float sum = exponentials(top, padded, row);
    problem.loss[i] = static_cast<float>(__builtin_log(static_cast<double>(sum)) - (static_cast<double>(logit) - top));
    const Vec::Reg factor = Vec::set1(1.f / sum);
    for (int64_t j = 0; j < padded; j += Vec::kWidth) Vec::store(row + j, Vec::mul(Vec::load(row + j), factor));
    row[problem.target[i]] -= 1.f;
    for (int64_t j = 0; j < padded; j += Vec::kWidth)
      Vec::store(total + j, Vec::add(Vec::load(total + j), Vec::load(row + j)));
    write_row(row, 1.f, n, logits);
  }
}

}  // namespace
