// Runs an encoder over all rows, in parallel, each thread with its own memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "encode.h"
#include "sort.h"

namespace scfm::host {

// One cell under way: its loaded counts, and the tokens (and values) that the encoder leaves in `out_*`.
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
      break;  // no more threads to be had: the ones there are do the work
    }
  }
  work();
  for (auto& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Sorts a cell by token and sums what stands for one token; sums of zero stay out.
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

constexpr int64_t kRowsPerTask = 128;

enum class Order { any, by_token };

// Loads every row, without repeats and, if asked, in the order of tokens; lets an encoder, of which make_encoder() gives
// each thread its own, fill `out_*` from encoder(workspace, row); and adds the special tokens.
template <typename MakeEncoder>
Encoded encode_rows(const CsrTokens& csr, const Frame& frame, Order order, bool with_values,
                    const MakeEncoder& make_encoder) {
  const size_t n_tasks = static_cast<size_t>((csr.n_rows + kRowsPerTask - 1) / kRowsPerTask);
  Encoded encoded{std::vector<std::vector<int32_t>>(n_tasks), std::vector<std::vector<float>>(n_tasks),
                  std::vector<int64_t>(static_cast<size_t>(csr.n_rows))};
  run_parallel(n_tasks, frame.n_threads, [&] {
    return [&, work = Workspace{}, encode_row = make_encoder()](size_t task) mutable {
      auto& tokens = encoded.tokens[task];
      auto& values = encoded.values[task];
      const auto add = [&](const std::optional<Special>& special) {
        if (!special) return;
        tokens.push_back(special->token);
        if (with_values) values.push_back(special->value);
      };
      const int64_t first = static_cast<int64_t>(task) * kRowsPerTask;
      for (int64_t row = first; row < std::min(first + kRowsPerTask, csr.n_rows); ++row) {
        const size_t start = tokens.size();
        csr.load(csr.indices, csr.data, csr.indptr[row], csr.indptr[row + 1], csr.token_of_column, csr.n_columns,
                 work.cell);
        const bool may_repeat = csr.may_repeat || !work.cell.columns_ascend;
        if (!work.cell.tokens_ascend && (may_repeat || order == Order::by_token)) merge_repeats(work, csr.n_tokens);
        work.reserve(work.cell.size);
        encode_row(work, row);
        add(frame.front);
        tokens.insert(tokens.end(), work.out_tokens.begin(),
                      work.out_tokens.begin() + static_cast<std::ptrdiff_t>(work.out_size));
        if (with_values) {
          values.insert(values.end(), work.out_values.begin(),
                        work.out_values.begin() + static_cast<std::ptrdiff_t>(work.out_size));
        }
        add(frame.back);
        encoded.lengths[static_cast<size_t>(row)] = static_cast<int64_t>(tokens.size() - start);
      }
    };
  });
  return encoded;
}

}  // namespace scfm::host
