#include "vec_avx512.h"
//
#include "engine_float.h"
//
#include "engine_bfloat16.h"
//
#include "kernels_of.h"

namespace scfm {

// Only what this instruction set adds; the other dtypes use the AVX-512 kernels.
const Kernels* kernels_avx512_bf16(Dtype dtype) {
  static constexpr Kernels kBFloat16 = kernels_of<BFloat16Engine, BFloat16>();
  return dtype == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace scfm
