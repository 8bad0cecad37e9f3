// What one task of prefill covers: a block row of one query head, at most 64 queries, and which
// keys each of them sees.
#pragma once
#include "simd.h"

namespace bsa::BSA_LEVEL {

// Bits [0, n), n <= 64.
BSA_INLINE uint64_t low_bits(int64_t n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }

struct BlockRow {
  const Problem& p;
  const Request& rq;
  const int64_t b, h, i;
  const int64_t row0, rows;  // query rows [row0, row0 + rows)
  const int64_t pos0;        // the key column of the first
  int64_t key_lo, key_hi;    // visible to some row: keys [key_lo, key_hi)
  int64_t diag_lo, diag_hi;  // the blocks that the causal diagonal crosses
  const bool counted;        // right padding is not, nor does it vote ...
  const int64_t voters;      // ... unless there is nothing else in the row

  BlockRow(const Problem& p_, int64_t b_, int64_t h_, int64_t i_)
      : p(p_),
        rq(p_.requests[b_]),
        b(b_),
        h(h_),
        i(i_),
        row0(rq.first_row + i * p.block_q),
        rows(p.Lq - row0 < p.block_q ? p.Lq - row0 : p.block_q),
        pos0(rq.offset + row0),
        counted(rq.end_row > row0),
        voters(counted && rq.end_row - row0 < rows ? rq.end_row - row0 : rows) {
    const int64_t n = rq.keys(), pos1 = pos0 + rows;
    key_hi = p.causal && pos1 < n ? pos1 : n;
    key_lo = first_key(0);
    diag_lo = p.causal ? pos0 / p.block_k : 0;
    diag_hi = p.causal ? (pos1 - 1) / p.block_k + 1 : 0;
  }

  // The first key that the window leaves to row r, valid or not.
  int64_t first_key(int64_t r) const {
    const int64_t from = p.window ? pos0 + r - p.window + 1 : 0;
    return from > 0 ? from : 0;
  }

  // Whether row r sees any key.
  bool sees(int64_t r) const {
    const int64_t end = pos0 + r + 1;
    return rq.count(first_key(r), p.causal && end < rq.keys() ? end : rq.keys()) > 0;
  }

  // How many keys of [lo, hi) some row sees.
  int64_t count(int64_t lo, int64_t hi) const { return rq.count(lo > key_lo ? lo : key_lo, hi); }

  // How many of the blocks [j0, j1) hold such a key; the last one ends at key `end`.
  int64_t count_blocks(int64_t j0, int64_t j1, int64_t end) const {
    if (!rq.before) return j1 - j0;
    int64_t n = 0;
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t a = j * p.block_k;
      n += count(a, a + p.block_k < end ? a + p.block_k : end) > 0;
    }
    return n;
  }

  // Absolute thresholds must keep the diagonal, and the sink if so wished: whether block j, or some
  // block of [j0, j1), is one of those.
  bool forced(int64_t j) const { return forced(j, j + 1); }
  bool forced(int64_t j0, int64_t j1) const {
    return p.threshold.data && ((j0 < diag_hi && j1 > diag_lo) || (j0 == 0 && p.keep_sink));
  }

  // Whether some lane does not see all of the keys [c0, c0 + n): the lowest key of the last row and
  // the highest of the first decide.
  bool is_edge(int64_t c0, int64_t n) const {
    return rows < kLanes || (p.causal && c0 + n - 1 > pos0) ||
           (p.window && c0 <= pos0 + rows - 1 - p.window);
  }

  // Scores s [n][64] of the keys from c0 on become -inf where a lane does not see a key.
  void mask(float* s, int64_t c0, int64_t n) const {
    // Each lane sees the keys lo <= x < hi of the step.
    alignas(64) int32_t lo[kLanes], hi[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t pos = pos0 + r - c0, from = p.window ? pos - p.window + 1 : 0,
                    to = p.causal ? pos + 1 : n;
      lo[r] = int32_t(from < 0 ? 0 : from > n ? n : from);
      hi[r] = int32_t(r >= rows || to < 0 ? 0 : to > n ? n : to);
    }
    for (int64_t x = 0; x < n; ++x) {
      float* row = s + x * kLanes;
      const bool hole = rq.valid && !rq.valid[c0 + x];
      const vi here = int32_t(x) - vi{};
      for (int r = 0; r < kLanes; r += W) {
        const vi sees = (here >= *(const vi_any*)(lo + r)) & (here < *(const vi_any*)(hi + r));
        store(row + r, hole ? splat(-kInf) : sees ? load(row + r) : splat(-kInf));
      }
    }
  }

  // Block j is recorded as skipped.
  void mark(int64_t j) const {
    if (!p.skips) return;
    uint8_t* bits = p.skips + ((b * p.Hq + h) * p.NQ + i) * p.skip_bytes;
    bits[j / 8] |= uint8_t(1 << (j % 8));
  }
};

}  // namespace bsa::BSA_LEVEL
