// CUDA's own words for the emulator: what a kernel's source uses beyond C++.
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda_emulator.h"

#define __device__
#define __host__
#define __global__
#define __shared__ static  // blocks run one after another, and so may share it
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

using std::max;
using std::min;

inline void __syncthreads() { emulator::meet_at_barrier(0, emulator::block->threads); }
inline int __syncthreads_and(int vote) {
  return emulator::meet_at_barrier(0, emulator::block->threads, vote != 0).all;
}
inline int __syncthreads_or(int vote) {
  return emulator::meet_at_barrier(0, emulator::block->threads, vote != 0).any;
}

inline void expect_whole_warp(unsigned mask) {
  if (mask != 0xFFFFFFFFu) emulator::fail("only whole warps are emulated");
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  expect_whole_warp(mask);
  int nothing = 0;
  emulator::together("syncwarp", nothing, [](int**) {});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  expect_whole_warp(mask);
  struct {
    T in, out;
    int lanes;
  } mine{value, value, lanes};
  emulator::together("shfl.bfly", mine, [](auto** all) {
    for (int i = 0; i < emulator::kWarp; ++i) all[i]->out = all[i ^ all[i]->lanes]->in;
  });
  return mine.out;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  expect_whole_warp(mask);
  struct {
    T in, out;
    int lane;
  } mine{value, value, lane};
  emulator::together("shfl.idx", mine, [](auto** all) {
    for (int i = 0; i < emulator::kWarp; ++i) all[i]->out = all[all[i]->lane % 32]->in;
  });
  return mine.out;
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  expect_whole_warp(mask);
  struct {
    bool vote;
    unsigned votes;
  } mine{vote != 0, 0};
  emulator::together("vote", mine, [](auto** all) {
    unsigned votes = 0;
    for (int i = 0; i < emulator::kWarp; ++i) votes |= unsigned(all[i]->vote) << i;
    for (int i = 0; i < emulator::kWarp; ++i) all[i]->votes = votes;
  });
  return mine.votes;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  expect_whole_warp(mask);
  struct {
    unsigned in, out;
  } mine{value, 0};
  emulator::together("redux.or", mine, [](auto** all) {
    unsigned found = 0;
    for (int i = 0; i < emulator::kWarp; ++i) found |= all[i]->in;
    for (int i = 0; i < emulator::kWarp; ++i) all[i]->out = found;
  });
  return mine.out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFFu; }
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = before | value;
  return before;
}
