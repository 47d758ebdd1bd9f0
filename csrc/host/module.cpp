// scfm._host: the encoders for Python. NumPy arrays in, without a copy; NumPy arrays out; without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "encode.h"
#include "rows.h"

namespace py = pybind11;

namespace scfm::host {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

ValueType value_type(const py::array& data) {
  const char kind = data.dtype().kind();
  const auto size = data.itemsize();
  const auto by_size = [&](ValueType one, ValueType two, ValueType four, ValueType eight) {
    return size == 1 ? one : size == 2 ? two : size == 4 ? four : eight;
  };
  if (kind == 'b') return ValueType::boolean;
  if (kind == 'i') return by_size(ValueType::int8, ValueType::int16, ValueType::int32, ValueType::int64);
  if (kind == 'u') return by_size(ValueType::uint8, ValueType::uint16, ValueType::uint32, ValueType::uint64);
  if (kind == 'f' && size == 4) return ValueType::float32;
  if (kind == 'f' && size == 8) return ValueType::float64;
  throw std::invalid_argument("data must be integers, float32, float64 or booleans");
}

void require_flat(const py::array& array, const char* name) {
  const bool native = array.dtype().attr("isnative").cast<bool>();
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style) || !native) {
    throw std::invalid_argument(std::string(name) + " must be one contiguous row in native byte order");
  }
}

// Row pointers must start at 0, never decrease and end at the number of entries: a matrix of more than 2^31 entries whose
// int32 pointers have wrapped is an error here, and no row reaches outside the arrays.
void check_indptr(const Array<int64_t>& indptr, py::ssize_t n_entries) {
  const auto pointer = indptr.unchecked<1>();
  const py::ssize_t n = pointer.shape(0);
  bool rising = n >= 1 && pointer(0) == 0 && pointer(n - 1) == n_entries;
  for (py::ssize_t i = 1; rising && i < n; ++i) rising = pointer(i - 1) <= pointer(i);
  if (!rising) {
    throw std::invalid_argument("row pointers must rise from 0 to the number of entries, " + std::to_string(n_entries));
  }
}

CsrTokens view_csr(const Array<int64_t>& indptr, const py::array& indices, const py::array& data,
                   const Array<int32_t>& token_of_column, int32_t n_tokens, bool may_repeat) {
  require_flat(indices, "indices");
  require_flat(data, "data");
  if (indices.dtype().kind() != 'i' || (indices.itemsize() != 4 && indices.itemsize() != 8)) {
    throw std::invalid_argument("indices must be int32 or int64");
  }
  if (indices.size() != data.size()) throw std::invalid_argument("indices and data differ in length");
  check_indptr(indptr, data.size());
  const auto tokens = token_of_column.unchecked<1>();
  for (py::ssize_t column = 0; column < tokens.shape(0); ++column) {
    if (tokens(column) >= n_tokens) throw std::invalid_argument("token_of_column points outside the vocabulary");
  }
  const IndexType index_type = indices.itemsize() == 4 ? IndexType::int32 : IndexType::int64;
  return {indptr.data(), indices.data(), data.data(), choose_loader(index_type, value_type(data)),
          indptr.size() - 1, token_of_column.size(), token_of_column.data(), n_tokens, may_repeat};
}

// A special token as Python passes it: None or (token, value).
std::optional<Special> special_of(const py::object& special) {
  if (special.is_none()) return std::nullopt;
  const auto pair = special.cast<std::pair<int32_t, float>>();
  return Special{pair.first, pair.second};
}

// Runs an encoder without the GIL into new arrays; returns (cu_seqlens int64, tokens int32, values float32 or None).
template <typename Encode>
py::tuple run_encoder(bool with_values, const Encode& encode) {
  Array<int32_t> tokens(0);
  py::object values = py::none();
  const auto allocate = [&](size_t size) {
    const py::gil_scoped_acquire acquire;
    tokens = Array<int32_t>(static_cast<py::ssize_t>(size));
    if (!with_values) return Output{tokens.mutable_data(), nullptr};
    Array<float> new_values(static_cast<py::ssize_t>(size));
    float* data = new_values.mutable_data();
    values = std::move(new_values);
    return Output{tokens.mutable_data(), data};
  };
  Boundaries ends;
  {
    const py::gil_scoped_release release;
    ends = encode(allocate);
  }
  // Frees the memory that was not needed; in place, since the block only shrinks.
  tokens.attr("resize")(ends.back(), py::arg("refcheck") = false);
  if (with_values) values.attr("resize")(ends.back(), py::arg("refcheck") = false);
  return py::make_tuple(Array<int64_t>(static_cast<py::ssize_t>(ends.size()), ends.data()), tokens, values);
}

template <typename T>
const T* data_or_null(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

struct PyFrame {
  size_t max_genes;
  py::object front, back;
  int n_threads;
  Frame frame() const { return {max_genes, special_of(front), special_of(back), n_threads}; }
};

py::tuple rank(const Array<int64_t>& indptr, const py::array& indices, const py::array& data,
               const Array<int32_t>& token_of_column, bool may_repeat, const PyFrame& settings,
               const Array<double>& medians) {
  const auto csr = view_csr(indptr, indices, data, token_of_column, static_cast<int32_t>(medians.size()), may_repeat);
  const Frame frame = settings.frame();
  const double* median_of = medians.data();
  return run_encoder(false, [&](const Allocate& allocate) { return encode_rank(csr, frame, median_of, allocate); });
}

py::tuple bin(const Array<int64_t>& indptr, const py::array& indices, const py::array& data,
              const Array<int32_t>& token_of_column, bool may_repeat, const PyFrame& settings, int32_t n_tokens,
              const Array<double>& quantiles, const std::optional<Array<double>>& unit, uint64_t draw,
              const std::optional<Array<int32_t>>& zero_tokens) {
  const auto csr = view_csr(indptr, indices, data, token_of_column, n_tokens, may_repeat);
  if (unit && unit->size() != n_tokens) throw std::invalid_argument("unit must have one number a token");
  const Frame frame = settings.frame();
  const BinRule rule{quantiles.data(), static_cast<size_t>(quantiles.size()), data_or_null(unit), draw,
                     data_or_null(zero_tokens), zero_tokens ? static_cast<size_t>(zero_tokens->size()) : 0};
  return run_encoder(true, [&](const Allocate& allocate) { return encode_bin(csr, frame, rule, allocate); });
}

py::tuple bucket(const Array<int64_t>& indptr, const py::array& indices, const py::array& data,
                 const Array<int32_t>& token_of_column, bool may_repeat, const PyFrame& settings, int32_t n_tokens,
                 double target_sum, int n_buckets, const std::optional<Array<double>>& totals,
                 const std::optional<Array<int32_t>>& zero_tokens) {
  const auto csr = view_csr(indptr, indices, data, token_of_column, n_tokens, may_repeat);
  if (totals && totals->size() != csr.n_rows) throw std::invalid_argument("totals must have one number per row");
  const Frame frame = settings.frame();
  const BucketRule rule{target_sum, n_buckets, data_or_null(totals), data_or_null(zero_tokens),
                        zero_tokens ? static_cast<size_t>(zero_tokens->size()) : 0};
  return run_encoder(true, [&](const Allocate& allocate) { return encode_bucket(csr, frame, rule, allocate); });
}

template <typename T>
double sum_of(const T* values, int64_t begin, int64_t end) {
  // Four separate sums; exact for counts in any order.
  double sums[4] = {};
  int64_t position = begin;
  for (; position + 4 <= end; position += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += static_cast<double>(values[position + lane]);
  }
  for (; position < end; ++position) sums[0] += static_cast<double>(values[position]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

Array<double> row_totals(const Array<int64_t>& indptr, const py::array& data, int n_threads) {
  require_flat(data, "data");
  check_indptr(indptr, data.size());
  const ValueType type = value_type(data);
  Array<double> totals(indptr.size() - 1);
  const int64_t* pointer = indptr.data();
  double* total = totals.mutable_data();
  const int64_t n_rows = indptr.size() - 1;
  const auto sum_rows = [&](const auto* values) {
    run_parallel(static_cast<size_t>((n_rows + kRowsPerTask - 1) / kRowsPerTask), n_threads, [&] {
      return [&](size_t task) {
        const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
        for (int64_t row = first; row < std::min(first + kRowsPerTask, n_rows); ++row) {
          total[row] = sum_of(values, pointer[row], pointer[row + 1]);
        }
      };
    });
  };
  const void* values = data.data();
  const py::gil_scoped_release release;
  switch (type) {
    case ValueType::boolean:
    case ValueType::uint8: sum_rows(static_cast<const uint8_t*>(values)); break;
    case ValueType::int8: sum_rows(static_cast<const int8_t*>(values)); break;
    case ValueType::int16: sum_rows(static_cast<const int16_t*>(values)); break;
    case ValueType::int32: sum_rows(static_cast<const int32_t*>(values)); break;
    case ValueType::int64: sum_rows(static_cast<const int64_t*>(values)); break;
    case ValueType::uint16: sum_rows(static_cast<const uint16_t*>(values)); break;
    case ValueType::uint32: sum_rows(static_cast<const uint32_t*>(values)); break;
    case ValueType::uint64: sum_rows(static_cast<const uint64_t*>(values)); break;
    case ValueType::float32: sum_rows(static_cast<const float*>(values)); break;
    case ValueType::float64: sum_rows(static_cast<const double*>(values)); break;
  }
  return totals;
}

// Whether a finite number is not whole. From 2^23 (float) or 2^52 (double) on, all are.
inline bool is_fraction(float value) {
  return std::fabs(value) < 0x1p23f && value != static_cast<float>(static_cast<int32_t>(value));
}
inline bool is_fraction(double value) {
  return std::fabs(value) < 0x1p52 && value != static_cast<double>(static_cast<int64_t>(value));
}

// Smallest and largest of some numbers, and how many are NaN or fractions.
template <typename T>
struct Survey {
  T low = std::numeric_limits<T>::infinity(), high = -std::numeric_limits<T>::infinity();
  int64_t n_nan = 0, n_fractions = 0;

  // Examines `size` numbers, in separate lanes, so that the compiler can vectorize.
  void look(const T* values, size_t size) {
    constexpr size_t lanes = 16;
    // Adding it rounds to a whole number: 1.5 x 2^(bits of the mantissa).
    constexpr T round = static_cast<T>(uint64_t{3} << (std::numeric_limits<T>::digits - 2));
    T lows[lanes], highs[lanes], excess[lanes] = {};
    std::fill_n(lows, lanes, low);
    std::fill_n(highs, lanes, high);
    const auto look_at = [&](T value, size_t lane) {
      lows[lane] = value < lows[lane] ? value : lows[lane];
      highs[lane] = value > highs[lane] ? value : highs[lane];
      excess[lane] += std::fabs((value + round) - round - value);
    };
    size_t i = 0;
    for (; i + lanes <= size; i += lanes) {
      for (size_t lane = 0; lane < lanes; ++lane) look_at(values[i + lane], lane);
    }
    for (; i < size; ++i) look_at(values[i], 0);
    low = *std::min_element(lows, lows + lanes);
    high = *std::max_element(highs, highs + lanes);
    bool whole = true;
    for (const T lane : excess) whole &= lane == T{0};
    if (whole) return;  // as counts are
    for (i = 0; i < size; ++i) {
      n_nan += values[i] != values[i];
      n_fractions += is_fraction(values[i]);
    }
  }
};

template <typename T>
py::tuple survey(const Array<T>& array, int n_threads) {
  constexpr size_t piece = 1 << 16;
  const T* values = array.data();
  const size_t size = static_cast<size_t>(array.size());
  std::vector<Survey<T>> surveys((size + piece - 1) / piece);
  {
    const py::gil_scoped_release release;
    run_parallel(surveys.size(), n_threads, [&] {
      return [&](size_t i) { surveys[i].look(values + i * piece, std::min(piece, size - i * piece)); };
    });
  }
  Survey<T> all;
  for (const auto& part : surveys) {
    all.low = std::min(all.low, part.low);
    all.high = std::max(all.high, part.high);
    all.n_nan += part.n_nan;
    all.n_fractions += part.n_fractions;
  }
  if (all.n_nan > 0) all.low = all.high = std::numeric_limits<T>::quiet_NaN();
  return py::make_tuple(static_cast<double>(all.low), static_cast<double>(all.high), all.n_fractions + all.n_nan);
}

}  // namespace
}  // namespace scfm::host

PYBIND11_MODULE(_host, module) {
  using namespace scfm::host;
  module.doc() = "Compiled encoders; scfm.encoding has the same in NumPy, with documentation.";
  py::class_<PyFrame>(module, "Frame")
      .def(py::init([](size_t max_genes, py::object front, py::object back, int n_threads) {
             return PyFrame{max_genes, std::move(front), std::move(back), n_threads};
           }),
           py::kw_only(), py::arg("max_genes"), py::arg("front"), py::arg("back"), py::arg("n_threads"));
  const auto csr_doc = "Encode CSR rows; returns cu_seqlens, tokens and values.";
  module.def("encode_rank", &rank, csr_doc, py::arg("indptr"), py::arg("indices").noconvert(),
             py::arg("data").noconvert(), py::arg("token_of_column"), py::arg("may_repeat"), py::arg("frame"),
             py::arg("medians"));
  module.def("encode_bin", &bin, csr_doc, py::arg("indptr"), py::arg("indices").noconvert(),
             py::arg("data").noconvert(), py::arg("token_of_column"), py::arg("may_repeat"), py::arg("frame"),
             py::arg("n_tokens"), py::arg("quantiles"), py::arg("unit").none(true), py::arg("draw"),
             py::arg("zero_tokens").none(true));
  module.def("encode_bucket", &bucket, csr_doc, py::arg("indptr"), py::arg("indices").noconvert(),
             py::arg("data").noconvert(), py::arg("token_of_column"), py::arg("may_repeat"), py::arg("frame"),
             py::arg("n_tokens"), py::arg("target_sum"), py::arg("n_buckets"), py::arg("totals").none(true),
             py::arg("zero_tokens").none(true));
  module.def("row_totals", &row_totals, "Sum of each CSR row in double.", py::arg("indptr"),
             py::arg("data").noconvert(), py::arg("n_threads"));
  module.def("survey", &survey<float>, "Smallest, largest, number of fractions.", py::arg("values").noconvert(),
             py::arg("n_threads"));
  module.def("survey", &survey<double>, "Smallest, largest, number of fractions.", py::arg("values").noconvert(),
             py::arg("n_threads"));
}
