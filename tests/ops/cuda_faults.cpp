// Small kernels, each with one fault that the emulated machine must name, and one without any.
#include <functional>

#include "cuda/device.h"

using namespace scfm::cuda;

namespace {

float input[64], output[64];

uint32_t slot(int thread) { return shared_base() + 4 * static_cast<uint32_t>(thread); }

// Copies input to shared memory, hands each word to the next thread, writes it out. Two warps.
void relay(bool wait, bool meet) {
  const int thread = thread_index();
  copy_float(slot(thread), input + thread, true);
  copies_commit();
  if (wait) copies_wait();
  if (meet) barrier();
  store_global(output + thread, shared_float(slot(thread == 0 ? 0 : thread - 1)));
  copies_wait();
}

const std::function<void()> kKernels[] = {
    [] { relay(true, true); },
    [] { relay(false, true); },
    [] { relay(true, false); },
    [] { store_global(output + thread_index(), shared_float(slot(thread_index()))); },  // never written
    [] { store_global(output + thread_index() + 1, 1.f); },                             // past the end
    [] { store_global(input + thread_index(), 1.f); },                                  // read only
    [] { store_global(output, 1.f); },                                                  // everybody writes one word
    [] { store_shared(slot(thread_index() + 1), 1u); },
    [] { store_shared(slot(thread_index()) + 2, 1u); },
    [] {  // the word is read and then overwritten by another thread
      store_shared(slot(thread_index()), 1u);
      barrier();
      store_global(output + thread_index(), shared_float(slot(thread_index() == 63 ? 63 : thread_index() + 1)));
      store_shared(slot(thread_index()), 2u);
    },
    [] {
      if (thread_index() != 3) barrier();
    },
    [] {
      if (thread_index() % 32 != 3) shuffle_xor(1.f, 1);
    },
    [] {
      store_shared(slot(thread_index()), 0u);
      barrier();
      if (thread_index() % 2 == 0) {
        shuffle_xor(1.f, 1);
      } else {
        uint32_t words[4];
        load_matrices(words, shared_base());
      }
    },
    [] {
      copy_float(slot(thread_index()), input, true);
      copies_commit();
    },
    [] { global_chunk(input + 1); },
    [] {
      store_global(output + thread_index(), 1.f);
      global_float(output + (thread_index() ^ 1));
    },
    [] {
      store_global(output + thread_index(), 1.f);
      add_global(output + (thread_index() & 62), {1.f, 1.f});
    },
    [] {
      store_shared(slot(thread_index()), 0u);
      barrier();
      uint32_t words[4];
      load_matrices(words, shared_base() + 128 * (thread_index() & 1));
    },
};

}  // namespace

// Null where the kernel is right, else the machine's complaint.
extern "C" const char* run_kernel(int index) {
  for (int i = 0; i < 64; i++) input[i] = static_cast<float>(i);
  emulate::forbid_all();
  emulate::allow(input, sizeof input, false);
  emulate::allow(output, sizeof output, true);
  return emulate::launch(1, 64, 256, kKernels[index]);
}
extern "C" float output_of(int index) { return output[index]; }

// Each thread writes how many came before it to the end; host memory, so that the machine does not see the counting.
extern "C" const char* run_order() {
  emulate::forbid_all();
  emulate::allow(output, sizeof output, true);
  int finished = 0;
  return emulate::launch(1, 64, 256, [&finished] {
    store_shared(slot(thread_index()), 0u);
    shuffle_xor(1.f, 1);
    barrier();
    shared_float(slot(thread_index()));
    store_global(output + thread_index(), static_cast<float>(finished++));
  });
}

// a (16 x 16) times b (16 x 8) by matrix loads and one product, c by rows; a and b by rows, bits of bfloat16.
extern "C" const char* run_product(const uint16_t* a, const uint16_t* b, float* c) {
  emulate::forbid_all();
  emulate::allow(a, 512, false);
  emulate::allow(b, 256, false);
  emulate::allow(c, 512, true);
  return emulate::launch(1, 32, 768, [&] {
    const int lane = thread_index();
    // The left and the right half of a, each row 16 bytes on from the last.
    copy_chunk(shared_base() + 256 * (lane % 2) + 16 * (lane / 2), a + 8 * lane, true);
    if (lane < 16) copy_chunk(shared_base() + 512 + 16 * lane, b + 8 * lane, true);
    copies_commit();
    copies_wait();
    barrier();
    uint32_t left[4], right[4];
    load_matrices(left, shared_base() + 256 * (lane >> 4) + 16 * (lane & 15));
    load_matrices_transposed(right, shared_base() + 512 + 16 * (lane & 15));
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
    multiply<BFloat16>(sums, left, right[0], right[1]);
    for (int i = 0; i < 4; i++) store_global(c + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, sums[i]);
  });
}
