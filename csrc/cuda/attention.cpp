// The attention operators on CUDA tensors: checks, workspace and tile lists. Schemas as in ../attention.h, boundaries on the
// host; LibTorch stable ABI only. Built with SCFM_EMULATE for the tests, the same operators run on the emulated machine.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "../attention.h"
#include "place.h"
#include "tile_list.h"

namespace scfm::cuda {

const AttentionKernels* attention_kernels(Dtype dtype, int64_t head_width) {
  switch (head_width) {
    case 32: return attention_kernels_d32(dtype);
    case 64: return attention_kernels_d64(dtype);
    case 128: return attention_kernels_d128(dtype);
    default: return nullptr;
  }
}

namespace {

struct DeviceTiles {
  Tensor tensor;
  int32_t n_query_tiles, n_key_tiles;
};

bool same(const Cells& a, const Cells& b) {
  return a.query == b.query && a.key == b.key && a.n_known == b.n_known && a.n_known.empty() == b.n_known.empty();
}

// Tile lists of the last few batches, on their devices: every layer of a model needs the same one. Lists are found
// by the boundaries themselves and by stream, so that none is used before its copy has arrived.
class TileCache {
 public:
  DeviceTiles get(const Cells& cells, const Here& here, const Tensor& like, const Tensor& host_like) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& entry : entries_)
      if (entry.device == here.device() && entry.stream == here.stream() && same(entry.cells, cells)) return entry.tiles;
    const TileList list = list_tiles(cells);
    const auto n = static_cast<int64_t>(list.tiles.size());
    Tensor host = torch::stable::new_empty(host_like, {n, 8}, ScalarType::Int);
    if (n > 0) std::memcpy(host.mutable_data_ptr(), list.tiles.data(), list.tiles.size() * sizeof(Tile));
    DeviceTiles tiles{torch::stable::to(host, like.device(), /*non_blocking=*/true), list.n_query_tiles, list.n_key_tiles};
    if (entries_.size() == kKept) entries_.erase(entries_.begin());
    entries_.push_back({here.device(), here.stream(), cells, tiles});
    return tiles;
  }

 private:
  struct Entry {
    int32_t device;
    void* stream;
    Cells cells;
    DeviceTiles tiles;
  };
  static constexpr size_t kKept = 8;
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

// Never destroyed: at exit torch may be unloaded before this library.
TileCache& tile_cache() {
  static TileCache& cache = *new TileCache;
  return cache;
}

void check_tokens(const Tensor& tensor, const Tensor& like, int64_t n_tokens, const char* name) {
  STD_TORCH_CHECK(is_in_place(tensor), "attention: `", name, "` must be ", kPlaceName, ".");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), "attention: `", name,
                  "` and `q` are on different devices.");
  check_shape(tensor, like, n_tokens, name);
}

Dtype dtype_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "attention: the CUDA kernels support bfloat16 and float16.");
  return type == ScalarType::Half ? Dtype::kHalf : Dtype::kBFloat16;
}

// The kernels copy 16 bytes at a time: tensors that are not aligned to that are copied first.
Tensor on_raster(const Tensor& tensor) {
  const bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(0) % 8 == 0 &&
                    tensor.stride(1) % 8 == 0;
  if (fits || tensor.numel() == 0) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Tensors of one call: keeps what the kernels use alive, and builds the problem from it.
class Call {
 public:
  Call(const AttentionOptions& options, const Tensor& q, const Tensor& k, const Tensor& v)
      : here_(q), q_(q), n_keys_(k.size(0)) {
    check_tokens(q, q, q.size(0), "q");
    check_tokens(k, q, k.size(0), "k");
    check_tokens(v, q, k.size(0), "v");
    kernels_ = attention_kernels(dtype_of(q), q.size(2));
    STD_TORCH_CHECK(kernels_ != nullptr, "attention: the head width is ", q.size(2),
                    "; the CUDA kernels support 32, 64 and 128.");
    check(kernels_->ready(here_.device(), here_.stream()));
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(q.size(0) <= kMost && k.size(0) <= kMost, "attention: more than 2^31 - 1 tokens in one call.");
    const Cells cells = cells_of(options, q, k);
    n_cells_ = static_cast<int64_t>(cells.query.size()) - 1;
    const DeviceTiles tiles = tile_cache().get(cells, here_, q, options.cu_seqlens);
    problem_.query_tiles = static_cast<const Tile*>(read(tiles.tensor).const_data_ptr());
    problem_.key_tiles = problem_.query_tiles + tiles.n_query_tiles;
    problem_.n_query_tiles = tiles.n_query_tiles;
    problem_.n_key_tiles = tiles.n_key_tiles;
    problem_.keys_are_queries = cells.keys_are_queries;
    problem_.n_heads = static_cast<int32_t>(q.size(1));
    problem_.n_queries = q.size(0);
    problem_.scale = static_cast<float>(options.scale);
    problem_.q = read_tokens(q);
    problem_.k = read_tokens(k);
    problem_.v = read_tokens(v);
    problem_.key_bias = read_scalars(options.key_bias, n_keys_, "key_bias");
  }

  Problem& problem() { return problem_; }
  const AttentionKernels& kernels() const { return *kernels_; }
  void* stream() const { return here_.stream(); }

  Tokens read_tokens(const Tensor& tensor) {
    const Tensor& kept = read(on_raster(tensor));
    return {const_cast<void*>(kept.const_data_ptr()), kept.stride(0), kept.stride(1)};
  }

  Scalars read_scalars(const std::optional<Tensor>& t, int64_t n_tokens, const char* name) {
    if (!t) return {nullptr, 0, 0};
    const bool with_q = is_in_place(*t) && t->get_device_index() == q_.get_device_index();
    STD_TORCH_CHECK(with_q && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == n_tokens &&
                        t->size(1) == q_.size(1),
                    "attention: `", name, "` must be float32 of shape (", n_tokens, ", ", q_.size(1), ") ", kPlaceName,
                    ", the same as `q`.");
    const Tensor& kept = read(*t);
    // A tensor without elements has no address, but it was given.
    static float none;
    auto* data = const_cast<float*>(static_cast<const float*>(kept.const_data_ptr()));
    return {data == nullptr ? &none : data, kept.stride(0), kept.stride(1)};
  }

  Tensor new_tokens(int64_t n_tokens, Tokens& view) {
    Tensor tensor = write(torch::stable::new_empty(q_, {n_tokens, q_.size(1), q_.size(2)}));
    view = {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
    return tensor;
  }

  Tensor new_scalars(int64_t n_tokens, Scalars& view) {
    Tensor tensor = write(torch::stable::new_empty(q_, {n_tokens, q_.size(1)}, ScalarType::Float));
    view = {static_cast<float*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1)};
    return tensor;
  }

  // What the kernels of the backward and of the key sums pass to each other.
  void add_workspace(bool gradients) {
    const int64_t n_queries = q_.size(0), n_heads = q_.size(1);
    problem_.row_lse = workspace(n_heads * n_queries);
    problem_.row_delta = workspace(n_heads * n_queries);
    if (!gradients) return;
    problem_.grad_q_sum = workspace(n_queries * n_heads * q_.size(2));
    if (q_.scalar_type() != ScalarType::Half) return;
    problem_.bounds = workspace(4 * n_cells_ * n_heads);
    torch::stable::zero_(kept_.back());
  }

  static void check(const char* error) {
    STD_TORCH_CHECK(error == nullptr, "attention: a CUDA kernel could not run: ", error == nullptr ? "" : error);
  }

 private:
  const Tensor& read(const Tensor& tensor) {
    allow(tensor, false);
    return kept_.emplace_back(tensor);
  }
  Tensor& write(const Tensor& tensor) {
    allow(tensor, true);
    poison(kept_.emplace_back(tensor));
    return kept_.back();
  }
  float* workspace(int64_t n) {
    return static_cast<float*>(write(torch::stable::new_empty(q_, {n}, ScalarType::Float)).mutable_data_ptr());
  }

  Here here_;
  Tensor q_;
  int64_t n_keys_, n_cells_ = 0;
  Problem problem_{};
  const AttentionKernels* kernels_ = nullptr;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> attention_forward(const AttentionOptions& options, const Tensor& q, const Tensor& k,
                                             const Tensor& v) {
  Call call(options, q, k, v);
  Tensor out = call.new_tokens(q.size(0), call.problem().out);
  Tensor lse = call.new_scalars(q.size(0), call.problem().lse);
  Call::check(call.kernels().forward(call.problem(), call.stream()));
  return {out, lse};
}

// Autograd may pass an expanded gradient, whose strides are all zero.
Tensor dense_rows(const Tensor& tensor) {
  return tensor.dim() == 3 && tensor.size(2) > 1 && tensor.stride(2) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

template <bool kDeterministic>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionOptions& options, const Tensor& grad_out,
                                                              std::optional<Tensor> grad_lse, const Tensor& q,
                                                              const Tensor& k, const Tensor& v, const Tensor& out,
                                                              const Tensor& lse) {
  Call call(options, q, k, v);
  Problem& problem = call.problem();
  const Tensor grad = dense_rows(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  problem.grad_out = call.read_tokens(grad);
  problem.out = call.read_tokens(out);
  problem.lse = call.read_scalars(lse, q.size(0), "lse");
  problem.grad_lse = call.read_scalars(grad_lse, q.size(0), "grad_lse");
  Tensor grad_q = call.new_tokens(q.size(0), problem.grad_q);
  Tensor grad_k = call.new_tokens(k.size(0), problem.grad_k), grad_v = call.new_tokens(k.size(0), problem.grad_v);
  Scalars none;
  Tensor grad_bias = call.new_scalars(options.key_bias ? k.size(0) : 0, options.key_bias ? problem.key_sums : none);
  call.add_workspace(true);
  Call::check(call.kernels().backward(problem, kDeterministic, call.stream()));
  return {grad_q, grad_k, grad_v, grad_bias};
}

Tensor attention_column_sums(const AttentionOptions& options, const Tensor& q, const Tensor& k, const Tensor& lse) {
  Call call(options, q, k, k);
  call.problem().lse = call.read_scalars(lse, q.size(0), "lse");
  Tensor sums = call.new_scalars(k.size(0), call.problem().key_sums);
  call.add_workspace(false);
  Call::check(call.kernels().column_sums(call.problem(), call.stream()));
  return sums;
}

Tensor attention_deletion_effects(const AttentionOptions& options, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& out, const Tensor& lse) {
  Call call(options, q, k, v);
  Problem& problem = call.problem();
  const Tensor grad = dense_rows(grad_out);
  check_tokens(grad, q, q.size(0), "grad_out");
  check_tokens(out, q, q.size(0), "out");
  problem.grad_out = call.read_tokens(grad);
  problem.out = call.read_tokens(out);
  problem.lse = call.read_scalars(lse, q.size(0), "lse");
  Tensor effects = call.new_scalars(k.size(0), problem.key_sums);
  call.add_workspace(false);
  Call::check(call.kernels().deletion_effects(problem, call.stream()));
  return effects;
}

#ifdef SCFM_EMULATE
// The list itself, for the tests: rows as in Tile, the last column 0 for query tiles and 1 for key tiles.
Tensor tiles(const Tensor& q, const Tensor& cu_seqlens, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> n_known) {
  const Tensor& bounds_k = cu_seqlens_k ? *cu_seqlens_k : cu_seqlens;
  const int64_t n_keys = integers_of(bounds_k, "cu_seqlens_k").back();
  const Tensor k = torch::stable::new_empty(q, {n_keys, q.size(1), q.size(2)});
  TileList list = list_tiles(cells_of(q, k, cu_seqlens, cu_seqlens_k, n_known));
  for (size_t i = 0; i < list.tiles.size(); i++) list.tiles[i].unused[1] = static_cast<int32_t>(i) >= list.n_query_tiles;
  Tensor result = torch::stable::new_empty(q, {static_cast<int64_t>(list.tiles.size()), 8}, ScalarType::Int);
  if (!list.tiles.empty()) std::memcpy(result.mutable_data_ptr(), list.tiles.data(), list.tiles.size() * sizeof(Tile));
  return result;
}
#endif

}  // namespace
}  // namespace scfm::cuda

#ifdef SCFM_EMULATE
#define SCFM_LIBRARY scfm_emulated
#define SCFM_KEY CPU
STABLE_TORCH_LIBRARY_FRAGMENT(scfm_emulated, m) {
  m.def("attention_forward" SCFM_ATTENTION_FORWARD);
  m.def("attention_backward" SCFM_ATTENTION_BACKWARD);
  m.def("attention_backward_deterministic" SCFM_ATTENTION_BACKWARD);
  m.def("attention_column_sums" SCFM_ATTENTION_COLUMN_SUMS);
  m.def("attention_deletion_effects" SCFM_ATTENTION_DELETION_EFFECTS);
  m.def("tiles(Tensor q, Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(scfm_emulated, CPU, m) { m.impl("tiles", TORCH_BOX(&scfm::cuda::tiles)); }
#else
#define SCFM_LIBRARY scfm
#define SCFM_KEY CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) { m.def("attention_backward_deterministic" SCFM_ATTENTION_BACKWARD); }
#endif

STABLE_TORCH_LIBRARY_IMPL(SCFM_LIBRARY, SCFM_KEY, m) {
  m.impl("attention_forward", SCFM_BOX_ATTENTION(scfm::cuda::attention_forward));
  m.impl("attention_backward", SCFM_BOX_ATTENTION(scfm::cuda::attention_backward<false>));
  m.impl("attention_backward_deterministic", SCFM_BOX_ATTENTION(scfm::cuda::attention_backward<true>));
  m.impl("attention_column_sums", SCFM_BOX_ATTENTION(scfm::cuda::attention_column_sums));
  m.impl("attention_deletion_effects", SCFM_BOX_ATTENTION(scfm::cuda::attention_deletion_effects));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() { return PyModule_Create(&module); }
