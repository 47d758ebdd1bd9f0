#include "vec_avx2.h"
//
#include "engine_float.h"
//
#include "attention_kernels.h"

namespace scfm {

const AttentionKernels* attention_kernels_avx2(Dtype dtype) {
  static constexpr AttentionKernels kFloat = kernels_of<FloatEngine, float>();
  static constexpr AttentionKernels kBFloat16 = kernels_of<FloatEngine, BFloat16>();
  static constexpr AttentionKernels kHalf = kernels_of<FloatEngine, Half>();
  return dtype == Dtype::kFloat ? &kFloat : dtype == Dtype::kBFloat16 ? &kBFloat16 : &kHalf;
}

}  // namespace scfm
