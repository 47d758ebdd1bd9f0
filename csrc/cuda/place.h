// Where the operators run: on a GPU, or in the emulator for tests.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#ifdef SCFM_EMULATE
#include "emulate/device.h"
#else
#include <dlfcn.h>
#endif

namespace scfm::cuda {

using torch::stable::Tensor;

#ifdef SCFM_EMULATE

inline bool is_in_place(const Tensor& tensor) { return tensor.is_cpu(); }
constexpr const char* kPlaceName = "on the CPU";

// Allows kernels to access memory from now on: everything between a tensor's first and last element.
inline void allow(const Tensor& tensor, bool writable) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); axis++) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  emulate::allow(tensor.const_data_ptr(), (last + 1) * static_cast<int64_t>(tensor.element_size()), writable);
}
// Fills with NaN what a kernel must write.
inline void poison(Tensor& tensor) {
  std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(tensor.numel()) * tensor.element_size());
}

class Here {
 public:
  explicit Here(const Tensor&) {}
  ~Here() { emulate::forbid_all(); }
  void* stream() const { return nullptr; }
  int32_t device() const { return 0; }
};

#else

inline bool is_in_place(const Tensor& tensor) { return tensor.is_cuda(); }
constexpr const char* kPlaceName = "on a CUDA device";
inline void allow(const Tensor&, bool) {}
inline void poison(Tensor&) {}

// Makes the tensor's device the current one, and holds torch's current stream on it. The function for the stream is found in the
// loaded torch by name: this library links no CUDA part of torch, and builds with a torch that has none.
class Here {
 public:
  explicit Here(const Tensor& tensor) : device_(index_of(tensor)), guard_(device_) {
    using Get = int32_t (*)(int32_t, void**);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Get>(library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(get != nullptr, "attention: the loaded torch has no CUDA streams; install a CUDA build of torch.");
    STD_TORCH_CHECK(get(device_, &stream_) == 0, "attention: torch did not tell its current CUDA stream.");
  }
  void* stream() const { return stream_; }
  int32_t device() const { return device_; }

 private:
  static int32_t index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(is_in_place(tensor), "attention: `q` must be ", kPlaceName, ".");
    return static_cast<int32_t>(tensor.get_device_index());
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace scfm::cuda
