// Starting a kernel, on a GPU or in the emulator.
#pragma once

#include "device.h"

namespace scfm::cuda {

#ifdef SCFM_EMULATE
template <auto kKernel>
const char* launch(int64_t blocks, int threads, int shared_bytes, void*, const Problem& problem) {
  return emulate::launch(blocks, threads, shared_bytes, [&] { kKernel(problem); });
}
#else
template <auto kKernel>
const char* launch(int64_t blocks, int threads, int shared_bytes, void* stream, const Problem& problem) {
  if (blocks == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more must be asked for
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(problem);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace scfm::cuda
