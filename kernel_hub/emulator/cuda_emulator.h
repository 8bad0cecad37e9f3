// Runs CUDA kernels on the CPU, from the same source, compiled as plain C++.
//
// The idea: a CUDA thread is a fiber. The fibers of a block take turns on one OS thread, and each
// runs until it has to wait for others: at a barrier, or at an instruction that a whole warp
// executes together, which the last lane to arrive executes for all. Blocks run one after another.
// Who runs next is drawn from a seed, and so is whether an asynchronous copy arrives at once or as
// late as the program allows; what depends on such luck goes wrong under some seed. If everyone
// waits, that is a deadlock, and an error that names what they wait for.
//
// Shared memory is addressed as on the device, by 32-bit offsets, and starts out as NaN. It models
// no timing and no memory model: a race that needs two threads at once can stay unseen.
#pragma once
#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulator: " + what);
}

// An asynchronous 16-byte copy; without a source, zeros.
struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  dim3 thread;
  int warp = 0, lane = 0;
  bool started = false, done = false;
  const char* waits_for = nullptr;  // null: ready to run
  bool (*is_over)(void*) = nullptr;
  void* argument = nullptr;
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

// Where the lanes of a warp meet, for one instruction after another.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  uint64_t times = 0;
  void* lanes[kWarp];
};

struct Barrier {
  int arrived = 0;
  uint64_t times = 0;
  bool all = true, any = false, last_all = true, last_any = false;
};

// What is watched over all launches, for tests to look at.
struct Totals {
  uint64_t launches = 0, blocks = 0, products = 0, copies = 0, byte_products = 0;
  uint64_t bank_conflicts = 0;  // of ldmatrix: phases that take longer than one turn
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Barrier barriers[16];
  size_t asleep = 0;  // 1 + a warp; 0: none
  int threads = 0;    // of the kernel: fibers beside those are the emulator's own
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  std::exception_ptr error;
  const std::function<void()>* kernel = nullptr;
};

inline Block* block = nullptr;
inline Fiber* self = nullptr;
inline dim3 grid_size, block_size, block_index;
inline Totals totals;
inline int helpers = 0;  // threads at the end of each block that are not the kernel's
inline uint64_t random_state = 1;
inline bool puts_warps_to_sleep = false;
inline std::mutex one_launch;

inline uint32_t random_number() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7,
      random_state ^= random_state << 17;
  return uint32_t(random_state >> 32);
}

inline void run_fiber() {
  try {
    (*block->kernel)();
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  self->done = true;
  _longjmp(block->scheduler, 1);
}

// Lets others run until `over()`; `what` names the wait in messages.
template <class F>
void wait_until(const char* what, F over) {
  if (over()) return;
  self->waits_for = what;
  self->is_over = [](void* f) -> bool { return (*static_cast<F*>(f))(); };
  self->argument = &over;
  if (_setjmp(self->state) == 0) _longjmp(block->scheduler, 1);
}

// Lets others run once: at a point where the hardware might do so.
inline void yield() {
  bool first = true;
  wait_until("its turn", [&] { return !std::exchange(first, false); });
}

// The whole warp executes `body`, which gets the arguments of all lanes by lane.
template <class Arguments, class Body>
void together(const char* what, Arguments& mine, Body body) {
  Meeting& meeting = block->warps[self->warp];
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what))
    fail(std::string("a warp diverged: ") + meeting.what + " in some lanes, " + what +
         " in others");
  meeting.lanes[self->lane] = &mine;
  const uint64_t before = meeting.times;
  if (++meeting.arrived < kWarp) {
    wait_until(what, [&] { return meeting.times != before; });
    return;
  }
  Arguments* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<Arguments*>(meeting.lanes[i]);
  body(lanes);
  meeting.arrived = 0, ++meeting.times;
}

// Waits at barrier `id` for `threads` threads. Whether all, or any, of them brought `vote`.
struct Votes {
  bool all, any;
};
inline Votes meet_at_barrier(int id, int threads, bool vote = true) {
  Barrier& barrier = block->barriers[id];
  barrier.all &= vote, barrier.any |= vote;
  const uint64_t before = barrier.times;
  if (++barrier.arrived < threads) {
    wait_until("a barrier", [&] { return barrier.times != before; });
  } else {
    barrier.last_all = barrier.all, barrier.last_any = barrier.any;
    barrier.arrived = 0, barrier.all = true, barrier.any = false, ++barrier.times;
  }
  return {barrier.last_all, barrier.last_any};
}

// Counts the caller at barrier `id` without waiting (bar.arrive).
inline void arrive_at_barrier(int id, int threads) {
  Barrier& barrier = block->barriers[id];
  if (++barrier.arrived == threads) {
    barrier.last_all = barrier.all, barrier.last_any = barrier.any;
    barrier.arrived = 0, barrier.all = true, barrier.any = false, ++barrier.times;
  }
}

// Addresses in shared memory, as the device has them: 32 bits.
inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset < 0 || size_t(offset) > block->shared_bytes) fail("not an address in shared memory");
  return uint32_t(offset);
}
inline unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment) {
  if (address % alignment)
    fail("a misaligned address in shared memory: " + std::to_string(address));
  if (address + bytes > block->shared_bytes)
    fail("an access beyond shared memory: " + std::to_string(address));
  return block->shared + address;
}

inline void perform(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}
inline void copy_async(uint32_t to, const void* from, bool wanted) {
  const Copy copy{shared_pointer(to, 16, 16), wanted ? from : nullptr};
  if (wanted && reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from a misaligned address");
  ++totals.copies;
  if (random_number() % 4 == 0)
    perform(copy);
  else
    self->open_group.push_back(copy);
}
inline void commit_copies() {
  self->groups.push_back(std::move(self->open_group));
  self->open_group.clear();
}
inline void wait_for_copies(size_t pending) {
  for (; self->groups.size() > pending; self->groups.pop_front())
    for (const Copy& copy : self->groups.front()) perform(copy);
}

// Lets a fiber run until it waits or ends. Not inlined: locals of its caller survive the jumps.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  self = &fiber;
  fiber.waits_for = nullptr;
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Gives the fibers of a warp that are ready a turn each, from lane `first` on. Whether any ran.
inline bool take_turns_of_warp(size_t warp, int first) {
  bool moved = false;
  for (int i = 0; i < kWarp; ++i) {
    Fiber& fiber = block->fibers[warp * kWarp + (i + first) % kWarp];
    if (fiber.done || (fiber.waits_for && !fiber.is_over(fiber.argument))) continue;
    resume(fiber);
    if (block->error) std::rethrow_exception(block->error);
    moved = true;
  }
  return moved;
}

// Gives every fiber that is ready a turn: warps in another order every time, and their lanes from
// another one. Whether any ran.
//
// Under some seeds one warp at a time sleeps, until nobody else can do anything: so the others get
// as far ahead of it as the program lets them.
inline bool take_turns() {
  const size_t warps = block->warps.size(), first = random_number() % warps;
  const int first_lane = random_number() % kWarp;
  if (!block->asleep && puts_warps_to_sleep && random_number() % 2)
    block->asleep = 1 + random_number() % warps;
  bool moved = false;
  for (size_t i = 0; i < warps; ++i) {
    const size_t warp = (i + first) % warps;
    if (warp + 1 != block->asleep) moved |= take_turns_of_warp(warp, first_lane);
  }
  if (moved || !block->asleep) return moved;
  block->asleep = 0;
  return true;
}

inline void make_fiber(Fiber& fiber, unsigned i) {
  const unsigned plane = block_size.x * block_size.y;
  fiber.thread = {i % block_size.x, i % plane / block_size.x, i / plane};
  fiber.warp = i / kWarp, fiber.lane = i % kWarp;
  fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
}

inline void run_block(const std::function<void()>& kernel, size_t shared_bytes) {
  // NaN in every dtype, aligned as TMA's swizzles want it.
  std::vector<unsigned char> memory(shared_bytes + 1024, 0xFF);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  Block here;
  block = &here;
  here.shared = memory.data() + (1024 - address % 1024) % 1024;
  here.shared_bytes = shared_bytes, here.kernel = &kernel;
  const unsigned count = block_size.x * block_size.y * block_size.z;
  if (count % kWarp) fail("expected whole warps, got " + std::to_string(count) + " threads");
  here.fibers.resize(count), here.warps.resize(count / kWarp), here.threads = int(count) - helpers;
  for (unsigned i = 0; i < count; ++i) make_fiber(here.fibers[i], i);
  while (take_turns()) {
  }
  for (const Fiber& fiber : here.fibers) {
    if (!fiber.done)
      fail("deadlock: lane " + std::to_string(fiber.lane) + " of warp " +
           std::to_string(fiber.warp) + " waits for " + fiber.waits_for);
    for (const auto& group : fiber.groups)
      if (!group.empty()) fail("a thread ended before its asynchronous copies did");
  }
}

// Runs `kernel` as a launch would, and waits for it. The last `helpers_` threads are no threads of
// the kernel, but the emulator's own.
inline void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel,
                int helpers_ = 0) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const char* seed = std::getenv("BSA_EMULATOR_SEED");
  random_state = seed ? std::strtoull(seed, nullptr, 10) * 2 + 1 : 0x9E3779B97F4A7C15;
  puts_warps_to_sleep = seed && std::strtoull(seed, nullptr, 10) / 2 % 2;
  grid_size = grid, block_size = threads, helpers = helpers_, ++totals.launches;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x, ++totals.blocks) {
        block_index = {x, y, z};
        run_block(kernel, shared_bytes);
      }
}

}  // namespace emulator

// For tests: what was watched since the library was loaded.
extern "C" __attribute__((weak, visibility("default"))) const emulator::Totals* emulator_totals() {
  return &emulator::totals;
}
