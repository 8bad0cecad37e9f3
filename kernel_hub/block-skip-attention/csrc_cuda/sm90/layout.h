// What is fixed when a prefill kernel is compiled, and where things lie in its shared memory.
#pragma once
#include "instructions.h"
#include "panels.h"
#include "walk.h"

namespace bsa::cuda::sm90 {

constexpr int kGroupThreads = 128;                     // a warpgroup
constexpr int kThreads = (kPair + 1) * kGroupThreads;  // the last warpgroup produces
constexpr int kMostShared = 232448;                    // bytes that one thread block may have

template <class Element_, int kD_, int kDv_, int kBlockK_, bool kRule_, bool kOnDemand_,
          bool kGeneral_>
struct Config {
  using Element = Element_;
  static constexpr int kD = kD_, kDv = kDv_, kBlockK = kBlockK_;
  static constexpr bool kRule = kRule_, kOnDemand = kOnDemand_, kGeneral = kGeneral_;
  static constexpr int kQBytes = kPair * kRows * kD * 2;
  static constexpr int kKBytes = kBlockK * kD * 2, kVBytes = kBlockK * kDv * 2;
  // Q has a place of its own; or, if that makes room for a third slot, it comes through K's ring.
  static constexpr bool kQInRegisters = kOnDemand && kQBytes == kKBytes;
  static constexpr int kQPlace = kQInRegisters ? 0 : kQBytes;
  static constexpr int kRoom = kMostShared - 2048 - kQPlace;
  // As deep as there is room for: the copies must outrun the skips.
  static constexpr int kMostSlots = 8, kPairs = kRoom / (kKBytes + kVBytes);
  static constexpr int kVSlots = kOnDemand ? 2 * kPair : least(kPairs, kMostSlots);
  static constexpr int kKSlots = least((kRoom - kVSlots * kVBytes) / kKBytes, kMostSlots);
  static constexpr bool kFits = kKSlots >= 2 && kVSlots >= 2;
};

// Barriers first, then slots at multiples of 1024 bytes.
template <class C>
struct Memory {
  static constexpr int kBarriers = 1 + 2 * (C::kKSlots + C::kVSlots);
  static constexpr int kBytes =
      2048 + C::kQPlace + C::kKSlots * C::kKBytes + C::kVSlots * C::kVBytes;
  static_assert(C::kFits && kBytes <= kMostShared && kBarriers * 8 <= 1024);

  uint32_t barriers, slots;
  __device__ __forceinline__ explicit Memory(uint32_t start)
      : barriers((start + 1023) & ~1023u), slots(barriers + 1024) {}

  __device__ __forceinline__ uint32_t q() const { return slots; }
  __device__ __forceinline__ uint32_t k(int i) const { return slots + C::kQPlace + i * C::kKBytes; }
  __device__ __forceinline__ uint32_t v(int i) const { return k(C::kKSlots) + i * C::kVBytes; }
  __device__ __forceinline__ uint32_t q_full() const { return barriers; }
  __device__ __forceinline__ uint32_t k_full(int i) const { return barriers + 8 + 16 * i; }
  __device__ __forceinline__ uint32_t k_empty(int i) const { return barriers + 16 + 16 * i; }
  __device__ __forceinline__ uint32_t v_full(int i) const { return k_full(C::kKSlots + i); }
  __device__ __forceinline__ uint32_t v_empty(int i) const { return k_empty(C::kKSlots + i); }

  // A slot is full when its bytes are there, and empty when every consumer warp has released it.
  __device__ __forceinline__ void init_barriers() const {
    barrier_init(q_full(), 1);
    for (int i = 0; i < C::kKSlots + C::kVSlots; ++i) {
      barrier_init(k_full(i), 1);
      barrier_init(k_empty(i), kPair * kGroupThreads / 32);
    }
  }
};

// Whose turn it is in a ring, and the parity of the phase that ends when the slot is full.
struct Turn {
  int slots, slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ explicit Turn(int slots_) : slots(slots_) {}
  __device__ __forceinline__ void next() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// Which head of which request.
struct Place {
  int batch, head;
};

struct Maps {
  TensorMap q, k, v;
};

// Asks for the block of K or V that begins at row `key`. Rows before or behind the tensor are
// zeros.
template <class C, int kWidth>
__device__ __forceinline__ void load_block(uint32_t to, const TensorMap* map, uint32_t full,
                                           int key, int kv_head, int batch) {
  barrier_expect(full, C::kBlockK * kWidth * 2);
  for (int x = 0; x < kWidth / kPanel; ++x)
    load_box(to + x * C::kBlockK * kPanelRow, map, full, x * kPanel, key, kv_head, batch);
}

}  // namespace bsa::cuda::sm90
