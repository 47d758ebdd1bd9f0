// From a batch of cells to tasks, and from tasks to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "schedule.h"

namespace scfm {

struct TaskLimits {
  int64_t queries = INT64_MAX;
  bool divide_keys = false;  // of cells with more than kUndividedKeys, into parts of at most kKeysPerTask
  bool keep_empty = false;   // also cells without queries, whose keys get results too
};

// One task per cell, head, and part of its queries or keys; longest first, parts of a cell and head next to each other.
std::vector<Task> list_tasks(const Cells& cells, int64_t n_heads, const TaskLimits& limits);

// The largest number of queries of a task.
int64_t max_queries(const std::vector<Task>& tasks);

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, FreeScratch>;

inline Scratch allocate(int64_t bytes) {
  return Scratch(std::aligned_alloc(4096, (static_cast<size_t>(bytes) + 4095) / 4096 * 4096));
}

// Each thread takes the next task until none is left. No sum crosses tasks, so the result does not depend on which thread
// takes which.
template <class Run>
void run_tasks(const std::vector<Task>& tasks, int64_t scratch_bytes, const Run& run) {
  if (tasks.empty()) return;
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const int64_t n_threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    const Scratch scratch = allocate(scratch_bytes);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i], scratch.get());
  });
  STD_TORCH_CHECK(!out_of_memory, "attention: there is no memory for ", scratch_bytes, " bytes of scratch per thread.");
}

}  // namespace scfm
