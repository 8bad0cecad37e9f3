// Which keys of a block a thread's two rows see.
#pragma once
#include "instructions.h"
#include "walk.h"

namespace bsa::cuda::sm90 {

// Whether some row does not see all of block j.
template <int kBlockK>
__device__ __forceinline__ bool is_edge(const Params& p, const BlockRow& row, int j) {
  const int c0 = j * kBlockK, last = c0 + kBlockK - 1;
  return last >= row.keys || (p.causal && last > row.position) ||
         (p.window && c0 <= row.position + kRows - 1 - p.window);
}

// Whether a key of block j is invalid, for the whole warp.
template <int kBlockK>
__device__ __forceinline__ bool has_holes(const Params& p, const BlockRow& row, int batch, int j) {
  const uint8_t* valid = p.valid + int64_t(batch) * p.Lk + row.first;
  bool all = true;
#pragma unroll 1
  for (int x = j * kBlockK + threadIdx.x % 32; x < least((j + 1) * kBlockK, row.keys); x += 32)
    all &= valid[x] != 0;
  return !__all_sync(0xffffffff, all);
}

// Scores s of block j become -inf where a row does not see a key; r is the thread's first row.
template <int kBlockK>
__device__ __forceinline__ void mask(float (&s)[kBlockK / 2], const Params& p, const BlockRow& row,
                                     int batch, int j, int r, bool holes) {
  const int c0 = j * kBlockK + threadIdx.x % 4 * 2;  // this thread's columns count from here
  uint32_t here = ~0u;                               // bit x: its x-th column is valid
  if (holes) {
    const uint8_t* valid = p.valid + int64_t(batch) * p.Lk + row.first + c0;
#pragma unroll 1
    for (int x = 0; x < kBlockK / 4; ++x) {
      const int column = x / 2 * 8 + x % 2;
      if (column < row.keys - c0 && !valid[column]) here &= ~(1u << x);
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int position = row.position + r + 8 * e;
    const int end = (p.causal ? least(position + 1, row.keys) : row.keys) - c0;
    const int begin = (p.window ? position - p.window + 1 : 0) - c0;
#pragma unroll
    for (int x = 0; x < kBlockK / 4; ++x) {
      const int column = x / 2 * 8 + x % 2;
      const bool sees = column >= begin && column < end && (here >> x & 1);
      float& score = s[x / 2 * 4 + 2 * e + x % 2];
      score = sees ? score : -kInfinity;
    }
  }
}

}  // namespace bsa::cuda::sm90
