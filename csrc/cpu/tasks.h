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

constexpr int64_t kAllQueries = INT64_MAX;

// One task per cell, head and `queries_per_task` queries, longest first. `keep_empty` keeps cells without queries, whose keys
// get results too.
std::vector<Task> list_tasks(const Cells& cells, int64_t n_heads, int64_t queries_per_task, bool keep_empty);

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
