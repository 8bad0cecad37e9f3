// Decode's splits: which blocks each visits.
#pragma once
#include "blocks_sm80.cuh"

namespace bsa::cuda {

// What one split visits for one position: up to two blocks of the seed, block 0 and the newest,
// which are never skipped, and then the blocks [begin, end) of its own.
struct SplitBlocks {
  int seeds = 0, first_seed = 0;
  int begin = 0, end = 0;
  int newest = -1;  // the block on the diagonal
  int splits = 1;   // how many share the seed's sum, where keys have no holes
  __device__ __forceinline__ int count() const { return seeds + max(end - begin, 0); }
  __device__ __forceinline__ int at(const Params& p, int t) const {
    if (t < seeds) return t ? newest : first_seed;
    return p.order == kDescending ? end - 1 - (t - seeds) : begin + t - seeds;
  }
};

// Of split `split`, for the position `here`.
template <int kBlockK>
__device__ __forceinline__ SplitBlocks blocks_of_split(const Params& p, const Request& r, int split,
                                                       int here) {
  SplitBlocks b;
  int low = 0, high = ceil_div(r.keys, kBlockK);
  if (p.causal) {
    b.newest = here < 0 ? -1 : here / kBlockK;
    high = min(high, b.newest + 1);
  }
  if (p.window) {
    const int oldest = max(here - p.window + 1, 0);
    low = oldest < r.keys ? oldest / kBlockK : high;
  }
  int first = low, last = high;  // of all splits' own blocks
  if (p.order == kSinkDiagonal) {
    const bool sink = low == 0 && high > 0;
    const bool diagonal = b.newest > 0 && b.newest >= low && b.newest < high;
    b.seeds = sink + diagonal, b.first_seed = sink ? 0 : b.newest;
    first = max(low, 1), last = b.newest == high - 1 ? high - 1 : high;
    if (last > first) b.splits = ceil_div(last, p.split_blocks) - first / p.split_blocks;
  }
  b.begin = max(first, split * p.split_blocks);
  b.end = min(last, (split + 1) * p.split_blocks);
  return b;
}

}  // namespace bsa::cuda
