// Tasks on torch's own threads. Threads take the next task from a counter, so uneven tasks balance;
// what a task computes never depends on which thread runs it, nor on how many there are.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bsa {

// Subnormal numbers count as 0 while this lives: they cost a hundred cycles each and weigh nothing
// here.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Memory that a thread keeps between calls: fresh pages would cost more than many a decoding step.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }
  // Gives back what only an unusually large call needed.
  void trim(size_t most) {
    if (size_ <= most) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Runs task(i, scratch) for each i in [0, n).
template <class Task>
void run_tasks(int64_t n, size_t scratch_bytes, const Task& task) {
  if (n <= 0) return;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    static thread_local Workspace workspace;
    const FlushSubnormals flush;
    char* const scratch = workspace.get(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i, scratch);
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || n == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads < n ? threads : n, 1, work);
  }
}

}  // namespace bsa
