#include "tasks.h"

namespace scfm {

void run_cross_entropy(CrossEntropyProblem problem, float* grad_bias, Dtype dtype) {
  const Kernels& table = kernels(dtype);
  const int64_t n_tasks = (problem.n_rows + kCrossEntropyRows - 1) / kCrossEntropyRows;
  problem.grad_stride = (problem.n_classes + kClassStep - 1) / kClassStep * kClassStep;
  const Scratch sums = allocate(n_tasks * problem.grad_stride * static_cast<int64_t>(sizeof(float)));
  STD_TORCH_CHECK(n_tasks == 0 || sums != nullptr, "cross_entropy: there is no memory for the gradient of the bias.");
  problem.grad_bias = static_cast<float*>(sums.get());
  std::vector<Task> tasks(static_cast<size_t>(n_tasks));
  for (int64_t i = 0; i < n_tasks; i++) tasks[static_cast<size_t>(i)].query_begin = i * kCrossEntropyRows;
  run_tasks(tasks, table.cross_entropy_scratch(problem),
            [&](const Task& task, void* scratch) { table.cross_entropy(problem, task.query_begin, scratch); });
  std::fill(grad_bias, grad_bias + problem.n_classes, 0.f);
  for (int64_t i = 0; i < n_tasks; i++)
    for (int64_t j = 0; j < problem.n_classes; j++) grad_bias[j] += problem.grad_bias[i * problem.grad_stride + j];
}

}  // namespace scfm
