// Decode on Hopper: one block of threads computes one split of the keys for one position and GQA
// group, as on sm_80. The splits, the decisions and the arithmetic are those of decode_group.cuh,
// so skips and results are sm_80's, bit by bit; what differs is how K and V come.
//
// What decode needs is bytes on their way. An H200 brings 4.8 TB/s to 132 multiprocessors, 36
// bytes a nanosecond to each, and a load takes 0.8 us, or twice that under load: 30 to 60 KB must
// be on their way at all times, whatever is decided meanwhile. So the bulk copy engine fills a ring
// of at least four blocks of K that knows nothing of decisions: at head size 128, 64 KB of it in
// each of two thread blocks to a multiprocessor. One thread asks, for no registers and no time of
// the others; where a call has fewer thread blocks than there are multiprocessors, the rings are
// twice as deep.
//
// The products are mma.sync's. wgmma with 64 keys as M and the group as N (S^T = K q^T, O^T = V^T
// P^T) would need no ldmatrix, but that is not what is scarce: 16 KB of K pass through ldmatrix in
// 128 cycles, and through memory in 790. It would need P^T in shared memory, at the cost of a
// fence and a barrier for every kept block; with mma.sync, P stays in registers.
//
// There is one barrier of all threads a block, the one at which the warps exchange their maxima. It
// also says that the slot of that block of K, and those of V that were multiplied before it, are
// free: no slot needs a barrier of its own to say so.
//
// V is asked for ahead while few blocks are skipped; once about 30% are, only after the vote. Then
// its product waits until the next block is kept, so that V is on its way beside the next blocks of
// K. A split is short: before it has decided anything, what the call is expected to skip stands in.
// All that is a matter of time alone: it changes no result.
#pragma once
#include "../decode_group.cuh"
#include "layout.h"

namespace bsa::cuda::sm90 {

constexpr int kMultiprocessorShared = 233472;  // bytes, of which each thread block takes 1024 more

// A ring of 2^bits slots, used in turn: where the n-th use is, and the parity of its phase.
struct Ring {
  int bits;
  BSA_HOST_DEVICE int slots() const { return 1 << bits; }
  BSA_HOST_DEVICE int slot(int n) const { return n & (slots() - 1); }
  BSA_HOST_DEVICE uint32_t parity(int n) const { return n >> bits & 1; }
};

struct Rings {
  Ring keys, values;
  // Of two blocks before the first: how many were skipped. V is fetched ahead if 30% are.
  float skipped_before;
};

struct KeyMaps {
  TensorMap k, v;
};

template <class Type_, int kHead_, int kValue_, int kBlockK_>
struct Decode {
  using Type = Type_;
  static constexpr int kHead = kHead_, kValue = kValue_, kBlockK = kBlockK_;
  using Keys = Panels<kBlockK>;
  using Values = Panels<kBlockK>;
  static constexpr int kKeyBytes = kBlockK * kHead * 2, kValueBytes = kBlockK * kValue * 2;
  static constexpr int kTable = 2048;  // barriers, then what the warps exchange

  // Of shared memory, with what it takes to begin at a multiple of 1024.
  static constexpr int bytes(int key_bits, int value_bits) {
    return 1024 + kTable + (kKeyBytes << key_bits) + (kValueBytes << value_bits);
  }
  static constexpr bool fit(int thread_blocks, int key_bits, int value_bits) {
    return bytes(key_bits, value_bits) <= kMultiprocessorShared / thread_blocks - 1024;
  }
  // Side by side on a multiprocessor: two or three if there is room for as many. Four blocks of K,
  // or two where those are of 48 KB.
  static constexpr int kKeyBits = fit(1, 2, 1) ? 2 : 1, kValueBits = fit(3, 2, 2) ? 2 : 1;
  // Alone on it.
  static constexpr int kDeepKeyBits = fit(1, 3, 2) ? 3 : kKeyBits;
  static constexpr int kDeepValueBits = fit(1, kDeepKeyBits, 2) ? 2 : 1;
  static_assert(fit(1, kKeyBits, kValueBits) && fit(1, kDeepKeyBits, kDeepValueBits));
  // At the end the warps' shares of the output meet where K and V were.
  static_assert(kWarps * kMaxGroup * kValue * 4 <= bytes(kKeyBits, kValueBits) - 1024 - kTable);
};

// K and V on their way to shared memory. Everything here is the same for all threads; only the
// first one asks for copies.
template <class C>
struct Feed {
  const KeyMaps& maps;
  const Group<C>& group;
  const Rings rings;
  unsigned char* memory;
  uint32_t at;  // its address
  // V is asked for, and then used or passed over, in the order of the blocks.
  int asked = 0, taken = 0;
  int next;  // the first step whose V was neither asked for nor passed over

  __device__ __forceinline__ Feed(const KeyMaps& maps_, const Group<C>& group_, const Rings& rings_)
      : maps(maps_), group(group_), rings(rings_) {
    const uint32_t start = shared_address(dynamic_shared());
    at = (start + 1023) & ~1023u;
    memory = dynamic_shared() + (at - start);
    next = group.is_first ? 0 : group.blocks.seeds;  // the steps that add values begin here
  }

  __device__ __forceinline__ uint32_t keys_full(int i) const { return at + 8 * i; }
  __device__ __forceinline__ uint32_t values_full(int i) const { return at + 64 + 8 * i; }
  __device__ __forceinline__ uint32_t keys(int t) const {
    return at + C::kTable + rings.keys.slot(t) * C::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t values(int n) const {
    return at + C::kTable + rings.keys.slots() * C::kKeyBytes +
           rings.values.slot(n) * C::kValueBytes;
  }
  __device__ __forceinline__ Exchange& exchange(int t) const {  // in turns: one barrier a block
    return reinterpret_cast<Exchange*>(memory + 128)[t % 2];
  }
  __device__ __forceinline__ float* shares() const {
    return reinterpret_cast<float*>(memory + C::kTable);
  }

  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      prefetch_map(&maps.k), prefetch_map(&maps.v);
      for (int i = 0; i < rings.keys.slots(); ++i) barrier_init(keys_full(i), 1);
      for (int i = 0; i < rings.values.slots(); ++i) barrier_init(values_full(i), 1);
      barrier_inits_done();
    }
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < rings.keys.slots(); ++t) ask_keys(t);
    ask_ahead(0);
  }

  __device__ __forceinline__ int row_of(int t) const {
    return group.r.first + group.block(t) * C::kBlockK;
  }

  // K of step t, if there is one. Its slot must be free.
  __device__ __forceinline__ void ask_keys(int t) {
    if (t < group.count && threadIdx.x == 0)
      load_block<C, C::kHead>(keys(t), &maps.k, keys_full(rings.keys.slot(t)), row_of(t),
                              group.kv_head, group.batch);
  }
  __device__ __forceinline__ void await_keys(int t) const {
    barrier_wait(keys_full(rings.keys.slot(t)), rings.keys.parity(t));
  }

  // V of step t.
  __device__ __forceinline__ void ask_values(int t) {
    if (threadIdx.x == 0) {
      const uint32_t full = values_full(rings.values.slot(asked));
      // What was there before may have been passed over, and still be on its way.
      barrier_wait(full, rings.values.parity(asked) ^ 1);
      load_block<C, C::kValue>(values(asked), &maps.v, full, row_of(t), group.kv_head, group.batch);
    }
    ++asked, next = t + 1;
  }
  // V of the next steps, while few blocks are skipped and there is room. All warps are done with
  // what was taken before `free`.
  __device__ __forceinline__ void ask_ahead(int free) {
#pragma unroll 1
    while (next < group.count && asked - free < rings.values.slots() &&
           10 * (group.skipped + rings.skipped_before) <= 3.0f * (group.decided + 2))
      ask_values(next);
  }
  __device__ __forceinline__ void await_values(int n) const {
    barrier_wait(values_full(rings.values.slot(n)), rings.values.parity(n));
  }
  // Nothing may arrive any more once others use the memory.
  __device__ __forceinline__ void end() const {
    if (threadIdx.x == 0)
      for (int n = max(asked - rings.values.slots(), 0); n < asked; ++n) await_values(n);
  }
};

// Behind the last key that is seen there may be anything, NaN too, which a weight of zero does not
// remove. Each warp clears the keys that it multiplies; behind the tensor there are zeros already.
template <class C>
__device__ __forceinline__ void clear_behind(const Group<C>& group, uint32_t values, int block) {
  const int inside = group.keys_end - block * C::kBlockK;
  if (inside >= C::kBlockK || group.r.first + group.keys_end == group.p.Lk) return;
  const int end = group.my_keys() + group.kMyKeys;
#pragma unroll 1
  for (int panel = 0; panel < C::kValue / kPanel; ++panel)
#pragma unroll 1
    for (int piece = max(inside, group.my_keys()) * 8 + lane_index(); piece < end * 8; piece += 32)
      store_zeros_16(values + panel * C::kBlockK * kPanelRow + piece * 16);
  __syncwarp();
}

// Grid (splits, Lq * Hkv, B).
template <class C>
__global__ void __launch_bounds__(cuda::kThreads)
    decode_kernel(const __grid_constant__ KeyMaps maps, const __grid_constant__ Params p,
                  const __grid_constant__ Rings rings) {
  Group<C> group(p);
  Feed<C> feed(maps, group, rings);
  feed.begin();
  group.begin();

  bool pending = false;  // the block last taken is kept, and its product with V still to come
  int pending_block = 0;
  typename Group<C>::Weights weights;
  const auto add_pending = [&] {
    if (!pending) return;
    const int n = feed.taken - 1;
    feed.await_values(n);
    clear_behind(group, feed.values(n), pending_block);
    group.add(weights, feed.values(n));
    pending = false;
  };

  for (int t = 0; t < group.count; ++t) {
    const int block = group.block(t);
    feed.await_keys(t);
    typename Group<C>::Scores s;
    const float unit = group.score(feed.keys(t), block, s, feed.exchange(t));
    fence_async();  // later copies must not overtake what was read of K and V, or cleared
    __syncthreads();
    feed.ask_keys(t + rings.keys.slots());
    const int free = feed.taken - pending;
    const Decision decision = group.decide(feed.exchange(t), t, block);
    const bool was_asked = group.adds_values(t) && t < feed.next;
    const bool takes = group.adds_values(t) && (was_asked || decision.keep());
    if (takes && !was_asked) feed.ask_values(t);
    feed.next = max(feed.next, t + 1);
    feed.ask_ahead(free);
    // One product pends at most, and before what is passed over: slots come free in turn.
    if (takes || decision.keep()) add_pending();
    if (decision.keep()) {
      group.keep(s, unit, t, decision, weights);
      pending = takes, pending_block = block;
    }
    feed.taken += takes;
    group.saw(decision);
  }
  // The first thread has asked for all: only now may a slot's phase be waited for.
  __syncthreads();
  add_pending();
  feed.end();
  group.end(feed.shares(), feed.exchange(0));
}

}  // namespace bsa::cuda::sm90
