// Which blocks a block row visits, and in which order two of them walk through K together.
//
// A block row (64 queries) visits block 0, then the blocks on its diagonal, then the others
// ascending. Two neighbours share every load of K, but their diagonals may lie a block apart: the
// pair walks a sequence that holds the sequence of each, and each looks on where a block is not its
// own. A block between the two diagonals comes twice, once for each, as its place in the order
// differs.
#pragma once
#include "../params.h"
#include "instructions.h"

namespace bsa::cuda::sm90 {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kRows = 64;  // of a block row
constexpr int kPair = 2;   // block rows that one thread block computes

constexpr BSA_HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int clamp(int x, int low, int high) { return least(most(x, low), high); }

struct BlockRow {
  int number;
  int first, keys;  // the request's first valid key, and its length; columns count from there
  int row0, rows;   // query rows [row0, row0 + rows)
  int position;     // the column of row0
  int voters;       // the first rows, which vote; the others are right padding
  bool counted;     // not right padding as a whole
  int low, high;    // the blocks that some row may see
  int diagonal;     // of these, the first that the causal diagonal crosses; `high`: none
  int sink, start;  // block 0 if `sink`; then [start, high); then [low + sink, start)

  __device__ __forceinline__ BlockRow(const Params& p, int b, int i, int block_k) {
    number = i;
    first = 0, keys = p.Lk;
    int offset = p.Lk - p.Lq;
    if (p.requests) {
      first = same_for_warp(p.requests[b].first);
      keys = same_for_warp(p.requests[b].keys);
      offset = same_for_warp(p.requests[b].offset);
    }
    const int first_row = keys == 0 ? p.Lq : p.causal ? clamp(-offset, 0, p.Lq) : 0;
    const int end_row = p.causal ? clamp(keys - offset, 0, p.Lq) : p.Lq;
    row0 = first_row + i * kRows;
    rows = clamp(p.Lq - row0, 0, kRows);
    position = offset + row0;
    counted = row0 < end_row;
    voters = counted ? least(end_row - row0, rows) : rows;
    low = 0, high = 0, diagonal = 0, sink = 0, start = 0;
    if (rows == 0) return;
    high = (keys + block_k - 1) / block_k;
    if (p.causal) high = least(high, (position + rows - 1) / block_k + 1);
    if (p.window) low = least(most(position - p.window + 1, 0) / block_k, high);
    diagonal = p.causal ? least(position / block_k, high) : high;
    const bool in_order = p.order == kAscending;
    sink = !in_order && low == 0 && high > 0;
    start = in_order ? high : most(diagonal, low + sink);
  }

  // Whether an absolute threshold must keep block j.
  __device__ __forceinline__ bool must_keep(const Params& p, int j) const {
    return p.threshold.data && ((j >= diagonal && p.causal) || (j == 0 && p.keep_sink));
  }
};

// The sequence of a pair: `sinks` times block 0, then [diagonal, diagonal + crossing), then
// [rest, rest + others).
struct Walk {
  int sinks, diagonal, crossing, rest, others;

  __device__ __forceinline__ Walk(const BlockRow& a, const BlockRow& b) {
    sinks = a.sink | b.sink;
    const Run crossed = join({a.start, a.high}, {b.start, b.high});
    const Run ahead = join({a.low + a.sink, a.start}, {b.low + b.sink, b.start});
    diagonal = crossed.from, crossing = crossed.to - crossed.from;
    rest = ahead.from, others = ahead.to - ahead.from;
  }

  __device__ __forceinline__ int steps() const { return sinks + crossing + others; }

  __device__ __forceinline__ int block(int t) const {
    if (t < sinks) return 0;
    t -= sinks;
    return t < crossing ? diagonal + t : rest + t - crossing;
  }

  // Whether step t, at block j, belongs to `row`.
  __device__ __forceinline__ bool belongs(int t, int j, const BlockRow& row) const {
    if (t < sinks) return row.sink;
    if (t < sinks + crossing) return j >= row.start && j < row.high;
    return j >= row.low + row.sink && j < row.start;
  }

 private:
  struct Run {
    int from, to;
  };
  __device__ __forceinline__ static Run join(Run a, Run b) {
    if (b.from >= b.to) return a.from < a.to ? a : Run{0, 0};
    if (a.from >= a.to) return b;
    return {least(a.from, b.from), most(a.to, b.to)};
  }
};

}  // namespace bsa::cuda::sm90
