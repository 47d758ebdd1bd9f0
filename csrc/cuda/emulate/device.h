// The functions of ../device.h on the CPU, for tests: every CUDA thread is a fiber, and every access is checked.
//
// A launch fails, and says where, when a kernel
// - reads or writes global memory outside the tensors of the call, writes to one that is read only, is misaligned,
//   writes one word from two threads or reads what another thread wrote in the same launch;
// - reads or writes shared memory outside its size, is misaligned, or reads what was not written;
// - accesses the target of an asynchronous copy before waiting for the copy, or ends with one in progress;
// - accesses a word of shared memory from two threads, one of them writing, without a barrier between them;
// - lets some lanes of a warp miss a shuffle, a matrix load or a product, or some threads a barrier;
// - reads two rows of a matrix load from the same banks, which is not wrong but slow.
//
// Order: within a warp lanes run one after the other, each up to the next operation of the whole warp; a warp runs up to the
// next barrier, then the next warp does; blocks run by number. The rules above are about pairs of accesses between barriers,
// so except for accesses to global memory they do not depend on the order. With SCFM_EMULATE_SEED=n the order is random:
// any lane of any warp, after each operation of a warp, each barrier and some of the accesses, and blocks in any
// order. Blocks never run concurrently.
//
// It does not check: anything else about speed, the order in which a GPU's memory shows writes to other threads beyond the
// rules above, the exact rounding inside a matrix product, and the inline assembly of ../device.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define SCFM_DEVICE inline
#define SCFM_KERNEL(threads, blocks) void
#define SCFM_PARAMETER const
#define SCFM_UNROLL

namespace scfm::cuda {

constexpr float kInfinity = __builtin_inff();

struct Pair {
  float x, y;
};
struct Chunk {
  uint32_t words[4];
};
struct BFloat16 {};
struct Half {};

namespace emulate {

// ---- host side ----
// The launches that follow may access this memory; nothing else.
void allow(const void* data, int64_t bytes, bool writable);
void forbid_all();
// Runs `kernel` once for every thread; returns null or an error message, which is valid until the next launch.
const char* launch(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

// ---- what kernels call ----
int thread_index();
int64_t block_index();
void barrier();
void check_global(const void* address, int bytes, bool write);
void check_atomic(const void* address, int bytes);
void* shared_word(uint32_t address, int bytes, bool write);
void copy(uint32_t shared, const void* global, int bytes, bool valid);
void copies_commit();
void copies_wait();
float shuffle_xor(float value, int mask);
void load_matrices(uint32_t (&words)[4], uint32_t address, bool transposed);
using Convert = float (*)(uint16_t);
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Convert convert);

// Bits to float and back, rounding to nearest even.
float from_bfloat16(uint16_t bits);
float from_half(uint16_t bits);
uint16_t to_bfloat16(float value);
uint16_t to_half(float value);

template <class T>
T bit_cast(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
T read_global(const void* address) {
  check_global(address, sizeof(T), false);
  return bit_cast<T>(address);
}
template <class T>
void write_global(void* address, const T& value) {
  check_global(address, sizeof value, true);
  std::memcpy(address, &value, sizeof value);
}

}  // namespace emulate

inline int thread_index() { return emulate::thread_index(); }
inline int64_t block_index() { return emulate::block_index(); }
inline void barrier() { emulate::barrier(); }
inline float shuffle_xor(float value, int mask) { return emulate::shuffle_xor(value, mask); }

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline float round_down(float x) { return std::floor(x); }
inline float absolute(float x) { return std::fabs(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

template <class Element>
constexpr auto kToBits = std::is_same_v<Element, Half> ? emulate::to_half : emulate::to_bfloat16;
template <class Element>
constexpr auto kFromBits = std::is_same_v<Element, Half> ? emulate::from_half : emulate::from_bfloat16;

template <class Element>
uint32_t pack(float low, float high) {
  return kToBits<Element>(low) | static_cast<uint32_t>(kToBits<Element>(high)) << 16;
}
template <class Element>
Pair unpack(uint32_t word) {
  return {kFromBits<Element>(static_cast<uint16_t>(word)), kFromBits<Element>(static_cast<uint16_t>(word >> 16))};
}
inline float as_float(uint32_t bits) { return emulate::bit_cast<float>(&bits); }
inline uint32_t as_bits(float value) { return emulate::bit_cast<uint32_t>(&value); }

inline uint32_t global_word(const void* address) { return emulate::read_global<uint32_t>(address); }
inline float global_float(const void* address) { return emulate::read_global<float>(address); }
inline Chunk global_chunk(const void* address) { return emulate::read_global<Chunk>(address); }
inline void store_global(void* address, uint32_t word) { emulate::write_global(address, word); }
inline void store_global(void* address, float value) { emulate::write_global(address, value); }
inline void store_global(void* address, const Chunk& chunk) { emulate::write_global(address, chunk); }
inline void add_global(void* address, Pair pair) {
  emulate::check_atomic(address, 8);
  Pair sum = emulate::bit_cast<Pair>(address);
  sum = {sum.x + pair.x, sum.y + pair.y};
  std::memcpy(address, &sum, sizeof sum);
}
inline void raise_global(void* address, float value) {
  emulate::check_atomic(address, 4);
  // As integers, like the GPU: NaN is the largest.
  if (emulate::bit_cast<int32_t>(&value) > emulate::bit_cast<int32_t>(address)) std::memcpy(address, &value, 4);
}

// Not 0, so that an address to which the base was not added is out of bounds.
inline uint32_t shared_base() { return 1024; }
inline float shared_float(uint32_t address) { return emulate::bit_cast<float>(emulate::shared_word(address, 4, false)); }
inline Pair shared_pair(uint32_t address) { return emulate::bit_cast<Pair>(emulate::shared_word(address, 8, false)); }
inline void store_shared(uint32_t address, uint32_t word) {
  std::memcpy(emulate::shared_word(address, 4, true), &word, sizeof word);
}
inline void copy_chunk(uint32_t shared, const void* global, bool valid) { emulate::copy(shared, global, 16, valid); }
inline void copy_float(uint32_t shared, const void* global, bool valid) { emulate::copy(shared, global, 4, valid); }
inline void copies_commit() { emulate::copies_commit(); }
inline void copies_wait() { emulate::copies_wait(); }

inline void load_matrices(uint32_t (&words)[4], uint32_t address) { emulate::load_matrices(words, address, false); }
inline void load_matrices_transposed(uint32_t (&words)[4], uint32_t address) {
  emulate::load_matrices(words, address, true);
}
template <class Element>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::multiply(c, a, b0, b1, kFromBits<Element>);
}

}  // namespace scfm::cuda
