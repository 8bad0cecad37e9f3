// Which rows and blocks a launch is about, and in which order: shared by all kernels. Positions and
// columns count from the request's own first valid key, so that padding changes nothing.
#pragma once
#include "params.h"
#include "ptx_sm80.cuh"

namespace bsa::cuda {

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ Request request_of(const Params& p, int batch) {
  if (p.requests) return p.requests[batch];
  Request r;
  r.keys = p.Lk, r.offset = p.Lk - p.Lq;
  return r;
}

// The first query row that may see a key: those before it stand before the first key.
__device__ __forceinline__ int first_row(const Params& p, const Request& r) {
  if (r.keys == 0) return p.Lq;
  return p.causal ? min(max(-r.offset, 0), p.Lq) : 0;
}

// The row after the one on the last valid key: right padding begins.
__device__ __forceinline__ int end_row(const Params& p, const Request& r) {
  return p.causal ? min(max(r.keys - r.offset, 0), p.Lq) : p.Lq;
}

// The blocks [low, high) that any row of a block row may see, and among them those on the diagonal,
// which are the last ones, or none.
struct Blocks {
  int low = 0, high = 0, diagonal_low = 0, diagonal_high = 0;
  __device__ __forceinline__ int count() const { return max(high - low, 0); }
  __device__ __forceinline__ bool on_diagonal(int block) const {
    return block >= diagonal_low && block < diagonal_high;
  }
};

// Of query rows [start, end).
template <int kBlockK>
__device__ __forceinline__ Blocks blocks_of_rows(const Params& p, const Request& r, int start,
                                                 int end) {
  Blocks blocks;
  blocks.high = ceil_div(r.keys, kBlockK);
  if (p.window) blocks.low = max(r.offset + start - p.window + 1, 0) / kBlockK;
  if (p.causal) blocks.high = min(blocks.high, (r.offset + end - 1) / kBlockK + 1);
  blocks.diagonal_low = blocks.diagonal_high = blocks.high;
  if (p.causal) blocks.diagonal_low = min((r.offset + start) / kBlockK, blocks.high);
  return blocks;
}

// The block visited at step t: block 0, then the diagonal's, then the rest ascending.
__device__ __forceinline__ int visit(const Params& p, const Blocks& blocks, int t) {
  if (p.order == kAscending) return blocks.low + t;
  if (p.order == kDescending) return blocks.high - 1 - t;
  const int sink = blocks.low == 0;
  const int start = max(blocks.diagonal_low, blocks.low + sink);
  const int crossing = max(blocks.diagonal_high - start, 0);
  if (t < sink) return 0;
  return t < sink + crossing ? start + t - sink : blocks.low + t - crossing;
}

// Whether every one of the rows at positions [first, last] sees all of a block's keys.
template <int kBlockK>
__device__ __forceinline__ bool all_visible(const Params& p, const Request& r, int block, int first,
                                            int last) {
  const int column = block * kBlockK;
  return !p.valid && column + kBlockK <= r.keys && (!p.causal || column + kBlockK - 1 <= first) &&
         (!p.window || column > last - p.window);
}

__device__ __forceinline__ bool is_valid(const Params& p, const Request& r, int batch, int column) {
  return column < r.keys && (!p.valid || p.valid[int64_t(batch) * p.Lk + r.first + column] != 0);
}

// Whether the row at `position` sees `column`, which is valid.
__device__ __forceinline__ bool sees(const Params& p, int position, int column) {
  return (!p.causal || column <= position) && (!p.window || column > position - p.window);
}

// Marks a block as skipped. Others may write to the same bytes at the same time.
__device__ __forceinline__ void mark_skipped(const Params& p, int64_t voter_row, int block) {
  const int64_t byte = voter_row * p.skip_bytes + block / 8;
  auto* words = reinterpret_cast<unsigned*>(p.skips);
  atomicOr(words + byte / 4, 1u << (byte % 4 * 8 + block % 8));
}

}  // namespace bsa::cuda
