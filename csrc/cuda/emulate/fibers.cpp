#include "fibers.h"

#include <ucontext.h>

namespace scfm::cuda::emulate {

namespace {
constexpr size_t kStackBytes = 128 * 1024;
Fibers* starting = nullptr;
}  // namespace

// makecontext starts a fiber on its stack; from then on _longjmp switches, which unlike swapcontext makes no system call.
void Fibers::start(int index) {
  Fiber& fiber = fibers_[static_cast<size_t>(index)];
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, &Fibers::entry, 0);
  starting = this;
  setcontext(&context);
}

void Fibers::entry() {
  Fibers& self = *starting;
  (*self.body_)();
  self.fibers_[static_cast<size_t>(self.current_)].done = true;
  const int following = (*self.next_)();
  if (following < 0) self.leave();
  self.switch_to(following);
  __builtin_unreachable();
}

void Fibers::switch_to(int index) {
  Fiber &from = fibers_[static_cast<size_t>(current_)], &to = fibers_[static_cast<size_t>(index)];
  if (!from.done && _setjmp(from.place) != 0) return;
  current_ = index;
  if (to.started) _longjmp(to.place, 1);
  start(index);
}

void Fibers::leave() { _longjmp(home_, 1); }

void Fibers::run(int count, const std::function<void()>& body, const std::function<int()>& next) {
  body_ = &body;
  next_ = &next;
  if (static_cast<int>(fibers_.size()) < count) fibers_.resize(static_cast<size_t>(count));
  for (Fiber& fiber : fibers_) fiber.started = fiber.done = false;
  current_ = 0;
  if (_setjmp(home_) == 0) start(0);
}

}  // namespace scfm::cuda::emulate
