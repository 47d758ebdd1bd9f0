#include "vec_avx512.h"
//
#include "engine_float.h"
//
#include "engine_amx_float.h"
//
#include "kernels_of.h"

namespace scfm {

// Only what this instruction set adds; the other dtypes use the AVX-512 kernels.
const Kernels* kernels_amx(Dtype dtype) {
  static constexpr Kernels kFloat = kernels_of<FloatEngine, float, AmxFloatEngine>();
  static constexpr Kernels kBFloat16 = kernels_of<AmxEngine, BFloat16>();
  return dtype == Dtype::kFloat ? &kFloat : dtype == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace scfm
