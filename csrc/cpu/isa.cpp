#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace scfm {
namespace {

#if defined(__x86_64__)
// The system must save the wide registers when it switches threads: bits of XCR0, Intel SDM volume 1, 13.3.
bool system_saves(unsigned mask) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

// A process must ask Linux for the tile registers once; in a container the request may fail.
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  const bool fma = ecx & bit_FMA, f16c = ecx & bit_F16C;
  if (!fma || !f16c || !system_saves(0x6) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  if (!(ebx & bit_AVX2)) return Isa::kPortable;
  const bool amx = (edx & (1u << 22)) && (edx & (1u << 24));  // AMX-BF16, AMX-TILE
  const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((ebx & wide) != wide || !system_saves(0xe6)) return Isa::kAvx2;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & (1u << 5))) return Isa::kAvx512;  // AVX512_BF16
  return amx && system_saves(0x60000) && tiles_are_granted() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa best_isa() { return Isa::kPortable; }
#endif

// Old compilers do not support the newest instruction sets; setup.py leaves those units out.
constexpr Isa kBestCompiled =
#if defined(SCFM_HAVE_AMX)
    Isa::kAmx;
#elif defined(SCFM_HAVE_AVX512_BF16)
    Isa::kAvx512Bf16;
#elif defined(SCFM_HAVE_AVX512)
    Isa::kAvx512;
#elif defined(SCFM_HAVE_AVX2)
    Isa::kAvx2;
#else
    Isa::kPortable;
#endif

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

struct Choice {
  Isa isa = best_isa() < kBestCompiled ? best_isa() : kBestCompiled;
  bool missing = false;

  Choice() {
    const char* forced = std::getenv("SCFM_FORCE_ISA");
    if (forced == nullptr || *forced == '\0') return;
    for (int i = 0; i <= static_cast<int>(isa); i++)
      if (std::strcmp(forced, kNames[i]) == 0) {
        isa = static_cast<Isa>(i);
        return;
      }
    missing = true;
  }
};

const Choice& choice() {
  static const Choice kChoice;
  return kChoice;
}

}  // namespace

Isa active_isa() { return choice().isa; }
bool forced_isa_is_missing() { return choice().missing; }

}  // namespace scfm
