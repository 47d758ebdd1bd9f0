// Starting a kernel, on a GPU or in the emulator. Each launch returns null or an error message.
#pragma once

#include "attention.h"
#include "device.h"

namespace scfm::cuda {

#ifdef SCFM_EMULATE
inline const char* ready(int32_t, void*) { return nullptr; }

template <auto kKernel>
const char* launch(int64_t blocks, int threads, int shared_bytes, void*, const Problem& problem) {
  return emulate::launch(blocks, threads, shared_bytes, [&] { kKernel(problem); });
}
#else
// The runtime also keeps the error for the next call that asks: clear it, or the next launch would report it as its own.
inline const char* in_words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

inline const char* ready(int32_t device, void* stream) {
  // This library has its own CUDA runtime, which must use the same device as torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return in_words(error);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (error != cudaSuccess) return in_words(error);
  // A graph would outlive the list of tiles, which belongs to one batch; and copying that list would break the capture.
  return capture == cudaStreamCaptureStatusNone ? nullptr
                                                : "CUDA graphs cannot hold it; pass `backend=\"torch\"` inside a graph";
}

template <auto kKernel>
const char* launch(int64_t blocks, int threads, int shared_bytes, void* stream, const Problem& problem) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more blocks than a grid holds; split the batch";
  if (shared_bytes > 48 * 1024) {  // more must be requested, and the small cards of a generation have less than the large ones
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      in_words(error);
      return "this GPU has too little shared memory for it at this head width; pass `backend=\"torch\"`";
    }
  }
  kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(problem);
  return in_words(cudaGetLastError());
}
#endif

}  // namespace scfm::cuda
