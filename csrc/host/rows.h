// Runs an encoder over all rows, in parallel, each thread with its own memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "encode.h"
#include "sort.h"

namespace scfm::host {

// One cell during encoding: its loaded counts, and the tokens (and values) that the encoder leaves in `out_*`.
struct Workspace {
  Cell cell;
  SortScratch sort;
  std::vector<uint32_t> order;
  std::vector<double> scores;
  std::vector<int32_t> out_tokens;
  std::vector<float> out_values;
  size_t out_size = 0;

  void reserve(size_t most) {
    if (order.size() < most) {
      order.resize(most);
      scores.resize(most);
      out_tokens.resize(most);
      out_values.resize(most);
    }
  }
};

// Calls task(0) .. task(n_tasks - 1) on up to n_threads threads, this one included; rethrows the first exception.
template <typename MakeWorker>
void run_parallel(size_t n_tasks, int n_threads, const MakeWorker& make_worker) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto work = [&] {
    try {
      auto worker = make_worker();
      for (size_t task = next++; task < n_tasks; task = next++) worker(task);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
      next = n_tasks;
    }
  };
  const size_t n_workers = std::min(static_cast<size_t>(std::max(1, n_threads)), n_tasks);
  std::vector<std::thread> threads;
  for (size_t i = 1; i < n_workers; ++i) {
    try {
      threads.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // no more threads can be started: the existing ones do the work
    }
  }
  work();
  for (auto& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Sorts a cell by token and sums the counts of each token; sums of zero are left out.
inline void merge_repeats(Workspace& work, int32_t n_tokens) {
  Cell& cell = work.cell;
  work.reserve(cell.size);
  order_by_token(cell.tokens.data(), cell.size, n_tokens, work.order.data(), work.sort);
  size_t size = 0;
  for (size_t i = 0; i < cell.size;) {
    const int32_t token = cell.tokens[work.order[i]];
    double sum = 0.0;
    for (; i < cell.size && cell.tokens[work.order[i]] == token; ++i) sum += cell.counts[work.order[i]];
    work.out_tokens[size] = token;
    work.scores[size] = sum;
    size += sum != 0.0;
  }
  std::copy_n(work.out_tokens.begin(), size, cell.tokens.begin());
  std::copy_n(work.scores.begin(), size, cell.counts.begin());
  cell.size = size;
  cell.tokens_ascend = true;
}

constexpr int64_t kRowsPerTask = 64;

enum class Order { any, by_token };

// Where each row may start in the output: one entry per row, and one for the end.
inline std::vector<size_t> plan_rows(const CsrTokens& csr, const Frame& frame, const size_t* genes_of_every_cell) {
  const size_t extra = frame.front.has_value() + frame.back.has_value();
  std::vector<size_t> starts(static_cast<size_t>(csr.n_rows) + 1, 0);
  for (int64_t row = 0; row < csr.n_rows; ++row) {
    const size_t most = genes_of_every_cell != nullptr ? *genes_of_every_cell
                                                       : static_cast<size_t>(csr.indptr[row + 1] - csr.indptr[row]);
    starts[static_cast<size_t>(row) + 1] = starts[static_cast<size_t>(row)] + std::min(most, frame.max_genes) + extra;
  }
  return starts;
}

// Closes the gaps between rows; returns the boundaries of cells.
inline std::vector<int64_t> close_gaps(const std::vector<size_t>& starts, const std::vector<size_t>& lengths,
                                       Output& out) {
  std::vector<int64_t> ends(starts.size(), 0);
  size_t end = 0;
  for (size_t row = 0; row < lengths.size(); ++row) {
    if (end != starts[row]) {
      std::memmove(out.tokens + end, out.tokens + starts[row], lengths[row] * sizeof(int32_t));
      if (out.values != nullptr) {
        std::memmove(out.values + end, out.values + starts[row], lengths[row] * sizeof(float));
      }
    }
    end += lengths[row];
    ends[row + 1] = static_cast<int64_t>(end);
  }
  return ends;
}

// Loads every row, without repeats and, if asked, in the order of tokens; lets an encoder, of which make_encoder()
// gives each thread its own, fill `out_*` from encoder(workspace, row); adds the special tokens; returns the boundaries
// of cells.
template <typename MakeEncoder>
std::vector<int64_t> encode_rows(const CsrTokens& csr, const Frame& frame, Order order,
                                 const size_t* genes_of_every_cell, const Allocate& allocate,
                                 const MakeEncoder& make_encoder) {
  const std::vector<size_t> starts = plan_rows(csr, frame, genes_of_every_cell);
  std::vector<size_t> lengths(static_cast<size_t>(csr.n_rows), 0);
  Output out = allocate(starts.back());
  const size_t n_tasks = static_cast<size_t>((csr.n_rows + kRowsPerTask - 1) / kRowsPerTask);
  run_parallel(n_tasks, frame.n_threads, [&] {
    return [&, work = Workspace{}, encode_row = make_encoder()](size_t task) mutable {
      const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
      for (int64_t row = first; row < std::min(first + kRowsPerTask, csr.n_rows); ++row) {
        csr.load(csr.indices, csr.data, csr.indptr[row], csr.indptr[row + 1], csr.token_of_column, csr.n_columns,
                 work.cell);
        const bool may_repeat = csr.may_repeat || !work.cell.columns_ascend;
        if (!work.cell.tokens_ascend && (may_repeat || order == Order::by_token)) merge_repeats(work, csr.n_tokens);
        work.reserve(work.cell.size);
        encode_row(work, row);
        size_t position = starts[static_cast<size_t>(row)];
        const auto add = [&](const std::optional<Special>& special) {
          if (!special) return;
          out.tokens[position] = special->token;
          if (out.values != nullptr) out.values[position] = special->value;
          ++position;
        };
        add(frame.front);
        std::copy_n(work.out_tokens.data(), work.out_size, out.tokens + position);
        if (out.values != nullptr) std::copy_n(work.out_values.data(), work.out_size, out.values + position);
        position += work.out_size;
        add(frame.back);
        lengths[static_cast<size_t>(row)] = position - starts[static_cast<size_t>(row)];
      }
    };
  });
  return close_gaps(starts, lengths, out);
}

}  // namespace scfm::host
