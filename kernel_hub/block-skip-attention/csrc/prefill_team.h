// A task of prefill: one block row, or of a long input several that walk the keys side by side.
//
// A long K and V do not stay in the caches, and a block row reads all that it sees of them, for 64
// queries. So a team of block rows goes through the keys together, some at a time: the first one
// brings them near, the others find them there. What a row computes does not depend on its team.
#pragma once
#include <optional>

#include "prefill.h"

namespace bsa::BSA_LEVEL {

// Scratch for one block row.
inline size_t prefill_bytes(const Problem& p) {
  auto round = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t widest = p.D > p.Dv ? p.D : p.Dv, step = p.block_k > kLanes ? p.block_k : kLanes;
  return round(kLanes * p.D * 4) + kLanes * in_tiles(p.Dv) * 4 + (kLanes + step) * kLanes * 4 +
         kLanes * kLanes * 2 + kLanes * in_tiles(widest) * 4 + round((kLanes + step) * 8) +
         round(Filter<float>::bytes(p)) + round(kLanes * p.D * 4);
}

// Block rows [t0, t1) of the query heads that share K and V, the longest ones first.
template <class E>
void prefill(const Problem& p, int64_t b, int64_t kv_head, int64_t t0, int64_t t1, char* scratch) {
  std::optional<Prefill<E>> team[kTeam];
  for (int64_t t = t0; t < t1; ++t) {
    team[t - t0].emplace(p, b, kv_head * p.G + t % p.G, p.NQ - 1 - t / p.G);
    team[t - t0]->begin(scratch + (t - t0) * prefill_bytes(p));
  }
  const int64_t stride = (kStride + p.block_k - 1) / p.block_k * p.block_k;
  bool left = true;
  for (int64_t until = stride; left; until += stride) {
    left = false;
    for (int64_t t = t0; t < t1; ++t) left |= team[t - t0]->advance(until);
  }
  for (int64_t t = t0; t < t1; ++t) team[t - t0]->end();
}

}  // namespace bsa::BSA_LEVEL
