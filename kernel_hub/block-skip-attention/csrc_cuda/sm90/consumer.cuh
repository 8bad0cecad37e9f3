// A consumer warpgroup: one block row, see prefill.cuh.
#pragma once
#include "mask.h"
#include "results.h"

namespace bsa::cuda::sm90 {

template <class C>
struct Consumer {
  using Element = typename C::Element;
  static constexpr int kBlockK = C::kBlockK;
  static constexpr int kDepth = C::kD / kProductDepth;   // products in Q K^T
  static constexpr int kKeys = kBlockK / kProductDepth;  // and in P V

  const Params& p;
  const Maps& maps;
  const Memory<C>& memory;
  const int group, lane, r;  // r: this thread's first row of the block row; the second is r + 8
  const Place at;
  const BlockRow row;
  const Units units;
  RowPair<C::kGeneral> pair;

  uint32_t q[C::kQInRegisters ? kDepth : 1][4];
  float o[C::kDv / 2];         // the output so far, relative to m
  uint32_t weights[kKeys][4];  // P of the block whose product with V is still to come
  Turn k, v, last_v;           // last_v: of that block
  int last_key = 0;            // and its first key
  int visited = 0, skipped = 0;

  __device__ __forceinline__ Consumer(const Params& p_, const Maps& maps_, const Memory<C>& memory_,
                                      int group_, int block_row_pair, Place at_)
      : p(p_),
        maps(maps_),
        memory(memory_),
        group(group_),
        lane(threadIdx.x % 32),
        r(threadIdx.x % kGroupThreads / 32 * 16 + lane / 4),
        at(at_),
        row(p_, at_.batch, kPair * block_row_pair + group_, kBlockK),
        units(p_),
        pair(p_, row, units.unit, at_.batch, at_.head, r),
        k(C::kKSlots),
        v(C::kOnDemand ? 2 : C::kVSlots),
        last_v(v) {}

  __device__ __forceinline__ void run(const Walk& walk) {
#pragma unroll
    for (int x = 0; x < C::kDv / 2; ++x) o[x] = 0.0f;
    take_q();
    bool pending = false;  // the last block is kept, and its V not yet added
    for (int t = 0;; ++t) {
      const bool over = t == walk.steps();
      const int j = over ? 0 : walk.block(t);
      if (over || !walk.belongs(t, j, row)) {
        if (pending) add_last();
        pending = false;
        if (over) break;
        look_on();
      } else {
        pending = pending ? step<true>(j) : step<false>(j);
      }
      pending = same_for_warp(pending);
      k.next();
      if (!C::kOnDemand || pending) last_v = v, v.next();
    }
    write_rows<C::kDv, Element>(p, row, at, r, pair, o);
    clear_unseen<C::kDv>(p, row, at);
    count(p, row, at, visited, skipped);
  }

 private:
  __device__ __forceinline__ void advance(int& t) {
    ++t;
    k.next();
    if constexpr (!C::kOnDemand) last_v = v, v.next();
  }

  // ---- Barriers

  // For the whole warp, once all of it is here. A lane that lags behind in a wait might else find
  // the barrier two phases on, at the parity it waits for no more to end.
  __device__ __forceinline__ void release(uint32_t barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ void take_q() {
    if constexpr (C::kQInRegisters) {
      barrier_wait(memory.k_full(k.slot), k.parity);
      const uint32_t mine = memory.k(k.slot) + group * kRows * C::kD * 2;
#pragma unroll
      for (int x = 0; x < kDepth; ++x)
#pragma unroll
        for (int part = 0; part < 4; ++part) {  // rows r, r + 8; then the next 8 columns
          const int at_row = r + part % 2 * 8, column = x * kProductDepth + part / 2 * 8;
          const int piece = column % kPanel / 8 ^ at_row % kSwizzleRows;
          q[x][part] = load_shared(mine + column / kPanel * kRows * kPanelRow + at_row * kPanelRow +
                                   piece * 16 + lane % 4 * 4);
        }
      fence_async();  // the next copy must not overtake these loads
      release(memory.k_empty(k.slot));
      k.next();
    } else {
      barrier_wait(memory.q_full(), 0);
    }
  }

  // A step of the other warpgroup's.
  __device__ __forceinline__ void look_on() {
    barrier_wait(memory.k_full(k.slot), k.parity);
    release(memory.k_empty(k.slot));
    if constexpr (!C::kOnDemand) pass_v();
  }

  // V of this step is not wanted.
  __device__ __forceinline__ void pass_v() {
    barrier_wait(memory.v_full(v.slot), v.parity);
    release(memory.v_empty(v.slot));
  }

  // On demand, each warpgroup has slots of its own.
  __device__ __forceinline__ int slot_of(const Turn& turn) const {
    return C::kOnDemand ? 2 * group + turn.slot : turn.slot;
  }

  // Asks for V of block j, on demand. The slot is free: what was in it was multiplied before the
  // last vote, which all four warps have passed.
  __device__ __forceinline__ void ask_v(int j) {
    if (threadIdx.x % kGroupThreads == 0)
      load_block<C, C::kDv>(memory.v(slot_of(v)), &maps.v, memory.v_full(slot_of(v)),
                            row.first + j * kBlockK, at.head / p.group, at.batch);
    __syncwarp();
  }

  // V was multiplied.
  __device__ __forceinline__ void drop_v() {
    if constexpr (!C::kOnDemand) release(memory.v_empty(last_v.slot));
  }

  // ---- Products

  __device__ __forceinline__ void multiply_keys(float (&s)[kBlockK / 2]) {
    const uint32_t keys = memory.k(k.slot);
    const uint32_t mine = memory.q() + group * kRows * C::kD * 2;
    products_begin();
#pragma unroll
    for (int x = 0; x < kDepth; ++x) {
      const int panel = x * kProductDepth / kPanel, inside = x * kProductDepth % kPanel * 2;
      const uint64_t b = descriptor(keys + panel * kBlockK * kPanelRow + inside, 16);
      if constexpr (C::kQInRegisters)
        product<Element, kBlockK, false>(s, q[x], b, x > 0);
      else
        product<Element, kBlockK>(s, descriptor(mine + panel * kRows * kPanelRow + inside, 16), b,
                                  x > 0);
    }
    products_commit();
  }

  __device__ __forceinline__ void multiply_values() {
    const uint32_t values = memory.v(slot_of(last_v));
#pragma unroll
    for (int x = 0; x < kKeys; ++x)
      product<Element, C::kDv, true>(
          o, weights[x], descriptor(values + x * kProductDepth * kPanelRow, kBlockK * kPanelRow),
          1);
    products_commit();
  }

  // Waits for V. Behind the request's last key there may be anything, NaN too, which a weight of
  // zero does not remove.
  __device__ __forceinline__ void await_v() {
    barrier_wait(memory.v_full(slot_of(last_v)), last_v.parity);
    const int inside = row.keys - last_key;
    if (inside >= kBlockK || row.first + row.keys == p.Lk) return;
#pragma unroll 1
    for (int x = 0; x < C::kDv / kPanel; ++x)
#pragma unroll 1
      for (int piece = inside * 8 + threadIdx.x % kGroupThreads; piece < kBlockK * 8;
           piece += kGroupThreads)
        store_zeros_16(memory.v(slot_of(last_v)) + x * kBlockK * kPanelRow + piece * 16);
    fence_async();
    group_sync(group);
  }

  // The pending product alone.
  __device__ __forceinline__ void add_last() {
    await_v();
    hold(o);
    products_begin();
    multiply_values();
    products_wait<0>(o);
    drop_v();
  }

  // ---- One block. Returns whether it is kept, and its product with V is pending.
  template <bool kPending>
  __device__ __forceinline__ bool step(int j) {
    float s[kBlockK / 2];
    const bool holes = p.valid && has_holes<kBlockK>(p, row, at.batch, j);
    if constexpr (kPending) await_v();
    barrier_wait(memory.k_full(k.slot), k.parity);
    if constexpr (kPending) hold(o);
    multiply_keys(s);
    if constexpr (kPending) {
      multiply_values();
      products_wait<1>(s);
    } else {
      products_wait<0>(s);
    }
    release(memory.k_empty(k.slot));

    if constexpr (C::kGeneral) {
#pragma unroll
      for (int x = 0; x < kBlockK / 2; ++x) s[x] = units.score(s[x]);
    }
    if (holes || is_edge<kBlockK>(p, row, j)) mask<kBlockK>(s, p, row, at.batch, j, r, holes);
    float fresh[2];
    row_max(s, fresh);
    const bool skip = vote(j, fresh);
    pair.saw(fresh, skip, float(kBlockK));
    if (skip) {
      if constexpr (kPending) {
        products_wait<0>(o);
        drop_v();
      }
      if constexpr (!C::kOnDemand) pass_v();
      return false;
    }
    if constexpr (C::kOnDemand) ask_v(j);
    last_key = j * kBlockK;
    // Not yet `weights` nor `o`: the pending product still reads and writes them.
    float shrink[2];
    pair.weigh(s, fresh, shrink);
    if constexpr (kPending) {
      hold(s);
      not_before(pair.l[0] + pair.l[1]);
      products_wait<0>(o);
      drop_v();
    }
    // Rare once the sink and the diagonal are done.
    if (any_of_warp(shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int x = 0; x < C::kDv / 2; ++x) o[x] *= shrink[x / 2 % 2];
    }
#pragma unroll
    for (int x = 0; x < kBlockK / 4; ++x)
      weights[x / 4][x % 4] = pack<Element>(s[2 * x], s[2 * x + 1]);
    return true;
  }

  __device__ __forceinline__ void row_max(const float (&s)[kBlockK / 2], float (&fresh)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x[4];  // four chains, so that none waits for the other
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = s[2 * e + c / 2 * 4 + c % 2];
#pragma unroll
      for (int n = 8; n < kBlockK / 2; n += 8)
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = larger(x[c], s[n + 2 * e + c / 2 * 4 + c % 2]);
      fresh[e] = quad_max(larger(larger(x[0], x[1]), larger(x[2], x[3])));
    }
  }

  // Whether the warpgroup skips block j; counts it, unless holes leave nobody anything to see.
  __device__ __forceinline__ bool vote(int j, const float (&fresh)[2]) {
    if (p.valid && group_agrees(group, fresh[0] == -kInfinity && fresh[1] == -kInfinity))
      return C::kRule;
    ++visited;
    if constexpr (!C::kRule) return false;
    const bool agree = !row.must_keep(p, j) && pair.agree(p, fresh, float(kBlockK));
    if (!group_agrees(group, agree)) return false;
    ++skipped;
    if (p.skips && threadIdx.x % kGroupThreads == 0) {
      const int64_t bit =
          ((int64_t(at.batch) * p.Hq + at.head) * p.NQ + row.number) * p.skip_bytes * 8 + j;
      atomicOr(reinterpret_cast<unsigned*>(p.skips) + bit / 32, 1u << bit % 32);
    }
    return true;
  }
};

}  // namespace bsa::cuda::sm90
