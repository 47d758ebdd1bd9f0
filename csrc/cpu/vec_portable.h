// Four floats in the vector type that gcc and clang offer on every machine.
#pragma once

#include <cstdint>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 4, kTileColumns = 2;  // accumulators of one register tile: rows x vectors
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));

  static Reg load(const float* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, Reg x) { __builtin_memcpy(p, &x, sizeof x); }
  static Reg set1(float x) { return Reg{x, x, x, x}; }
  static Reg zero() { return Reg{}; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) {
#if defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;  // the unit is compiled with -ffp-contract=off, so this rounds in the same way everywhere
#endif
  }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static float reduce_add(Reg x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float reduce_max(Reg x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  static bool all_less(Reg a, float bound) {
    return a[0] < bound && a[1] < bound && a[2] < bound && a[3] < bound;
  }
  static Reg floor(Reg x) {
    const Reg magic = set1(12582912.f);  // 1.5 * 2^23: adding it leaves no room for a fraction
    const Reg nearest = (x + magic) - magic;
    return nearest > x ? nearest - 1.f : nearest;
  }
  // x - floor(x).
  static Reg fraction(Reg x) { return x - floor(x); }
  // p * 2^floor(x); 0 if x is below the smallest normal exponent, very large if x is above the largest; NaN stays NaN.
  static Reg scale_exp2(Reg p, Reg x) {
    const Int vanished = x < -126.f;
    const Reg whole = floor(x > 127.f ? set1(127.f) : x);
    const Int bits = (Int)p + (__builtin_convertvector(whole, Int) << 23);
    return (Reg)(bits & ~vanished);
  }
  struct FlushDenormals {  // the inner loops of this unit produce none
    FlushDenormals() {}
  };
  // Transpose kWidth x kWidth 32-bit words.
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    for (int i = 0; i < kWidth; i++)
      for (int j = 0; j < kWidth; j++) to[j * to_stride + i] = from[i * from_stride + j];
  }
};

}  // namespace
