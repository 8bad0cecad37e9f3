// Prefill on Hopper: a thread block computes two block rows of one query head, 128 queries.
//
// A producer warp streams K through a ring of slots in shared memory; two consumer warpgroups, one
// a block row, multiply. For each block a warpgroup issues the product Q K^T, then the product P V
// of the block before, which runs while it looks at the new scores: row maxima, a vote of its 128
// threads, and only if the block is kept exponentials, rescaling, and a P V of its own. The
// decision is the warpgroup's alone: 64 rows by `block_k` keys.
//
// Versions, from one template, so that what dense attention does not need it does not pay for:
// - kRule = false: no vote, every block is kept.
// - kOnDemand = false: V streams through a second ring, kept or not. A skip saves the exponentials
//   and P V. Both warpgroups use each load of V.
// - kOnDemand = true: a warpgroup asks for V after it voted to keep, into one of its own two slots.
//   A skip saves V's traffic too, but what both keep is loaded twice. No barrier guards those
//   slots: all four warps reach the vote only after the product that read the slot is done.
// - kGeneral: softcap, scales <= 0, the budget rule and the certificate.
//
// Every barrier wait is counted on both sides: a warpgroup that skips a block, or that a block is
// not for, still waits for it and releases it. Without the wait it could release a slot twice
// within one phase, for the other warpgroup that still reads it (tests/test_cuda_sm90_protocol.py).
#pragma once
#include "consumer.cuh"

namespace bsa::cuda::sm90 {

// The one thread that loads what both warpgroups read, always in the same order.
template <class C>
__device__ __forceinline__ void produce(const Params& p, const Maps& maps, const Memory<C>& memory,
                                        const BlockRow (&rows)[kPair], const Walk& walk, Place at) {
  const int first = rows[0].first, kv_head = at.head / p.group;
  const auto load_q = [&](uint32_t to, uint32_t barrier) {
    barrier_expect(barrier, C::kQBytes);
    for (int g = 0; g < kPair; ++g)
      for (int x = 0; x < C::kD / kPanel; ++x)
        load_box(to + (g * C::kD / kPanel + x) * kRows * kPanelRow, &maps.q, barrier, x * kPanel,
                 rows[g].row0, at.head, at.batch);
  };
  Turn k(C::kKSlots), v(C::kVSlots);
  if constexpr (C::kQInRegisters) {
    load_q(memory.k(k.slot), memory.k_full(k.slot));
    k.next();
  } else {
    load_q(memory.q(), memory.q_full());
  }
  for (int t = 0; t < walk.steps(); ++t) {
    const int key = first + walk.block(t) * C::kBlockK;
    barrier_wait(memory.k_empty(k.slot), k.parity ^ 1);
    load_block<C, C::kD>(memory.k(k.slot), &maps.k, memory.k_full(k.slot), key, kv_head, at.batch);
    k.next();
    if constexpr (!C::kOnDemand) {
      barrier_wait(memory.v_empty(v.slot), v.parity ^ 1);
      load_block<C, C::kDv>(memory.v(v.slot), &maps.v, memory.v_full(v.slot), key, kv_head,
                            at.batch);
      v.next();
    }
  }
}

// grid: x: pairs of block rows and, within, the group's heads; y: key/value heads; z: requests.
template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  const Memory<C> memory(shared_memory());
  // Heads of a group follow each other, as they read the same keys; long pairs come first.
  const int pair = (gridDim.x - 1 - blockIdx.x) / p.group;
  const Place at = {int(blockIdx.z), int(blockIdx.y) * p.group + int(blockIdx.x) % p.group};
  const BlockRow rows[kPair] = {BlockRow(p, at.batch, kPair * pair, C::kBlockK),
                                BlockRow(p, at.batch, kPair * pair + 1, C::kBlockK)};
  const Walk walk(rows[0], rows[1]);

  if (threadIdx.x == 0) {
    prefetch_map(&maps.q), prefetch_map(&maps.k), prefetch_map(&maps.v);
    memory.init_barriers();
    barrier_inits_done();
  }
  block_sync();

  // One if with two arms: only then does the compiler give each arm registers of its own.
  const int group = same_for_warp(threadIdx.x / kGroupThreads);
  if (group == kPair) {
    give_registers<24>();
    if (threadIdx.x == kPair * kGroupThreads) produce<C>(p, maps, memory, rows, walk, at);
  } else {
    take_registers<240>();
    Consumer<C>(p, maps, memory, group, pair, at).run(walk);
  }
}

}  // namespace bsa::cuda::sm90
