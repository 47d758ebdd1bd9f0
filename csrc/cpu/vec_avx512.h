// Sixteen floats, AVX-512F/BW/DQ/VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 6, kTileColumns = 4;  // 24 accumulators, 4 of B, 1 of A: 29 of 32 registers
  using Reg = __m512;

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static float reduce_add(Reg x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(Reg x) { return _mm512_reduce_max_ps(x); }
  static bool all_less(Reg a, float bound) {
    return _mm512_cmp_ps_mask(a, set1(bound), _CMP_NLT_UQ) == 0;
  }
  // x - floor(x).
  static Reg fraction(Reg x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // p * 2^floor(x), infinity if that is too large; NaN stays NaN. Results below the smallest normal number are 0,
  // because denormal numbers are flushed (see FlushDenormals); producing one takes hundreds of cycles.
  static Reg scale_exp2(Reg p, Reg x) { return _mm512_scalef_ps(p, x); }

  // For the duration of a task.
  struct FlushDenormals {
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
    ~FlushDenormals() { _mm_setcsr(before); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
  };
  // Transpose kWidth x kWidth 32-bit words: pairs, quads, then 128-bit lanes twice.
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    __m512i r[16], s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
      _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
      _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
      _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
    }
  }
};

}  // namespace
