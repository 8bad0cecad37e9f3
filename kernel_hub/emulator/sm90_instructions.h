// Hopper's instructions for the emulator: stands in for ptx.h and wgmma.h of the sm_90a kernels.
//
// It is made to be unkind where the hardware may be. The boxes of a copy arrive one by one, at once
// or long after; until then their place holds NaN. A product is computed when it is issued or,
// under another seed, only when it is waited for, from what then lies in registers and in shared
// memory. Warps are bound to each other by barriers alone. So a slot that is read too early or
// overwritten too soon, or a register that changes under a product, gives wrong numbers under some
// seed; wrong use of a barrier is an error at once.
//
// It is our reading of the PTX manual: that we read it rightly, only hardware can show.
#pragma once
#include <bit>
#include <map>

#include "cuda_words.h"
#include "sm80_instructions.h"

namespace emulator::sm90 {

// A [batch, head, row, x] tensor of 2-byte elements, as a tensor map describes it.
struct Map {
  const char* data;
  int64_t rows, heads, batches, width;            // elements
  int64_t row_stride, head_stride, batch_stride;  // bytes
  int box_rows;
};

struct Phases {  // a barrier in shared memory
  int count = 0, missing = 0, bytes = 0;
  uint32_t parity = 0;
  void settle() {
    if (missing < 0) fail("a barrier gets more arrivals in a phase than it counts");
    if (missing == 0 && bytes == 0) missing = count, parity ^= 1;
  }
};

struct Box {
  uint32_t to, barrier;
  const Map* map;
  int x, row, head, batch;
};

struct Product {
  float* d;
  int n, add;
  uint64_t a;              // a descriptor, or
  const uint32_t* a_held;  // registers
  uint64_t b;
  bool is_bfloat16, transposed;
};

constexpr uint32_t kStart = 16;  // where dynamic shared memory begins: not at a multiple of 1024
constexpr int kMostThreads = 384, kGroup = 128;

inline std::map<uint32_t, Phases> phases;
inline std::deque<Box> boxes;     // on their way
inline int block_threads = 0;     // of the kernel
inline int begun = 0, ended = 0;  // threads, with the copy engine's warp; of the kernel
inline bool late_products = false;
// Of each thread: its groups of products, of which the last is open.
inline std::deque<std::vector<Product>> products[kMostThreads];

inline unsigned thread() { return threadIdx.x; }
inline unsigned char* at(uint32_t address, size_t bytes, size_t alignment) {
  return shared_pointer(address, bytes, alignment);
}

inline Phases& phases_of(uint32_t barrier) {
  const auto found = phases.find(barrier);
  if (found == phases.end()) fail("a barrier is used that was not initialised");
  return found->second;
}

// ---- Copies

// The 128-byte swizzle, a matter of address bits: 4 to 6 by xor with 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void arrive(const Box& box) {
  const Map& m = *box.map;
  for (int r = 0; r < m.box_rows; ++r)
    for (int x = 0; x < 64; ++x) {
      const int64_t row = int64_t(box.row) + r, column = box.x + x;
      uint16_t value = 0;
      if (row >= 0 && row < m.rows && column >= 0 && column < m.width)
        std::memcpy(&value,
                    m.data + box.batch * m.batch_stride + box.head * m.head_stride +
                        row * m.row_stride + column * 2,
                    2);
      std::memcpy(at(swizzled(box.to + r * 128 + x * 2), 2, 2), &value, 2);
    }
  Phases& barrier = phases_of(box.barrier);
  barrier.bytes -= m.box_rows * 128;
  barrier.settle();
}

inline void load(const Box& box) {
  const size_t bytes = box.map->box_rows * 128;
  std::memset(at(box.to, bytes, 1024), 0xFF, bytes);
  ++totals.copies;
  if (random_number() % 2)
    arrive(box);
  else
    boxes.push_back(box);
}

// The copy engine, as a thread of its own beside the kernel's: brings boxes when it likes.
inline void engine() {
  while (true) {
    wait_until("boxes to copy", [] { return !boxes.empty() || ended == block_threads; });
    if (ended == block_threads && !boxes.empty()) fail("a block ended before its copies did");
    if (boxes.empty()) return;
    if (random_number() % 8) {
      yield();
      continue;
    }
    const size_t i = random_number() % boxes.size();
    const Box box = boxes[i];
    boxes.erase(boxes.begin() + i);
    arrive(box);
  }
}

// Runs `kernel`. Under odd seeds products are late.
template <class F>
void launch(dim3 grid, int threads, size_t shared_bytes, F kernel) {
  const char* seed = std::getenv("BSA_EMULATOR_SEED");
  late_products = seed && std::atoll(seed) % 2, begun = 0, block_threads = threads;
  const auto run_thread = [&] {
    if (begun % (block_threads + kWarp) == 0) {
      phases.clear(), boxes.clear(), ended = 0;
      for (auto& x : products) x.assign(1, {});
    }
    ++begun;
    if (int(thread()) == block_threads) engine();
    if (int(thread()) >= block_threads) return;
    kernel();
    if (products[thread()].size() > 1 || !products[thread()][0].empty())
      fail("a thread ended before its products did");
    ++ended;
  };
  run(grid, dim3(threads + kWarp), shared_bytes + kStart, run_thread, kWarp);
}

// ---- Products

inline float element(uint32_t address, bool is_bfloat16) {
  uint16_t bits;
  std::memcpy(&bits, at(swizzled(address), 2, 2), 2);
  return is_bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// Element (major, minor) of an operand whose minor dimension is contiguous: rows of 128 bytes, 8 of
// which are a step; 64 elements of the minor dimension are a panel.
inline uint32_t place(uint64_t descriptor, int major, int minor) {
  if (descriptor >> 62 != 1) fail("descriptor: expected the 128-byte swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, next = (descriptor >> 16 & 0x3fff) << 4,
                 step = (descriptor >> 32 & 0x3fff) << 4;
  return start + major / 8 * step + major % 8 * 128 + minor / 64 * next + minor % 64 * 2;
}

// One warp's 16 rows of a product; `lanes` are those of its threads.
inline void compute(const Product* const* lanes, int first_row) {
  ++totals.products;
  const Product& p = *lanes[0];
  float a[16][16], b[256][16];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      a[row][k] = p.a_held ? half_of(lanes[row % 8 * 4 + k % 8 / 2]->a_held[k / 8 * 2 + row / 8],
                                     k % 2, p.is_bfloat16)
                           : element(place(p.a, first_row + row, k), p.is_bfloat16);
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < 16; ++k)
      b[n][k] = element(p.transposed ? place(p.b, k, n) : place(p.b, n, k), p.is_bfloat16);
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < p.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[n][k];
      float& d = lanes[lane]->d[i];
      d = p.add ? d + sum : sum;
    }
}

// The warp's group that has waited longest.
inline void compute_first() {
  auto& mine = products[thread()];
  struct {
    const std::vector<Product>* group;
    int first_row;
  } here{&mine.front(), int(thread() % kGroup / kWarp * 16)};
  together("products", here, [](auto** all) {
    for (size_t i = 0; i < all[0]->group->size(); ++i) {
      const Product* lanes[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = &(*all[lane]->group)[i];
      compute(lanes, all[0]->first_row);
    }
  });
  mine.pop_front();
}

inline void commit() {
  products[thread()].emplace_back();
  if (!late_products) compute_first();
}

inline void await(size_t pending) {
  __syncwarp();
  while (products[thread()].size() > pending + 1) compute_first();
}

}  // namespace emulator::sm90

namespace bsa::cuda::sm90 {

using TensorMap = emulator::sm90::Map;

inline uint32_t shared_memory() { return emulator::sm90::kStart; }
inline void block_sync() { __syncthreads(); }
inline int same_for_warp(int x) {
  if (__shfl_sync(0xFFFFFFFFu, x, 0) != x)
    emulator::fail("same_for_warp: the threads of a warp differ");
  return x;
}
inline bool any_of_warp(bool x) { return __any_sync(0xFFFFFFFFu, x); }

inline void barrier_init(uint32_t barrier, uint32_t count) {
  emulator::sm90::at(barrier, 8, 8);
  emulator::sm90::phases[barrier] = {int(count), int(count)};
}
inline void barrier_inits_done() {}
inline void barrier_arrive(uint32_t barrier) {
  auto& phases = emulator::sm90::phases_of(barrier);
  --phases.missing;
  phases.settle();
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emulator::sm90::phases_of(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const auto& phases = emulator::sm90::phases_of(barrier);
  emulator::wait_until("a barrier in shared memory", [&] { return phases.parity != parity; });
}

inline void prefetch_map(const TensorMap*) {}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int row, int head,
                     int batch) {
  emulator::sm90::load({to, barrier, map, x, row, head, batch});
}
inline uint32_t load_shared(uint32_t from) {
  uint32_t x;
  std::memcpy(&x, emulator::sm90::at(from, 4, 4), 4);
  return x;
}
inline void store_zeros_16(uint32_t to) { std::memset(emulator::sm90::at(to, 16, 16), 0, 16); }
inline void fence_async() {}

inline void group_sync(int group) { emulator::meet_at_barrier(group + 1, 128); }
inline bool group_agrees(int group, bool agrees) {
  return emulator::meet_at_barrier(group + 1, 128, agrees).all;
}
template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

inline float exp2_approx(float x) { return std::exp2(x); }
inline void not_before(float) {}
inline float larger(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
inline float smaller(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
template <class T>
uint32_t pack(float low, float high) {
  const auto narrow = T::kIsBFloat16 ? emulator::to_bfloat16 : emulator::to_float16;
  return narrow(low) | uint32_t(narrow(high)) << 16;
}

inline void products_begin() { __syncwarp(); }
inline void products_commit() { emulator::sm90::commit(); }
template <int kPending, int kCount>
void products_wait(float (&)[kCount]) {
  emulator::sm90::await(kPending);
}
template <int kCount>
void hold(float (&)[kCount]) {}
template <class T, int kN>
void product(float (&d)[kN / 2], uint64_t a, uint64_t b, int add) {
  emulator::sm90::products[emulator::sm90::thread()].back().push_back(
      {d, kN, add, a, nullptr, b, T::kIsBFloat16, false});
}
template <class T, int kN, bool kTransposed>
void product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  emulator::sm90::products[emulator::sm90::thread()].back().push_back(
      {d, kN, add, 0, a, b, T::kIsBFloat16, kTransposed});
}

}  // namespace bsa::cuda::sm90
