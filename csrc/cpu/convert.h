// Converts rows of float, bfloat16 and half to and from float, in plain loops that the compiler vectorizes.
#pragma once

#include <cstdint>
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  // A half's exponent is shifted by multiplying with 2^112, which also brings its subnormal numbers to normal ones.
  const float value = float_of_bits(magnitude << 13) * float_of_bits(0x77800000u);
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : bits_of_float(value);
  return float_of_bits(sign | bits);
#endif
}

inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, BFloat16& to) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void from_float(float x, Half& to) {
#if defined(__F16C__)
  to.bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded result in the low bits
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
#endif
}

template <class Source>
inline void read_row(const Source* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}
template <class Source>
inline void write_row(const float* from, float factor, int64_t n, Source* to) {
  for (int64_t i = 0; i < n; i++) from_float(from[i] * factor, to[i]);
}
#if defined(__AVX512BF16__)
// One instruction rounds what takes six in the loop above; it treats denormal numbers as 0.
inline void write_row(const float* from, float factor, int64_t n, BFloat16* to) {
  const __m512 by = _mm512_set1_ps(factor);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + i), by);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + i + 16), by);
    _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  for (; i < n; i++) from_float(from[i] * factor, to[i]);
}
#endif

}  // namespace
