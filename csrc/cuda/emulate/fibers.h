// Fibers: one per CUDA thread. They run in one thread of the host, so every run is the same.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace scfm::cuda::emulate {

class Fibers {
 public:
  // Runs `body` once in each of `count` fibers, which switch with switch_to, until all have returned or one has left.
  void run(int count, const std::function<void()>& body, const std::function<int()>& next);
  // From inside: switch to fiber `index`.
  void switch_to(int index);
  // From inside: end the whole run at once. Kernels own no resources, so nothing leaks.
  [[noreturn]] void leave();
  int current() const { return current_; }
  bool done(int index) const { return fibers_[static_cast<size_t>(index)].done; }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack;
    std::jmp_buf place;
    bool started = false, done = false;
  };
  static void entry();
  void start(int index);

  std::vector<Fiber> fibers_;
  std::jmp_buf home_;
  const std::function<void()>* body_ = nullptr;
  const std::function<int()>* next_ = nullptr;
  int current_ = 0;
};

}  // namespace scfm::cuda::emulate
