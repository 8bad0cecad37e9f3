// What a call's masks say, worked out on the device: requests, and, where keys have holes, how many
// splits decode has. Small kernels, for calls with masks only.
#pragma once
#include "splits.cuh"

namespace bsa::cuda {

// How many splits have a block that the position sees, besides the seed; at least 1. Grid (Lq, B).
template <int kBlockK>
__global__ void __launch_bounds__(kThreads)
    count_splits_kernel(const __grid_constant__ Params p, int32_t* found) {
  __shared__ int count;
  const int row = blockIdx.x, batch = blockIdx.y;
  const Request r = request_of(p, batch);
  const int here = r.offset + row;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  for (int split = warp_index(); split < p.splits; split += kWarps) {
    const SplitBlocks blocks = blocks_of_split<kBlockK>(p, r, split, here);
    const int end = min(blocks.end * kBlockK, r.keys);
    bool any = false;
    for (int base = blocks.begin * kBlockK; base < end && !any; base += 32) {
      const int column = base + lane_index();
      any = __any_sync(kAllLanes,
                       column < end && is_valid(p, r, batch, column) && sees(p, here, column));
    }
    if (any && lane_index() == 0) atomicAdd(&count, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) found[batch * p.Lq + row] = max(count, 1);
}

// Where each request begins and ends; grid (B). `q_offset` is [1] or [B], or null.
__global__ void __launch_bounds__(kThreads)
    requests_kernel(const __grid_constant__ Params p, const int64_t* q_offset, int offset_stride,
                    Request* requests) {
  __shared__ int low, high;
  const int batch = blockIdx.x;
  if (threadIdx.x == 0) low = p.Lk, high = 0;
  __syncthreads();
  if (p.valid) {
    const uint8_t* valid = p.valid + int64_t(batch) * p.Lk;
    int lowest = p.Lk, highest = 0;
    for (int i = threadIdx.x; i < p.Lk; i += kThreads)
      if (valid[i]) lowest = min(lowest, i), highest = i + 1;
    atomicMin(&low, lowest);
    atomicMax(&high, highest);
  }
  __syncthreads();
  if (threadIdx.x) return;
  Request r;
  r.first = p.valid && high ? low : 0;
  r.keys = (p.valid ? high : p.Lk) - r.first;
  const int64_t offset = q_offset ? q_offset[batch * offset_stride] : p.Lk - p.Lq;
  r.offset = int(offset) - r.first;
  requests[batch] = r;
}

}  // namespace bsa::cuda
