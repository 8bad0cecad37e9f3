// The rows of one block row, and how they vote on a block.
//
// Scores stay in the units in which the product made them; `unit` > 0 turns them into base-2
// logarithms. Thresholds are turned into those units instead, once, so a vote costs one comparison
// a lane: a block is skipped if its max is below `bound` in every lane. A NaN is below nothing,
// hence never skipped. A lane that sees nothing of a block has max -inf, which is below every
// bound, as no bound is ever lower than the lowest finite float.
//
// The bound c on the dropped mass and the sum l of the kept mass (both only where they are asked
// for) are kept relative to a reference score that follows the running max loosely, so that
// rescaling is rare.
#pragma once
#include "units.h"

namespace bsa::BSA_LEVEL {

constexpr float kLargestLogLambda = -5.9604645e-08f;  // log(1 - 2^-24): lambda stays below 1

// The three conditions of one row, in score units; `relative` and `absolute` +inf where the
// condition is absent.
struct RowRule {
  float relative = kInf, absolute = kInf, budget = kInf;
  static RowRule of(const Problem& p, int64_t b, int64_t h, int64_t i, float unit) {
    RowRule r;
    if (p.log_lambda.data) {
      const float x = p.log_lambda.at(b, h, i);
      r.relative = x == x ? (x < kLargestLogLambda ? x : kLargestLogLambda) * kLog2e / unit : -kInf;
    }
    if (p.threshold.data) {
      const float x = p.threshold.at(b, h, i) * kLog2e / unit;
      r.absolute = x == x ? x : -kInf;
    }
    // A budget too small for the arithmetic (or NaN) allows nothing; below 0 nothing passes the
    // comparison.
    if (p.budget.data) r.budget = p.budget.at(b, h, i) > 1e-30f ? p.budget.at(b, h, i) : -1.0f;
    return r;
  }
  // What a block's max must stay below, given the running max m.
  float bound(float m) const {
    float x = m + relative;
    x = x < absolute ? x : absolute;
    return x > -kMax ? x : -kMax;
  }
};

struct alignas(64) Vote {
  float m[kLanes], bound[kLanes];
  float slack[kLanes];  // 0, or +inf in a lane that has no vote
  float c[kLanes], l[kLanes], at[kLanes], shift[kLanes], c_then[kLanes];  // shift: -at * unit
  RowRule rule;
  float unit;
  int64_t block_k;
  bool active, track, budgeted;
  bool behind = false;  // l lacks what is kept but not yet added to the output

  // The first `voters` lanes vote; the others go along with them.
  void start(const Problem& p, const RowRule& row_rule, float unit_, int64_t voters, bool active_) {
    rule = row_rule;
    unit = unit_;
    block_k = p.block_k;
    active = active_ && p.any_rule;
    budgeted = active && p.budget.data;
    track = active && (budgeted || p.dropped);
    for (int i = 0; i < kLanes; ++i) {
      m[i] = at[i] = -kInf;
      c[i] = l[i] = shift[i] = 0;
      slack[i] = i < voters ? 0.0f : kInf;
      bound[i] = rule.bound(-kInf) + slack[i];
    }
  }

  // Whether every lane agrees to skip a block whose maxima are `top`. What is skipped is entered
  // into c.
  BSA_INLINE bool skip(Vote& t, const float* top) {
    if (!t.active || any_not_below64(top, t.bound)) return false;
    return !t.track || t.account(top);
  }

  bool account(const float* top) {
    follow(top);
    if (!budgeted) {
      for (int i = 0; i < kLanes; i += W) store(c + i, then(top, i));
      return true;
    }
    bool agreed = true;
    for (int i = 0; i < kLanes; i += W) {
      const vf c_new = then(top, i);
      store(c_then + i, c_new);
      // `not <=`, so that NaN does not agree either.
      agreed &= !any_set(~(c_new <= rule.budget * load(l + i)) & (load(top + i) != -kInf) &
                         (load(slack + i) == 0.0f));
    }
    if (agreed) memcpy(c, c_then, sizeof(c));
    return agreed;
  }

  // c with a block of maxima `top` dropped too, for the lanes from i on.
  vf then(const float* top, int i) const {
    return load(c + i) + float(block_k) * exp2v(load(top + i) * unit + load(shift + i));
  }

  // Enters a kept block's maxima. Its mass, if the budget asks for it, is known once the block has
  // been added to the output; until then votes cannot go on.
  BSA_INLINE void keep(Vote& t, const float* top) {
    if (any_above64(top, t.m)) t.raise(top);
    t.behind = t.budgeted;
  }

  // The mass kept so far: `sum` relative to 2^(reference * unit).
  void catch_up(const float* sum, const float* reference) {
    behind = false;
    follow(m);
    for (int i = 0; i < kLanes; i += W) {
      const vf from = load(reference + i), to = load(at + i);
      const vf factor = exp2v((from - to) * unit);
      store(l + i, load(sum + i) > 0.0f ? load(sum + i) * factor : vf{});  // not 0 * NaN
    }
  }

  void raise(const float* top) {
    for (int i = 0; i < kLanes; i += W) {
      const vf raised = vmax(load(top + i), load(m + i));  // a NaN leaves m as it is
      store(m + i, raised);
      if (active) store(bound + i, limit(raised) + load(slack + i));
    }
  }

  // RowRule::bound for a vector of lanes.
  vf limit(vf max) const {
    vf x = max + rule.relative;
    x = x < rule.absolute ? x : splat(rule.absolute);
    return vmax(x, splat(-kMax));
  }

  // Moves the reference up to `top` in the lanes where it has fallen 2^20 behind.
  void follow(const float* top) {
    for (int i = 0; i < kLanes; i += W) {
      const vf x = load(top + i), ref = load(at + i);
      const vi far = (x - ref) * unit > 20.0f;  // from -inf: infinitely far; -inf - -inf: not far
      if (!any_set(far)) continue;
      const vf next = far ? x : ref;
      const vf factor = far ? exp2v((ref - x) * unit) : splat(1.0f);
      store(at + i, next);
      store(shift + i, next == -kInf ? vf{} : -next * unit);
      store(c + i, load(c + i) * factor);
      store(l + i, load(l + i) * factor);
    }
  }
};

}  // namespace bsa::BSA_LEVEL
