// Rows times a packed weight matrix, with bias, ReLU and residual on the way out.
//
// Every result is summed over the inputs in one order (see gemm_vector.h), so a row is bitwise the same whatever the other
// rows are, which a library product does not promise.
#pragma once

#include "linear.h"
#include "pack.h"

namespace {

constexpr int64_t kLinearWords = kChain;  // of the summed axis at a time: 64 columns of them stay in the first-level cache

constexpr int64_t kColumnStep = 32;  // columns of a last panel are padded to a multiple: two vectors, two AMX tiles

template <class Engine>
struct LinearBuffers {
  uint32_t* rows;
  float *bias, *block;
  int64_t bytes;

  LinearBuffers(void* scratch, const LinearProblem& problem) {
    Arena arena{static_cast<char*>(scratch)};
    rows = arena.take<uint32_t>(kLinearRows * round_up(problem.n_inputs, Engine::kWidthStep) / Engine::kGroup *
                                Engine::kParts);
    bias = arena.take<float>(round_up(problem.n_outputs, kPanel));
    block = arena.take<float>(kLinearRows * kPanel);
    bytes = arena.used;
  }
};

template <class Engine>
int64_t linear_scratch(const LinearProblem& problem) {
  return LinearBuffers<Engine>(nullptr, problem).bytes;
}

template <class Engine>
int64_t linear_panel_bytes(const LinearProblem& problem) {
  return round_up(problem.n_outputs, kPanel) * round_up(problem.n_inputs, Engine::kWidthStep) / Engine::kGroup *
         Engine::kParts * 4;
}

template <class Engine, class Source>
void pack_weight(const LinearProblem& problem, uint32_t* panels, void* scratch) {
  const int64_t width = round_up(problem.n_inputs, Engine::kWidthStep), words = width / Engine::kGroup * Engine::kParts;
  const LinearBuffers<Engine> buffers(scratch, problem);
  for (int64_t begin = 0; begin < problem.n_outputs; begin += kPanel) {
    copy_rows<typename Engine::Element, Source>(problem.weight, begin, 0, smaller(kPanel, problem.n_outputs - begin),
                                                kPanel, problem.n_inputs, width, buffers.rows);
    panels_of_columns(buffers.rows, kPanel, words, panels + begin * words);
  }
}

// Sums of up to 64 outputs become results.
template <class Source>
void finish_block(const LinearProblem& problem, int64_t row, int64_t n, int64_t column, const float* bias,
                  const float* block) {
  const int64_t columns = smaller(kPanel, problem.n_outputs - column);
  float result[kPanel], residual[kPanel] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
      const Vec::Reg x = Vec::add(Vec::load(block + i * kPanel + j), Vec::load(bias + column + j));
      Vec::store(result + j, problem.relu ? Vec::max(Vec::zero(), x) : x);  // a NaN stays: max gives its second operand
    }
    if (problem.residual.data != nullptr) {
      read_row(token_row<Source>(problem.residual, row + i, 0) + column, columns, residual);
      for (int64_t j = 0; j < columns; j++) result[j] += residual[j];
    }
    write_row(result, 1.f, columns, token_row<Source>(problem.out, row + i, 0) + column);
  }
}

template <class Engine, class Source>
void linear_rows(const LinearProblem& problem, int64_t row, const uint32_t* panels, void* scratch) {
  [[maybe_unused]] const Engine engine;
  const int64_t width = round_up(problem.n_inputs, Engine::kWidthStep), words = width / Engine::kGroup;
  const int64_t n = smaller(kLinearRows, problem.n_rows - row), n_padded = round_up(n, Engine::kRowStep);
  const LinearBuffers<Engine> buffers(scratch, problem);
  copy_rows<typename Engine::Element, Source>(problem.input, row, 0, n, n_padded, problem.n_inputs, width,
                                              buffers.rows);
  for (int64_t i = 0; i < round_up(problem.n_outputs, kPanel); i++) buffers.bias[i] = 0.f;
  if (problem.bias.data != nullptr)
    read_row(static_cast<const Source*>(problem.bias.data), problem.n_outputs, buffers.bias);
  for (int64_t column = 0; column < problem.n_outputs; column += kPanel) {
    const int64_t columns = smaller(kPanel, round_up(problem.n_outputs - column, kColumnStep));
    if (words == 0)  // no inputs: the loop below would leave the sums as they are
      for (int64_t i = 0; i < kLinearRows * kPanel; i++) buffers.block[i] = 0.f;
    const int64_t most = Engine::kParts == 1 ? kLinearWords : words;  // products of parts keep to the cache by themselves
    for (int64_t word = 0; word < words; word += most) {
      const auto gemm = word == 0 ? Engine::template gemm<false> : Engine::template gemm<true>;
      gemm(n_padded, columns, smaller(most, words - word), buffers.rows + word, words * Engine::kParts,
           panels + column * words * Engine::kParts + word * kPanel, buffers.block, kPanel);
    }
    finish_block<Source>(problem, row, n, column, buffers.bias, buffers.block);
  }
}

}  // namespace
