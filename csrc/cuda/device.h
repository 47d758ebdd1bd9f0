// Everything in a kernel that depends on the machine: threads, barriers, memory, matrix products. The kernels themselves are
// arithmetic only: no pointer is dereferenced outside this file, and shared memory is an address and not a pointer. So the
// same kernel source runs on a GPU (this file) and, with every step checked, on the CPU (emulate/device.h).
#pragma once

#include <cstdint>

#ifdef SCFM_EMULATE
#include "emulate/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SCFM_DEVICE __device__ __forceinline__
#define SCFM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SCFM_PARAMETER const __grid_constant__
#define SCFM_UNROLL _Pragma("unroll")

namespace scfm::cuda {

constexpr float kInfinity = __builtin_inff();

struct Pair {
  float x, y;
};
struct Chunk {  // 16 bytes: eight elements of a half type, or four floats
  uint32_t words[4];
};
struct BFloat16 {};
struct Half {};

// ---- threads ----
SCFM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SCFM_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
// All threads of the block; orders their accesses to shared memory.
SCFM_DEVICE void barrier() { __syncthreads(); }
// Every lane of the warp must take part.
SCFM_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// ---- arithmetic ----
// exp2(-inf) = 0, exp2(nan) = nan, results below 2^-126 are 0. Two units in the last place (PTX ISA, ex2.approx).
SCFM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SCFM_DEVICE float log2_fast(float x) { return __log2f(x); }
SCFM_DEVICE float square_root(float x) { return sqrtf(x); }
SCFM_DEVICE float round_down(float x) { return floorf(x); }
SCFM_DEVICE float absolute(float x) { return fabsf(x); }
SCFM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // if one is NaN, the other one
SCFM_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// Two floats to a word of two elements (the first in the low half) and back.
template <class Element>
SCFM_DEVICE uint32_t pack(float low, float high);
template <>
SCFM_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
SCFM_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <class Element>
SCFM_DEVICE Pair unpack(uint32_t word);
template <>
SCFM_DEVICE Pair unpack<BFloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
SCFM_DEVICE Pair unpack<Half>(uint32_t word) {
  __half2 both;
  memcpy(&both, &word, sizeof both);
  return {__low2float(both), __high2float(both)};
}
SCFM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
SCFM_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// ---- global memory ----
SCFM_DEVICE uint32_t global_word(const void* address) { return *static_cast<const uint32_t*>(address); }
SCFM_DEVICE float global_float(const void* address) { return *static_cast<const float*>(address); }
SCFM_DEVICE Chunk global_chunk(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
SCFM_DEVICE void store_global(void* address, uint32_t word) { *static_cast<uint32_t*>(address) = word; }
SCFM_DEVICE void store_global(void* address, float value) { *static_cast<float*>(address) = value; }
SCFM_DEVICE void store_global(void* address, const Chunk& c) {
  *static_cast<uint4*>(address) = make_uint4(c.words[0], c.words[1], c.words[2], c.words[3]);
}
SCFM_DEVICE void add_global(void* address, Pair pair) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "f"(pair.x), "f"(pair.y)
               : "memory");
#else
  atomicAdd(static_cast<float*>(address), pair.x);
  atomicAdd(static_cast<float*>(address) + 1, pair.y);
#endif
}
// For floats that are not negative, whose order is that of their bits; the result does not depend on the order of threads.
SCFM_DEVICE void raise_global(void* address, float value) { atomicMax(static_cast<int*>(address), __float_as_int(value)); }

// ---- shared memory: byte addresses from shared_base() on ----
SCFM_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}
SCFM_DEVICE float shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
SCFM_DEVICE Pair shared_pair(uint32_t address) {
  Pair pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}
SCFM_DEVICE void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Asynchronous copies. They have arrived for the thread that issued them after copies_wait, for the others after a
// barrier that follows it. If `valid` is false, zeros are written and nothing is read.
SCFM_DEVICE void copy_chunk(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
               "r"(valid ? 16 : 0)
               : "memory");
}
SCFM_DEVICE void copy_float(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
               "r"(valid ? 4 : 0)
               : "memory");
}
SCFM_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
SCFM_DEVICE void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// ---- matrix unit; fragments as in the PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix" ----
// Four 8 x 8 matrices: lane 8 m + r passes the address of row r of matrix m, and receives of matrix m the elements
// 2 (lane % 4) and the next of row lane / 4.
SCFM_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// The same of the transposed matrices.
SCFM_DEVICE void load_matrices_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// c (16 x 8, float) += a (16 x 16) b (16 x 8).
template <class Element>
SCFM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SCFM_DEVICE void multiply<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SCFM_DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace scfm::cuda
#endif  // SCFM_EMULATE
