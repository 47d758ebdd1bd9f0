#include "csr.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace scfm::host {
namespace {

template <typename Index, typename Value>
void load_row(const void* indices, const void* data, int64_t begin, int64_t end, const int32_t* token_of_column,
              int64_t n_columns, Cell& cell) {
  const Index* column_of = static_cast<const Index*>(indices);
  const Value* value_of = static_cast<const Value*>(data);
  cell.reserve(static_cast<size_t>(end - begin));
  int32_t* tokens = cell.tokens.data();
  double* counts = cell.counts.data();
  size_t size = 0;
  int64_t last_column = -1;
  int32_t last_token = -1;
  bool columns_ascend = true, tokens_ascend = true;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t column = static_cast<int64_t>(column_of[position]);
    if (static_cast<uint64_t>(column) >= static_cast<uint64_t>(n_columns)) {
      throw std::out_of_range("column index " + std::to_string(column) + " is outside a matrix of " +
                              std::to_string(n_columns) + " columns");
    }
    const int32_t token = token_of_column[column];
    const double count = static_cast<double>(value_of[position]);
    const bool keep = (token >= 0) & (count != 0.0);
    tokens[size] = token;
    counts[size] = count;
    size += keep;
    columns_ascend &= column > last_column;
    last_column = column;
    tokens_ascend &= (token > last_token) | !keep;
    last_token = keep ? token : last_token;
  }
  cell.size = size;
  cell.columns_ascend = columns_ascend;
  cell.tokens_ascend = tokens_ascend;
}

template <typename Index>
RowLoader loader_of(ValueType values) {
  switch (values) {
    case ValueType::boolean:
    case ValueType::uint8: return load_row<Index, uint8_t>;
    case ValueType::int8: return load_row<Index, int8_t>;
    case ValueType::int16: return load_row<Index, int16_t>;
    case ValueType::int32: return load_row<Index, int32_t>;
    case ValueType::int64: return load_row<Index, int64_t>;
    case ValueType::uint16: return load_row<Index, uint16_t>;
    case ValueType::uint32: return load_row<Index, uint32_t>;
    case ValueType::uint64: return load_row<Index, uint64_t>;
    case ValueType::float32: return load_row<Index, float>;
    case ValueType::float64: return load_row<Index, double>;
  }
  throw std::logic_error("unknown dtype");
}

}  // namespace

RowLoader choose_loader(IndexType indices, ValueType values) {
  return indices == IndexType::int32 ? loader_of<int32_t>(values) : loader_of<int64_t>(values);
}

}  // namespace scfm::host
