// What a warpgroup writes at the end of its block row.
#pragma once
#include "layout.h"
#include "rows.h"

namespace bsa::cuda::sm90 {

// This thread's columns of its two rows; r is the first.
template <int kDv, class Element, bool kTracked>
__device__ __forceinline__ void write_rows(const Params& p, const BlockRow& row, Place at, int r,
                                           const RowPair<kTracked>& pair,
                                           const float (&o)[kDv / 2]) {
  const float* sink = p.sinks ? p.sinks + at.head : nullptr;
  for (int e = 0; e < 2; ++e) {
    const typename RowPair<kTracked>::End end = pair.end(e, sink);
    if (r + 8 * e >= row.rows) continue;
    const int64_t query = row.row0 + r + 8 * e;
    uint32_t* to = reinterpret_cast<uint32_t*>(
        static_cast<uint16_t*>(p.out) +
        ((at.batch * int64_t(p.Lq) + query) * p.Hq + at.head) * kDv + threadIdx.x % 4 * 2);
    // Nothing was kept, or nothing seen: zeros.
#pragma unroll
    for (int x = 0; x < kDv / 8; ++x)
      to[x * 4] = end.factor == 0.0f ? 0u
                                     : pack<Element>(o[4 * x + 2 * e] * end.factor,
                                                     o[4 * x + 2 * e + 1] * end.factor);
    if (threadIdx.x % 4 == 0) {
      const int64_t index = (at.batch * int64_t(p.Hq) + at.head) * p.Lq + query;
      p.lse[index] = end.lse;
      if (p.dropped) p.dropped[index] = end.dropped;
    }
  }
}

// Queries before the first key are in no block row. Those among the i-th 64 are cleared by the
// i-th.
template <int kDv>
__device__ __forceinline__ void clear_unseen(const Params& p, const BlockRow& row, Place at) {
  const int begin = row.number * kRows, first_row = row.row0 - begin;
  const int end = least(least(begin + kRows, p.Lq), first_row);
  for (int query = begin + threadIdx.x % kGroupThreads; query < end; query += kGroupThreads) {
    uint32_t* const to =
        reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) +
                                    ((at.batch * int64_t(p.Lq) + query) * p.Hq + at.head) * kDv);
    for (int x = 0; x < kDv / 2; ++x) to[x] = 0;
    const int64_t index = (at.batch * int64_t(p.Hq) + at.head) * p.Lq + query;
    p.lse[index] = -kInfinity;
    if (p.dropped) p.dropped[index] = 0.0f;
  }
}

__device__ __forceinline__ void count(const Params& p, const BlockRow& row, Place at, int visited,
                                      int skipped) {
  if (!row.counted || threadIdx.x % kGroupThreads != 0) return;
  unsigned long long* const counts = p.counts + (int64_t(at.batch) * p.Hq + at.head) * 2;
  atomicAdd(counts, (unsigned long long)visited);
  atomicAdd(counts + 1, (unsigned long long)skipped);
}

}  // namespace bsa::cuda::sm90
