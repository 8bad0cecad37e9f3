// Hopper's own instructions, one thin function each: barriers in shared memory, the bulk tensor
// copy, the vote of a warpgroup, registers moved between warpgroups, and a little arithmetic. The
// matrix products are in wgmma.h.
//
// This header and wgmma.h are the only files with inline PTX. Where the kernels are compiled for
// the CPU (tests), kernel_hub/emulator/sm90_instructions.h stands in for both.
//
// Sources: the PTX ISA, chapters "Asynchronous data copies", "mbarrier" and "setmaxnreg".
#pragma once
#include <cuda.h>

#include "panels.h"

namespace bsa::cuda::sm90 {

using TensorMap = CUtensorMap;

// Where the launch's dynamic shared memory begins. All of it is reached by such addresses.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// All threads of the thread block wait for each other.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// x, which all threads of a warp have alike. The reduction tells the compiler (a shuffle does not):
// it then keeps what follows from x in registers of the warp, where copies and products want their
// addresses.
__device__ __forceinline__ int same_for_warp(int x) {
  return int(__reduce_or_sync(0xffffffff, unsigned(x)));
}

__device__ __forceinline__ bool any_of_warp(bool x) { return __any_sync(0xffffffff, x); }

// ---- Barriers in shared memory. One turns over (its parity flips) when `count` threads have
// arrived and all bytes that were announced to it have come.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// Makes the inits known to the copy engine, before a __syncthreads makes them known to everyone.
__device__ __forceinline__ void barrier_inits_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces `bytes` that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over. On a fresh barrier that holds for parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// ---- The bulk tensor copy: a box of a [batch, head, row, x] tensor, elements outside of it as
// zeros. The box's size, and that it is stored with the 128-byte swizzle, lie in the map.

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int x,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t from) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}

__device__ __forceinline__ void store_zeros_16(uint32_t to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// Puts this thread's own loads and stores of shared memory before later products and copies.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Warps and warpgroups. Their barriers are numbered from 1: 0 is __syncthreads.

// Waits for the 128 threads of warpgroup `group`.
__device__ __forceinline__ void group_sync(int group) {
  asm volatile("barrier.cta.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Whether all 128 threads of warpgroup `group` agree: one instruction. The vote in __all_sync adds
// nothing to the meaning. It tells the compiler that a warp's threads know the same, without which
// it makes the branch on it warp-synchronous by hand, at ten instructions' cost.
__device__ __forceinline__ bool group_agrees(int group, bool agrees) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred mine, all;\n"
      "setp.ne.u32 mine, %1, 0;\n"
      "barrier.cta.red.and.pred all, %2, 128, mine;\n"
      "selp.u32 %0, 1, 0, all;\n}"
      : "=r"(all)
      : "r"(uint32_t(agrees)), "r"(group + 1)
      : "memory");
  return __all_sync(0xffffffff, all != 0);
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Arithmetic.

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What follows is not begun before x >= 0 is known. The branch is never taken; without it the
// compiler puts a wait that needs nothing of x in front of all that x is computed from.
__device__ __forceinline__ void not_before(float x) {
  if (x < 0.0f) asm volatile("trap;");
}

// The larger or smaller of two; NaN if one of them is, which fmaxf and fminf would drop.
__device__ __forceinline__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float smaller(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two floats rounded to T, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (T::kIsBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

}  // namespace bsa::cuda::sm90
