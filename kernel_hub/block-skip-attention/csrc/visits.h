// The order in which a block row of prefill visits its blocks.
#pragma once
#include "simd.h"

namespace bsa::BSA_LEVEL {

// Blocks [first, last) as at most three ascending runs. Under kSinkDiagonal: block 0; the blocks
// [diag_lo, diag_hi) that the causal diagonal crosses; the others. Descending order has runs of one
// block and is walked by the caller.
struct Visits {
  int64_t lo[3], hi[3];
  int runs = 0;

  Visits(Order order, int64_t first, int64_t last, int64_t diag_lo, int64_t diag_hi) {
    if (order != kSinkDiagonal) {
      add(first, last);
      return;
    }
    const int64_t from = first > 1 ? first : 1;  // behind the sink block
    add(first, first == 0 ? 1 : first);
    add(diag_lo > from ? diag_lo : from, diag_hi < last ? diag_hi : last);
    add(from, diag_hi > 0 && diag_lo < last ? diag_lo : last);
  }

 private:
  void add(int64_t a, int64_t b) {
    if (a < b) lo[runs] = a, hi[runs] = b, ++runs;
  }
};

}  // namespace bsa::BSA_LEVEL
