// Votes on single keys, a step of up to 64 at a time.
//
// One after the other, a vote a key would cost more than a tenth of the products. But most
// decisions do not depend on the keys before: the running max, and with it the bound, lies between
// what it is now and what it would be if all of the step were kept. A key that some lane has above
// the higher bound is kept, one that all lanes have below the lower bound is skipped. Only where
// that leaves keys undecided, and under a budget, are they asked in order.
#pragma once
#include "block_row.h"
#include "vote.h"

namespace bsa::BSA_LEVEL {

// A bit for each of the n <= 64 keys at s [n][64] that is not below its bound in some lane. Lane by
// lane of vectors, as the first often settles it; and where nothing can be skipped, there is most
// often a lane that wants all of the keys. A NaN is no one's minimum.
BSA_INLINE uint64_t reach(const float* s, int64_t n, const float* bound) {
  vf least[4];
  for (int j = 0; j < 4; ++j) least[j] = splat(kInf);
  int64_t x = 0;
  for (; x + 4 <= n; x += 4)
    for (int j = 0; j < 4; ++j) least[j] = vmin(load(s + (x + j) * kLanes), least[j]);
  for (; x < n; ++x) least[0] = vmin(load(s + x * kLanes), least[0]);
  least[0] = vmin(vmin(least[0], least[1]), vmin(least[2], least[3]));
  if (any_not_below(least[0], load(bound))) return low_bits(n);
  uint64_t found = 0;
  for (int i = 0; i < kLanes && found != low_bits(n); i += W) {
    const vf limit = load(bound + i);
    for (int64_t x = 0; x < n; ++x)
      found |= uint64_t(any_not_below(load(s + x * kLanes + i), limit)) << x;
  }
  return found;
}

struct KeyVote : Vote {
  // Which of n <= 64 keys with the scores s [n][64] and maxima `top` are kept. `seen`: keys that
  // are there at all, `forced`: those of them that are kept anyway.
  uint64_t decide(const float* s, int64_t n, uint64_t seen, uint64_t forced, const float* top) {
    alignas(64) float high[kLanes];
    uint64_t kept = 0;
    if (forced || any_not_below64(top, bound) || budgeted) {
      if (budgeted) follow(top);
      const bool rises = any_above64(top, m);
      if (rises || budgeted) highest(top, n, high);
      kept = seen & (forced | reach(s, n, rises || budgeted ? high : bound));
      if (kept == seen) {
        behind = budgeted;
      } else if (budgeted) {
        return in_order_of_budget(s, seen, forced, rises);
      } else if (rises && (seen & ~kept & reach(s, n, bound))) {
        kept = in_order(s, seen, forced);
      }
      if (rises) raise_to(s, n, kept, top);
    }
    if (track) drop(s, seen & ~kept, top);
    return kept;
  }

 private:
  // Bounds that no vote on n more keys with maxima `top` can exceed.
  void highest(const float* top, int64_t n, float* high) const {
    for (int i = 0; i < kLanes; i += W) {
      vf x = limit(vmax(load(top + i), load(m + i)));
      if (budgeted) {
        // What is skipped has c + 2^(score * unit + shift) <= eps l, l at most with all keys in it.
        const vf mass = load(l + i) + float(n) * exp2v(load(top + i) * unit + load(shift + i));
        const vf most = rule.budget * mass * 1.00001f - load(c + i);
        const vf move = load(shift + i), far = move < 0.0f ? -move : move;
        const vf y = (log2_above(vmax(most, splat(1e-30f))) - move + far * 1e-6f) / unit;
        x = y < x ? y : x;
      }
      store(high + i, vmax(x, splat(-kMax)) + load(slack + i));
    }
  }

  // At least log2 of a normal x > 0, and less than 0.1 above it: the chord, moved up.
  static vf log2_above(vf x) {
    return __builtin_convertvector((vi)x, vf) * 1.1920929e-07f - 126.91f;
  }

  uint64_t in_order(const float* s, uint64_t seen, uint64_t forced) {
    uint64_t kept = 0;
    for (uint64_t left = seen; left; left &= left - 1) {
      const uint64_t bit = left & -left;
      const float* row = s + __builtin_ctzll(left) * kLanes;
      if (!(forced & bit) && !any_not_below64(row, bound)) continue;
      kept |= bit;
      if (any_above64(row, m)) raise(row);
    }
    return kept;
  }

  // As account() would, key by key; the reference need not move, as follow() has seen the maxima of
  // all.
  uint64_t in_order_of_budget(const float* s, uint64_t seen, uint64_t forced, bool rises) {
    uint64_t kept = 0;
    vf dropped[kVectors], mass[kVectors], most[kVectors], move[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      dropped[j] = load(c + j * W), mass[j] = load(l + j * W), move[j] = load(shift + j * W);
      most[j] = rule.budget * mass[j] + load(slack + j * W);
    }
    for (uint64_t left = seen; left; left &= left - 1) {
      const uint64_t bit = left & -left;
      const float* row = s + __builtin_ctzll(left) * kLanes;
      vf weight[kVectors], then[kVectors], asked[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        const vf x = load(row + j * W);
        weight[j] = exp2v(x * unit + move[j]);
        then[j] = dropped[j] + weight[j];
        asked[j] = x == -kInf ? x : then[j];  // who sees nothing of the key does not mind
      }
      if (!(forced & bit) && !any_above(asked, most) && !any_not_below64(row, bound)) {
        for (int j = 0; j < kVectors; ++j) dropped[j] = then[j];
        continue;
      }
      kept |= bit;
      for (int j = 0; j < kVectors; ++j) {
        mass[j] += weight[j];
        most[j] = rule.budget * mass[j] + load(slack + j * W);
      }
      if (rises && any_above64(row, m)) raise(row);
    }
    for (int j = 0; j < kVectors; ++j) store(c + j * W, dropped[j]), store(l + j * W, mass[j]);
    return kept;
  }

  // The running max after the keys `kept` of the step.
  void raise_to(const float* s, int64_t n, uint64_t kept, const float* top) {
    if (kept == low_bits(n)) {
      raise(top);
      return;
    }
    alignas(64) float most[kLanes];
    for (int i = 0; i < kLanes; i += W) {
      vf x = splat(-kInf);
      for (uint64_t left = kept; left; left &= left - 1)
        x = vmax(load(s + __builtin_ctzll(left) * kLanes + i), x);
      store(most + i, x);
    }
    raise(most);
  }

  // Enters the skipped keys into c.
  void drop(const float* s, uint64_t skipped, const float* top) {
    if (!skipped) return;
    follow(top);
    for (int i = 0; i < kLanes; i += W) {
      const vf move = load(shift + i);
      vf sum = load(c + i);
      for (uint64_t left = skipped; left; left &= left - 1)
        sum += exp2v(load(s + __builtin_ctzll(left) * kLanes + i) * unit + move);
      store(c + i, sum);
    }
  }
};

}  // namespace bsa::BSA_LEVEL
