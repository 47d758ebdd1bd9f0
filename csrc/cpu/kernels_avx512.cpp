#include "vec_avx512.h"
//
#include "engine_float.h"
//
#include "kernels_of.h"

namespace scfm {

const Kernels* kernels_avx512(Dtype dtype) {
  static constexpr Kernels kFloat = kernels_of<FloatEngine, float>();
  static constexpr Kernels kBFloat16 = kernels_of<FloatEngine, BFloat16>();
  static constexpr Kernels kHalf = kernels_of<FloatEngine, Half>();
  return dtype == Dtype::kFloat ? &kFloat : dtype == Dtype::kBFloat16 ? &kBFloat16 : &kHalf;
}

}  // namespace scfm
