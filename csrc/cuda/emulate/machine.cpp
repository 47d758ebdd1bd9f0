// Threads, warps, barriers and memory of the emulated machine, with the checks listed in device.h.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "fibers.h"

namespace scfm::cuda::emulate {

namespace {

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// Four bytes of shared memory, and which threads accessed them since which barrier.
struct Word {
  int writer = -1, written_at = -1;
  int reader = -1, read_at = -1;  // reader -2: several
  bool defined = false, in_flight = false;
};

struct Copy {
  uint32_t shared;
  const void* global;
  int bytes;
  bool valid;
};

struct Thread {
  bool at_barrier = false;
  uint32_t turn = 0;  // collective operations of its warp that it took part in
  std::vector<Copy> open, committed;
};

// One collective operation of a warp: lanes deposit their operands, and the last one computes for all.
struct Warp {
  int arrived = 0;
  uint32_t turn = 0;  // operations finished
  const char* name = "";
  const void* in[32];
  void* out[32];
};

struct Machine {
  Fibers fibers;
  std::vector<Range> ranges;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  std::unordered_map<uintptr_t, int64_t> writers;  // global words written in this launch: the thread, or kAtomic
  std::string error;
  bool shuffled = false;  // the order is random: see SCFM_EMULATE_SEED
  std::minstd_rand draw;
  int64_t block = 0;
  int n_threads = 0, barriers = 0;
} machine;

int self() { return machine.fibers.current(); }
int64_t self_in_launch() { return machine.block * machine.n_threads + self(); }

[[noreturn]] void fail(const std::string& what) {
  machine.error = what + " (block " + std::to_string(machine.block) + ", thread " + std::to_string(self()) + ")";
  machine.fibers.leave();
}

bool runnable(int index) {
  const Thread& thread = machine.threads[static_cast<size_t>(index)];
  const bool waits = thread.turn > machine.warps[static_cast<size_t>(index / 32)].turn;
  return !machine.fibers.done(index) && !thread.at_barrier && !waits;
}

int draw(int count) { return static_cast<int>(machine.draw() % static_cast<uint32_t>(count)); }

// Which lane runs next: the next lane of this warp that can, otherwise the first lane that can; -1 if all have returned. In
// random order the search starts at any lane of any warp.
int next_fiber() {
  const int current = machine.shuffled ? draw(machine.n_threads) : self(), warp = current / 32 * 32;
  for (int step = 1; step <= 32; step++)
    if (const int index = warp + (current + step) % 32; runnable(index)) return index;
  for (int step = 0; step < machine.n_threads; step++)
    if (const int index = (machine.shuffled ? warp + step : step) % machine.n_threads; runnable(index)) return index;
  for (int index = 0; index < machine.n_threads; index++)
    if (!machine.fibers.done(index))
      fail("deadlock: some threads wait at a barrier or for other lanes of their warp, the others have gone elsewhere");
  return -1;
}

void give_way() {
  const int index = next_fiber();
  if (index != self()) machine.fibers.switch_to(index);
}

// Before an access to memory: another thread may run first, at any access.
void maybe_give_way() {
  if (machine.shuffled && draw(64) == 0) give_way();
}

// All lanes of the warp synchronize here; the last one does `work`.
template <class Work>
void collective(const char* name, const void* in, void* out, const Work& work) {
  Warp& warp = machine.warps[static_cast<size_t>(self() / 32)];
  Thread& thread = machine.threads[static_cast<size_t>(self())];
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0)
    fail(std::string("lanes of a warp are at different operations: ") + warp.name + " and " + name);
  warp.name = name;
  warp.in[self() & 31] = in;
  warp.out[self() & 31] = out;
  thread.turn++;
  if (++warp.arrived == 32) {
    work(warp);
    warp.arrived = 0;
    warp.turn++;
    if (machine.shuffled) give_way();  // otherwise the last to arrive would always be the first to continue
    return;
  }
  while (warp.turn < thread.turn) give_way();
}

Word& word_at(uint32_t address) {
  return machine.words[(address - shared_base()) / 4];
}
unsigned char* byte_at(uint32_t address) { return machine.shared.data() + (address - shared_base()); }

void check_shared(uint32_t address, int bytes) {
  if (address % static_cast<uint32_t>(bytes) != 0) fail("shared memory: an access is off its alignment");
  if (address < shared_base() || address + static_cast<uint32_t>(bytes) > shared_base() + machine.shared.size())
    fail("shared memory: an access is out of bounds");
}

void note_shared(uint32_t address, int bytes, bool write) {
  for (uint32_t a = address; a < address + static_cast<uint32_t>(bytes); a += 4) {
    Word& word = word_at(a);
    if (word.in_flight) fail("shared memory: an access meets an asynchronous copy that was not waited for");
    if (word.written_at == machine.barriers && word.writer != self())
      fail("shared memory: race, another thread wrote this word since the last barrier");
    if (write && word.read_at == machine.barriers && word.reader != self())
      fail("shared memory: race, another thread read this word since the last barrier");
    if (write) {
      word.writer = self();
      word.written_at = machine.barriers;
      word.defined = true;
    } else {
      if (!word.defined) fail("shared memory: a word is read that was never written");
      word.reader = word.read_at == machine.barriers && word.reader != self() ? -2 : self();
      word.read_at = machine.barriers;
    }
  }
}

constexpr int64_t kAtomic = -1;

template <class Visit>
void for_words(const void* address, int bytes, const Visit& visit) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t word = begin; word < begin + static_cast<uintptr_t>(bytes); word += 4) visit(word);
}

void check_range(const void* address, int bytes, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + static_cast<uintptr_t>(bytes);
  if (begin % static_cast<uintptr_t>(bytes) != 0) fail("global memory: an access is off its alignment");
  const bool allowed = std::any_of(machine.ranges.begin(), machine.ranges.end(), [&](const Range& range) {
    return begin >= range.begin && end <= range.end && (range.writable || !write);
  });
  if (!allowed) fail(write ? "global memory: a write is out of bounds" : "global memory: a read is out of bounds");
}

}  // namespace

void allow(const void* data, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) machine.ranges.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable});
}
void forbid_all() { machine.ranges.clear(); }

const char* launch(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  const std::function<int()> next = next_fiber;
  machine.error.clear();
  machine.writers.clear();
  machine.n_threads = threads;
  const char* seed = std::getenv("SCFM_EMULATE_SEED");
  machine.shuffled = seed != nullptr;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  if (machine.shuffled) {
    machine.draw.seed(static_cast<uint32_t>(std::atoi(seed)) + 1);
    std::shuffle(order.begin(), order.end(), machine.draw);
  }
  for (const int64_t block : order) {
    if (!machine.error.empty()) break;
    machine.block = block;
    machine.barriers = 0;
    machine.threads.assign(static_cast<size_t>(threads), Thread{});
    machine.warps.assign(static_cast<size_t>(threads / 32), Warp{});
    machine.shared.assign(static_cast<size_t>(shared_bytes), 0xff);  // NaN in every type
    machine.words.assign(static_cast<size_t>(shared_bytes / 4), Word{});
    const std::function<void()> body = [&] {
      kernel();
      const Thread& thread = machine.threads[static_cast<size_t>(self())];
      if (!thread.open.empty() || !thread.committed.empty()) fail("a thread ends with an asynchronous copy under way");
    };
    machine.fibers.run(threads, body, next);
  }
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

int thread_index() { return self(); }
int64_t block_index() { return machine.block; }

void barrier() {
  Thread& thread = machine.threads[static_cast<size_t>(self())];
  thread.at_barrier = true;
  for (const Thread& other : machine.threads)
    if (!other.at_barrier) return give_way();
  for (Thread& other : machine.threads) other.at_barrier = false;
  machine.barriers++;
  if (machine.shuffled) give_way();
}

void check_global(const void* address, int bytes, bool write) {
  maybe_give_way();
  check_range(address, bytes, write);
  for_words(address, bytes, [&](uintptr_t word) {
    if (write && !machine.writers.emplace(word, self_in_launch()).second)
      fail("global memory: a word is written twice in one launch");
    if (write) return;
    const auto found = machine.writers.find(word);
    if (found != machine.writers.end() && found->second != self_in_launch())
      fail("global memory: a word is read that another thread writes in the same launch");
  });
}

void check_atomic(const void* address, int bytes) {
  maybe_give_way();
  check_range(address, bytes, true);
  for_words(address, bytes, [&](uintptr_t word) {
    const auto [found, fresh] = machine.writers.emplace(word, kAtomic);
    if (!fresh && found->second != kAtomic) fail("global memory: a word is both written and added to in one launch");
  });
}

void* shared_word(uint32_t address, int bytes, bool write) {
  maybe_give_way();
  check_shared(address, bytes);
  note_shared(address, bytes, write);
  return byte_at(address);
}

void copy(uint32_t shared, const void* global, int bytes, bool valid) {
  maybe_give_way();
  check_shared(shared, bytes);
  if (valid) check_global(global, bytes, false);
  note_shared(shared, bytes, true);
  for (int i = 0; i < bytes; i += 4) word_at(shared + static_cast<uint32_t>(i)).in_flight = true;
  std::fill_n(byte_at(shared), bytes, static_cast<unsigned char>(0xff));
  machine.threads[static_cast<size_t>(self())].open.push_back({shared, global, bytes, valid});
}

void copies_commit() {
  Thread& thread = machine.threads[static_cast<size_t>(self())];
  thread.committed.insert(thread.committed.end(), thread.open.begin(), thread.open.end());
  thread.open.clear();
}

void copies_wait() {
  Thread& thread = machine.threads[static_cast<size_t>(self())];
  for (const Copy& copy : thread.committed) {
    for (int i = 0; i < copy.bytes; i += 4) {
      Word& word = word_at(copy.shared + static_cast<uint32_t>(i));
      word.in_flight = false;
      word.writer = self();  // visible to others after the next barrier
      word.written_at = machine.barriers;
    }
    if (copy.valid)
      std::memcpy(byte_at(copy.shared), copy.global, static_cast<size_t>(copy.bytes));
    else
      std::fill_n(byte_at(copy.shared), copy.bytes, static_cast<unsigned char>(0));
  }
  thread.committed.clear();
}

float shuffle_xor(float value, int mask) {
  float result = 0.f;
  collective("shuffle", &value, &result, [&](Warp& warp) {
    for (int lane = 0; lane < 32; lane++)
      *static_cast<float*>(warp.out[lane]) = *static_cast<const float*>(warp.in[lane ^ mask]);
  });
  return result;
}

// A matrix load takes the eight rows of a matrix at once, 16 bytes from each: 128 bytes hold every bank once.
void check_banks(const Warp& warp) {
  for (int lane = 0; lane < 32; lane++)
    for (int other = lane / 8 * 8; other < lane; other++) {
      const auto a = *static_cast<const uint32_t*>(warp.in[lane]), b = *static_cast<const uint32_t*>(warp.in[other]);
      if (a != b && a % 128 == b % 128) fail("shared memory: two rows of a matrix load are in the same banks");
    }
}

// PTX ISA, ldmatrix: lane 8 m + r passes the address of row r of matrix m, 16 bytes. Lane t receives of each matrix the elements 2 (t mod 4)
// and 2 (t mod 4) + 1 of row t / 4; with .trans those of column t / 4.
void load_matrices(uint32_t (&words)[4], uint32_t address, bool transposed) {
  shared_word(address, 16, false);
  collective(transposed ? "transposed matrix load" : "matrix load", &address, words, [&](Warp& warp) {
    check_banks(warp);
    for (int lane = 0; lane < 32; lane++)
      for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
          const int across = lane % 4 * 2 + i, along = lane / 4;
          const int row = transposed ? across : along, column = transposed ? along : across;
          const auto start = *static_cast<const uint32_t*>(warp.in[8 * matrix + row]);
          std::memcpy(&pair[i], byte_at(start + static_cast<uint32_t>(2 * column)), 2);
        }
        static_cast<uint32_t*>(warp.out[lane])[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
}

// PTX ISA, matrix fragments for mma.m16n8k16 with 16-bit elements. With g = lane / 4 and t = lane mod 4:
//   a_i: row g (+ 8 for i = 2, 3, 6, 7), column 2 t + (i mod 2) (+ 8 for i >= 4)
//   b_i: row 2 t + (i mod 2) (+ 8 for i >= 2), column g
//   c_i: row g (+ 8 for i >= 2), column 2 t + (i mod 2)
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Convert convert) {
  struct Operands {
    uint32_t a[4], b[2];
  } operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  collective("product", &operands, c, [&](Warp& warp) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < 32; lane++) {
      const auto& brought = *static_cast<const Operands*>(warp.in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; i++) {
        const int row = g + (i / 2 % 2 == 1 ? 8 : 0), column = 2 * t + i % 2 + (i >= 4 ? 8 : 0);
        left[row][column] = convert(static_cast<uint16_t>(brought.a[i / 2] >> (16 * (i % 2))));
      }
      for (int i = 0; i < 4; i++)
        right[g][2 * t + i % 2 + (i >= 2 ? 8 : 0)] = convert(static_cast<uint16_t>(brought.b[i / 2] >> (16 * (i % 2))));
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[column][k];
        static_cast<float*>(warp.out[lane])[i] += sum;
      }
  });
}

float from_bfloat16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
float from_half(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(&bits)); }
uint16_t to_half(float value) {
  const auto half = static_cast<_Float16>(value);
  return bit_cast<uint16_t>(&half);
}
uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace scfm::cuda::emulate
