#include "tasks.h"

namespace scfm {

std::vector<Task> list_tasks(const Cells& cells, int64_t n_heads, int64_t queries_per_task, bool keep_empty) {
  std::vector<Task> tasks;
  for (size_t cell = 0; cell + 1 < cells.query.size(); cell++) {
    const int64_t begin = cells.query[cell], end = cells.query[cell + 1];
    Task task{};
    task.keys_are_queries = cells.keys_are_queries;
    task.key_begin = cells.key[cell];
    task.n_keys = cells.n_known.empty() ? cells.key[cell + 1] - cells.key[cell] : cells.n_known[cell];
    task.own_begin = cells.n_known.empty() ? INT64_MAX : begin + cells.n_known[cell];
    for (task.head = 0; task.head < n_heads; task.head++) {
      task.query_begin = begin;
      do {
        task.query_end = std::min(end, task.query_begin + std::min(queries_per_task, end - task.query_begin));
        if (task.query_end > task.query_begin || (keep_empty && task.n_keys > 0)) tasks.push_back(task);
        task.query_begin = task.query_end;
      } while (task.query_begin < end);
    }
  }
  // Longest first, so that no thread is left with a long task at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return (a.query_end - a.query_begin) * (a.n_keys + 1) > (b.query_end - b.query_begin) * (b.n_keys + 1);
  });
  return tasks;
}

int64_t max_queries(const std::vector<Task>& tasks) {
  int64_t most = 0;
  for (const Task& task : tasks) most = std::max(most, task.query_end - task.query_begin);
  return most;
}

}  // namespace scfm
