#include "tasks.h"

namespace scfm {

void run_linear(const LinearProblem& problem, Dtype dtype) {
  if (problem.n_rows == 0 || problem.n_outputs == 0) return;
  const Kernels& table = kernels(dtype);
  const int64_t n_tasks = (problem.n_rows + kLinearRows - 1) / kLinearRows;
  const int64_t n_threads = std::min<int64_t>(torch::stable::get_num_threads(), n_tasks);
  const Scratch panels = allocate(table.linear_panel_bytes(problem));
  std::vector<Scratch> scratch;
  for (int64_t i = 0; i < n_threads; i++) scratch.push_back(allocate(table.linear_scratch(problem)));
  STD_TORCH_CHECK(panels && std::all_of(scratch.begin(), scratch.end(), [](const auto& p) { return p != nullptr; }),
                  "linear: there is no memory to pack a weight of ", problem.n_outputs, " x ", problem.n_inputs, ".");
  table.pack_weight(problem, static_cast<uint32_t*>(panels.get()), scratch[0].get());
  std::atomic<int64_t> next{0}, next_scratch{0};
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) {
      void* mine = scratch[static_cast<size_t>(next_scratch++)].get();
      for (int64_t task = next++; task < n_tasks; task = next++)
        table.linear(problem, task * kLinearRows, static_cast<const uint32_t*>(panels.get()), mine);
    }
  });
}

}  // namespace scfm
