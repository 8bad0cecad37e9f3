// Decode's splits: which blocks each visits; and whose split a block of threads has.
#pragma once
#include "blocks_sm80.cuh"

namespace bsa::cuda {

// What one split visits for one position: up to two blocks of the seed, block 0 and the newest,
// which are never skipped, and then the blocks [begin, end) of its own; or, where some of these are
// proved to be skipped (prove.cuh), the others, which are listed.
struct SplitBlocks {
  int seeds = 0, first_seed = 0;
  int begin = 0, end = 0;
  int own = 0;      // how many blocks are visited after the seed
  int origin = 0;   // the block of step t, or its place in open_blocks, is t further on
  int newest = -1;  // the block on the diagonal
  int splits = 1;   // how many share the seed's sum, where keys have no holes
  __device__ __forceinline__ int at(const Params& p, int t) const {
    if (t < seeds) return t ? newest : first_seed;
    if (p.order == kDescending) return origin - t;
    int block = origin + t;
    if (p.open_blocks) block = __ldg(p.open_blocks + block);
    return block;
  }
  // Only those of the list at `at` of open_blocks are visited: their number, and then they.
  __device__ __forceinline__ void visit_listed(const Params& p, int at) {
    own = p.open_blocks[at], origin = at + 1 - seeds;
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
  b.own = max(b.end - b.begin, 0);
  b.origin = p.order == kDescending ? b.end - 1 + b.seeds : b.begin - b.seeds;
  return b;
}

// What a block of threads in a grid (splits, Lq * Hkv, B) is to do: a split of the keys for one
// position and GQA group, whose heads are the rows of one tensor-core product.
struct Work {
  const Params& p;
  const int split, kv_head, row, batch, first_head;
  const Request r;
  const int here;      // the row's position
  const int vote_row;  // decisions are numbered from the first row that may see a key

  __device__ __forceinline__ explicit Work(const Params& p_)
      : p(p_),
        split(blockIdx.x),
        kv_head(blockIdx.y % p_.Hkv),
        row(blockIdx.y / p_.Hkv),
        batch(blockIdx.z),
        first_head(kv_head * p_.group),
        r(request_of(p_, batch)),
        here(r.offset + row),
        vote_row(p_.causal ? max(row - first_row(p_, r), 0) : row) {}

  // Which head of the group the lane's two rows are; there may be no such head.
  __device__ __forceinline__ static int member(int x) { return lane_index() / 4 + 8 * x; }
  __device__ __forceinline__ bool is_real(int x) const { return member(x) < p.group; }

  __device__ __forceinline__ RowRule read_rule(int x) const {
    return rule_of(p, batch, first_head + (is_real(x) ? member(x) : 0), vote_row);
  }

  // The group's queries at this position; heads lie q.head elements apart.
  __device__ __forceinline__ const uint16_t* queries() const {
    return static_cast<const uint16_t*>(p.q.data) + batch * p.q.batch + first_head * p.q.head +
           row * p.q.row;
  }

  // The same as left factors, straight from global memory; no head, no dimension: zeros.
  template <int kSteps>
  __device__ __forceinline__ void load_q(uint32_t (&q)[kSteps][4]) const {
    const uint16_t* const data = queries();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at_row = lane_index() / 4 + 8 * (i % 2);
        const int column = 16 * step + 2 * (lane_index() % 4) + 8 * (i / 2);
        const bool there = at_row < p.group && column < p.D;
        q[step][i] =
            there ? *reinterpret_cast<const uint32_t*>(data + at_row * p.q.head + column) : 0;
      }
  }

  // Where skip bits count this voter.
  __device__ __forceinline__ int64_t voter_row() const {
    return (int64_t(batch) * p.Hkv + kv_head) * p.NQ + vote_row;
  }

  // Adds to the counts of the group's heads. Positions after the last valid key are padding.
  __device__ __forceinline__ void add_counts(int visited, int skipped) const {
    if (int(threadIdx.x) >= p.group || (p.causal && here >= r.keys)) return;
    auto* counts = p.counts + (int64_t(batch) * p.Hq + first_head + threadIdx.x) * 2;
    if (visited) atomicAdd(counts, static_cast<unsigned long long>(visited));
    if (skipped) atomicAdd(counts + 1, static_cast<unsigned long long>(skipped));
  }

  // Where the split's list is in open_blocks.
  __device__ __forceinline__ int list_at() const {
    return (((batch * p.Hkv + kv_head) * p.Lq + row) * p.splits + split) * (1 + p.split_blocks);
  }
};

}  // namespace bsa::cuda
