#include <mutex>

#include "tasks.h"

namespace scfm {

void run_attention_forward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const Kernels& table = kernels(dtype);
  const auto tasks = list_tasks(cells, n_heads, {kQueriesPerTask, false, false});
  run_tasks(tasks, table.attention_forward_scratch(problem, max_queries(tasks)),
            [&](const Task& task, void* scratch) { table.attention_forward(problem, task, scratch); });
}

namespace {

// A task holds all queries of a cell and head, so what is summed for a key is complete. Long cells have several tasks, each with
// a part of the keys. The limit is a constant: the result of a cell depends neither on other cells nor on threads.
std::vector<Task> tasks_over_keys(const Cells& cells, int64_t n_heads) {
  return list_tasks(cells, n_heads, {INT64_MAX, true, true});
}

void run_over_keys(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, const Kernels& table,
                   void (*kernel)(const AttentionProblem&, const Task&, void*)) {
  const auto tasks = tasks_over_keys(cells, n_heads);
  run_tasks(tasks, table.attention_backward_scratch(problem, max_queries(tasks)),
            [&](const Task& task, void* scratch) { kernel(problem, task, scratch); });
}

// What the parts of one cell and head share, from the first that starts to the last that ends.
struct Joint {
  std::once_flag allocated;
  Scratch grad_query;
  std::atomic<int64_t> n_done{0};
};

// Runs one part; the last one to end adds up the gradients of the queries. Returns whether there was memory for them.
bool run_part(const AttentionProblem& problem, Task task, const Kernels& table, Joint& joint, void* scratch) {
  task.grad_query_size = (task.query_end - task.query_begin + 63) / 64 * 64 * ((problem.head_dim + 31) / 32 * 32);
  std::call_once(joint.allocated, [&] {
    joint.grad_query = allocate(task.n_parts * task.grad_query_size * static_cast<int64_t>(sizeof(float)));
  });
  task.grad_query = static_cast<float*>(joint.grad_query.get());
  if (task.grad_query == nullptr) return false;
  table.attention_backward(problem, task, scratch);
  if (++joint.n_done < task.n_parts) return true;
  table.join_attention_backward(problem, task, scratch);
  joint.grad_query.reset();
  return true;
}

}  // namespace

void run_attention_backward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const Kernels& table = kernels(dtype);
  const auto tasks = tasks_over_keys(cells, n_heads);
  const auto joints = std::make_unique<Joint[]>(tasks.size());  // at the first part of each cell and head
  std::atomic<bool> out_of_memory{false};
  run_tasks(tasks, table.attention_backward_scratch(problem, max_queries(tasks)), [&](const Task& task, void* scratch) {
    if (task.n_parts == 1)
      table.attention_backward(problem, task, scratch);
    else if (!run_part(problem, task, table, joints[static_cast<size_t>(&task - tasks.data() - task.part)], scratch))
      out_of_memory = true;
  });
  STD_TORCH_CHECK(!out_of_memory, "attention: there is no memory for the gradients of the queries.");
}

void run_column_sums(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  run_over_keys(problem, cells, n_heads, kernels(dtype), kernels(dtype).column_sums);
}

void run_deletion_effects(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  run_over_keys(problem, cells, n_heads, kernels(dtype), kernels(dtype).deletion_effects);
}

}  // namespace scfm
