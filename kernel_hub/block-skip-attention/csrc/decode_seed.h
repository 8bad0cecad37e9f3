// Decode with a filter, before pass 1: the exact scores of the seed, and from them the bounds that
// the filter has to prove.
#pragma once
#include "decode_decide.h"
#include "decode_filter.h"

namespace bsa::BSA_LEVEL {

template <class X>
void decode_seed(const Problem& p, int64_t bh, char* scratch) {
  using T = typename X::Element;
  const Request& rq = p.requests[bh / p.Hkv];
  const Seed seed(p, rq);
  const Seen seen(p, rq, 0, rq.keys());
  const auto* q = pack_rows<X>(p, bh, scratch);
  const auto score = [&](int64_t j0, int64_t j1) {
    const int64_t lo = j0 * p.block_k > seen.lo ? j0 * p.block_k : seen.lo,
                  hi = j1 * p.block_k < seen.hi ? j1 * p.block_k : seen.hi;
    if (lo >= hi) return;
    score_keys<X>(p, bh, q, nullptr, lo, hi - lo);
    finish_scores(p, bh, lo, hi);
    if (p.block_k == 1) return;
    for (int64_t j = j0; j < j1; ++j) block_maxima(p, bh, j);
  };
  score(0, 1);
  score(seed.newest > 1 ? seed.newest : 1, seed.behind < p.NK ? seed.behind : p.NK);

  const int64_t step = p.int8.width / 4 * kQueryParts;
  FilterRow* rows = p.filter_rows + bh * p.rows;
  int32_t* packed = p.filter_q + bh * p.rows * (p.int8.width / 2);
  for (int64_t t = 0; t < p.Lq; ++t) {
    Decider decider(p, bh, t, scratch);  // q is not needed any more
    decider.see_seed();
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t r = t * p.G + g;
      if (decider.sees())
        filter_row(p, bh, row_of<T>(p.q, bh / p.Hkv, bh % p.Hkv * p.G + g, t), decider.bound(g),
                   rows + r, packed + r * step);
      else
        filter_nothing(p, rows + r, packed + r * step);
    }
  }
}

}  // namespace bsa::BSA_LEVEL
