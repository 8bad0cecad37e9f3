// The largest score of decode's seed, block 0 and the newest block, before decode itself.
#pragma once
#include "splits.cuh"

namespace bsa::cuda {

__device__ __forceinline__ float max_of_quad(float x) {
  x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The largest score of the seed, of each of the lane's two rows: the very products that decode
// computes. NaN if there is one.
template <class Type, int kHead>
__device__ __forceinline__ void max_of_seed(const Work& w, const SplitBlocks& blocks,
                                            float (&most)[2]) {
  constexpr int kSteps = kHead / 16;
  __shared__ float told[kWarps][kMaxGroup];
  const Params& p = w.p;
  uint32_t q[kSteps][4];
  w.load_q(q);
  most[0] = most[1] = kMinusInfinity;
  const auto* const keys = static_cast<const uint16_t*>(p.k.data) + w.batch * p.k.batch +
                           w.kv_head * p.k.head + w.r.first * p.k.row;
  for (int t = 0; t < blocks.seeds; ++t)
    for (int i = 8 * warp_index(); i < p.block_k; i += 8 * kWarps) {
      const int first = blocks.at(p, t) * p.block_k + i, column = first + lane_index() / 4;
      const uint16_t* const key = keys + int64_t(column) * p.k.row;
      float s[1][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t k[2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int d = 16 * step + 8 * x + 2 * (lane_index() % 4);
          const bool there = column < w.r.keys && d < p.D;
          k[x] = there ? *reinterpret_cast<const uint32_t*>(key + d) : 0;
        }
        multiply<Type>(s[0], q[step], k[0], k[1]);
      }
      hide_scores(p, w.r, w.batch, {{w.here, w.here}, {w.is_real(0), w.is_real(1)}}, first, s);
      for (int x = 0; x < 2; ++x)
        most[x] = max_or_nan(most[x], max_or_nan(s[0][2 * x], s[0][2 * x + 1]));
    }
  for (int x = 0; x < 2; ++x) {
    most[x] = max_of_quad(most[x]);
    if (lane_index() % 4 == 0) told[warp_index()][w.member(x)] = most[x];
  }
  __syncthreads();
  for (int x = 0; x < 2; ++x)
    for (int warp = 0; warp < kWarps; ++warp)
      most[x] = max_or_nan(most[x], told[warp][w.member(x)]);
}

}  // namespace bsa::cuda
