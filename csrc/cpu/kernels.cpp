// Which kernels this process uses.
#include <algorithm>
#include <chrono>

#include "isa.h"
#include "schedule.h"

namespace scfm {

const Kernels& kernels(Dtype dtype) {
  const Kernels* found = nullptr;
  switch (active_isa()) {
#if defined(SCFM_HAVE_AMX)
    case Isa::kAmx:
      found = kernels_amx(dtype);
      if (found != nullptr) break;
      [[fallthrough]];
#endif
#if defined(SCFM_HAVE_AVX512_BF16)
    case Isa::kAvx512Bf16:
      found = kernels_avx512_bf16(dtype);
      if (found != nullptr) break;
      [[fallthrough]];
#endif
#if defined(SCFM_HAVE_AVX512)
    case Isa::kAvx512:
      found = kernels_avx512(dtype);
      break;
#endif
#if defined(SCFM_HAVE_AVX2)
    case Isa::kAvx2:
      found = kernels_avx2(dtype);
      break;
#endif
    default:
      found = kernels_portable(dtype);
  }
  return *found;
}

double peak_gflops(Dtype dtype) {
  using Clock = std::chrono::steady_clock;
  double best = 0.0;
  for (int attempt = 0; attempt < 5; attempt++) {
    const auto start = Clock::now();
    const int64_t operations = kernels(dtype).burn(200000);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(operations) / seconds / 1e9);
  }
  return best;
}

}  // namespace scfm
