#include "tasks.h"

namespace scfm {

namespace {

// Divides a task that has all queries and keys of one cell and head.
void divide(Task task, const TaskLimits& limits, std::vector<Task>& tasks) {
  const int64_t query_end = task.query_end, n_keys = task.n_keys, key_begin = task.key_begin;
  int64_t keys = n_keys;
  task.n_parts = 1;
  if (limits.divide_keys && n_keys > kUndividedKeys) {
    task.n_parts = (n_keys + kKeysPerTask - 1) / kKeysPerTask;
    const int64_t step = task.n_parts * kKeysOfBlocks;
    keys = (n_keys + step - 1) / step * kKeysOfBlocks;  // parts of one size, the last one with what is left
  }
  do {
    task.query_end = std::min(query_end, task.query_begin + std::min(limits.queries, query_end - task.query_begin));
    task.work = (task.query_end - task.query_begin) * (keys + 1);  // the same for all parts, so that they stay together
    for (task.part = 0; task.part < task.n_parts; task.part++) {
      task.key_begin = key_begin + task.part * keys;
      task.n_keys = std::min(keys, n_keys - task.part * keys);
      if (task.query_end > task.query_begin || (limits.keep_empty && task.n_keys > 0)) tasks.push_back(task);
    }
    task.query_begin = task.query_end;
  } while (task.query_begin < query_end);
}

}  // namespace

std::vector<Task> list_tasks(const Cells& cells, int64_t n_heads, const TaskLimits& limits) {
  std::vector<Task> tasks;
  for (size_t cell = 0; cell + 1 < cells.query.size(); cell++) {
    Task task{};
    task.query_begin = cells.query[cell];
    task.query_end = cells.query[cell + 1];
    task.keys_are_queries = cells.keys_are_queries;
    task.key_begin = cells.key[cell];
    task.n_keys = cells.n_known.empty() ? cells.key[cell + 1] - cells.key[cell] : cells.n_known[cell];
    task.own_begin = cells.n_known.empty() ? INT64_MAX : task.query_begin + cells.n_known[cell];
    for (task.head = 0; task.head < n_heads; task.head++) divide(task, limits, tasks);
  }
  // Longest first, so that no thread is left with a long task at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  return tasks;
}

int64_t max_queries(const std::vector<Task>& tasks) {
  int64_t most = 0;
  for (const Task& task : tasks) most = std::max(most, task.query_end - task.query_begin);
  return most;
}

}  // namespace scfm
