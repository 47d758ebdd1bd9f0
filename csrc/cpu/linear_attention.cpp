#include "tasks.h"

namespace scfm {

void run_linear_attention_forward(const LinearAttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const Kernels& table = kernels(dtype);
  run_tasks(list_tasks(cells, n_heads, {}), table.linear_attention_forward_scratch(problem),
            [&](const Task& task, void* scratch) { table.linear_attention_forward(problem, task, scratch); });
}

void run_linear_attention_backward(const LinearAttentionProblem& problem, const Cells& cells, int64_t n_heads,
                                   Dtype dtype) {
  const Kernels& table = kernels(dtype);
  run_tasks(list_tasks(cells, n_heads, {INT64_MAX, false, true}), table.linear_attention_backward_scratch(problem),
            [&](const Task& task, void* scratch) { table.linear_attention_backward(problem, task, scratch); });
}

}  // namespace scfm
