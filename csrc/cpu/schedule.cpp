#include "schedule.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>

#include "isa.h"

namespace scfm {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::vector<AttentionTask> list_tasks(const Cells& cells, int64_t n_heads, int64_t queries_per_task, bool keep_empty) {
  std::vector<AttentionTask> tasks;
  for (size_t cell = 0; cell + 1 < cells.query.size(); cell++) {
    const int64_t begin = cells.query[cell], end = cells.query[cell + 1];
    AttentionTask task{};
    task.keys_are_queries = cells.keys_are_queries;
    task.key_begin = cells.key[cell];
    task.n_keys = cells.n_known.empty() ? cells.key[cell + 1] - cells.key[cell] : cells.n_known[cell];
    task.own_begin = cells.n_known.empty() ? std::numeric_limits<int64_t>::max() : begin + cells.n_known[cell];
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
  std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) {
    return (a.query_end - a.query_begin) * (a.n_keys + 1) > (b.query_end - b.query_begin) * (b.n_keys + 1);
  });
  return tasks;
}

// Each thread takes the next task until none is left. No sum crosses tasks, so who takes which does not show.
template <class Run>
void run_tasks(const std::vector<AttentionTask>& tasks, int64_t scratch_bytes, const Run& run) {
  if (tasks.empty()) return;
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const int64_t n_threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  const size_t bytes = (static_cast<size_t>(scratch_bytes) + 4095) / 4096 * 4096;
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    std::unique_ptr<void, Free> scratch(std::aligned_alloc(4096, bytes));
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i], scratch.get());
  });
  STD_TORCH_CHECK(!out_of_memory, "attention: no memory for ", bytes, " bytes of scratch for each thread.");
}

int64_t longest(const std::vector<AttentionTask>& tasks) {
  int64_t longest = 0;
  for (const AttentionTask& task : tasks) longest = std::max(longest, task.query_end - task.query_begin);
  return longest;
}

}  // namespace

const AttentionKernels& attention_kernels(Dtype dtype) {
  const AttentionKernels* kernels = nullptr;
  switch (active_isa()) {
#if defined(SCFM_HAVE_AMX)
    case Isa::kAmx:
      kernels = attention_kernels_amx(dtype);
      if (kernels != nullptr) break;
      [[fallthrough]];
#endif
#if defined(SCFM_HAVE_AVX512_BF16)
    case Isa::kAvx512Bf16:
      kernels = attention_kernels_avx512_bf16(dtype);
      if (kernels != nullptr) break;
      [[fallthrough]];
#endif
#if defined(SCFM_HAVE_AVX512)
    case Isa::kAvx512:
      kernels = attention_kernels_avx512(dtype);
      break;
#endif
#if defined(SCFM_HAVE_AVX2)
    case Isa::kAvx2:
      kernels = attention_kernels_avx2(dtype);
      break;
#endif
    default:
      kernels = attention_kernels_portable(dtype);
  }
  return *kernels;
}

double peak_gflops(Dtype dtype) {
  using Clock = std::chrono::steady_clock;
  double best = 0.0;
  for (int attempt = 0; attempt < 5; attempt++) {
    const auto start = Clock::now();
    const int64_t operations = attention_kernels(dtype).burn(200000);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(operations) / seconds / 1e9);
  }
  return best;
}

void run_attention_forward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  const auto tasks = list_tasks(cells, n_heads, kQueriesPerTask, false);
  run_tasks(tasks, kernels.forward_scratch(problem, longest(tasks)),
            [&](const AttentionTask& task, void* scratch) { kernels.forward(problem, task, scratch); });
}

namespace {

using Kernel = void (*)(const AttentionProblem&, const AttentionTask&, void*);

// Tasks that hold all queries of a cell and head, so that what they sum up for a key is complete.
void run_whole_cells(const AttentionProblem& problem, const Cells& cells, int64_t n_heads,
                     const AttentionKernels& kernels, Kernel kernel) {
  const auto tasks = list_tasks(cells, n_heads, std::numeric_limits<int64_t>::max(), true);
  run_tasks(tasks, kernels.backward_scratch(problem, longest(tasks)),
            [&](const AttentionTask& task, void* scratch) { kernel(problem, task, scratch); });
}

}  // namespace

void run_attention_backward(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  run_whole_cells(problem, cells, n_heads, kernels, kernels.backward);
}

void run_column_sums(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  run_whole_cells(problem, cells, n_heads, kernels, kernels.column_sums);
}

void run_deletion_effects(const AttentionProblem& problem, const Cells& cells, int64_t n_heads, Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  run_whole_cells(problem, cells, n_heads, kernels, kernels.deletion_effects);
}

void run_linear_attention_forward(const LinearAttentionProblem& problem, const Cells& cells, int64_t n_heads,
                                  Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  const auto tasks = list_tasks(cells, n_heads, std::numeric_limits<int64_t>::max(), false);
  run_tasks(tasks, kernels.linear_attention_scratch(problem),
            [&](const AttentionTask& task, void* scratch) { kernels.linear_attention_forward(problem, task, scratch); });
}

void run_linear_attention_backward(const LinearAttentionProblem& problem, const Cells& cells, int64_t n_heads,
                                   Dtype dtype) {
  const AttentionKernels& kernels = attention_kernels(dtype);
  const auto tasks = list_tasks(cells, n_heads, std::numeric_limits<int64_t>::max(), true);
  run_tasks(tasks, kernels.linear_attention_backward_scratch(problem),
            [&](const AttentionTask& task, void* scratch) { kernels.linear_attention_backward(problem, task, scratch); });
}

void run_linear(const LinearProblem& problem, Dtype dtype) {
  if (problem.n_rows == 0 || problem.n_outputs == 0) return;
  const AttentionKernels& kernels = attention_kernels(dtype);
  const auto allocate = [](int64_t bytes) {
    return std::unique_ptr<void, Free>(std::aligned_alloc(4096, (static_cast<size_t>(bytes) + 4095) / 4096 * 4096));
  };
  const int64_t n_tasks = (problem.n_rows + kLinearRows - 1) / kLinearRows;
  const int64_t n_threads = std::min<int64_t>(torch::stable::get_num_threads(), n_tasks);
  const auto panels = allocate(kernels.linear_panel_bytes(problem));
  std::vector<std::unique_ptr<void, Free>> scratch;
  for (int64_t i = 0; i < n_threads; i++) scratch.push_back(allocate(kernels.linear_scratch(problem)));
  STD_TORCH_CHECK(panels && std::all_of(scratch.begin(), scratch.end(), [](const auto& p) { return p != nullptr; }),
                  "linear: no memory to pack a weight of ", problem.n_outputs, " x ", problem.n_inputs, ".");
  kernels.pack_weight(problem, static_cast<uint32_t*>(panels.get()), scratch[0].get());
  std::atomic<int64_t> next{0}, next_scratch{0};
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) {
      void* mine = scratch[static_cast<size_t>(next_scratch++)].get();
      for (int64_t task = next++; task < n_tasks; task = next++)
        kernels.linear(problem, task * kLinearRows, static_cast<const uint32_t*>(panels.get()), mine);
    }
  });
}

}  // namespace scfm
