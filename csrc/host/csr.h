// Rows of a CSR matrix as tokens and counts, for all dtypes, without a copy of the matrix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace scfm::host {

// Memory of one cell, which a thread reuses from cell to cell.
struct Cell {
  std::vector<int32_t> tokens;
  std::vector<double> counts;
  size_t size = 0;
  bool tokens_ascend = true;   // strictly: sorted and distinct
  bool columns_ascend = true;  // strictly: no column occurs twice

  void reserve(size_t most) {
    if (tokens.size() < most) {
      tokens.resize(most);
      counts.resize(most);
    }
  }
};

// Writes the non-zero entries [begin, end) of a row whose gene has a token into `cell`, in the order of the row.
using RowLoader = void (*)(const void* indices, const void* data, int64_t begin, int64_t end,
                           const int32_t* token_of_column, int64_t n_columns, Cell& cell);

enum class IndexType { int32, int64 };
enum class ValueType { boolean, int8, int16, int32, int64, uint8, uint16, uint32, uint64, float32, float64 };

RowLoader choose_loader(IndexType indices, ValueType values);

// A borrowed CSR matrix and the token of each of its columns (-1: none).
struct CsrTokens {
  const int64_t* indptr;
  const void* indices;
  const void* data;
  RowLoader load;
  int64_t n_rows;
  int64_t n_columns;
  const int32_t* token_of_column;
  int32_t n_tokens;     // size of the vocabulary
  bool may_repeat;      // several columns may have one token
};

}  // namespace scfm::host
