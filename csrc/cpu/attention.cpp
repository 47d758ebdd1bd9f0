#include "tasks.h"

namespace scfm {

void run_attention_forward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const Kernels& table = kernels(dtype);
  const auto tasks = list_tasks(cells, n_heads, kQueriesPerTask, false);
  run_tasks(tasks, table.attention_forward_scratch(problem, max_queries(tasks)),
            [&](const Task& task, void* scratch) { table.attention_forward(problem, task, scratch); });
}

namespace {

// A task holds all queries of a cell and head, so what is summed for a key is complete.
void run_over_keys(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, const Kernels& table,
                   void (*kernel)(const AttentionProblem&, const Task&, void*)) {
  const auto tasks = list_tasks(cells, n_heads, kAllQueries, true);
  run_tasks(tasks, table.attention_backward_scratch(problem, max_queries(tasks)),
            [&](const Task& task, void* scratch) { kernel(problem, task, scratch); });
}

}  // namespace

void run_attention_backward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  run_over_keys(problem, cells, n_heads, kernels(dtype), kernels(dtype).attention_backward);
}

void run_column_sums(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  run_over_keys(problem, cells, n_heads, kernels(dtype), kernels(dtype).column_sums);
}

void run_deletion_effects(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  run_over_keys(problem, cells, n_heads, kernels(dtype), kernels(dtype).deletion_effects);
}

}  // namespace scfm
