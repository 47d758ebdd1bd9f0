#include "vec_avx512.h"
//
#include "engine_float.h"
//
#include "engine_bfloat16.h"
//
#include "attention_kernels.h"

namespace scfm {

// Only what this instruction set adds; the scheduler goes on to AVX-512 for the other dtypes.
const AttentionKernels* attention_kernels_avx512_bf16(Dtype dtype) {
  static constexpr AttentionKernels kBFloat16 = kernels_of<BFloat16Engine, BFloat16>();
  return dtype == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace scfm
