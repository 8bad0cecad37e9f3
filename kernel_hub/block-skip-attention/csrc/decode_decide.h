// Decode, pass 2 of 4: which blocks count, for one position of one key/value head, from the scores
// of pass 1 alone.
//
// The G heads of the group vote together. A seed (block 0 and the newest block) is always kept; the
// other blocks are cut into splits of a fixed number of keys that start anew from the seed's max,
// so decisions never depend on threads.
#pragma once
#include "decode_scores.h"

namespace bsa::BSA_LEVEL {

enum Fate : uint8_t { kUnseen = 0, kKept = 1, kSkipped = 2 };

// The running state of one row in a split. c and l are relative to 2^(at * unit), as in Vote.
struct DecodeRow {
  RowRule rule;
  float seed_m, seed_l, seed_at;  // what the seed left
  float m, l, at, c, bound;       // the current split
  float top, total_log_c;         // over all splits: the max of what was kept, and log2 of c
  const float *scores, *block_max;
};

class Decider {
 public:
  Decider(const Problem& p, int64_t bh, int64_t position, char* scratch)
      : p_(p),
        rq_(p.requests[bh / p.Hkv]),
        span_(p, rq_, position),
        bh_(bh),
        t_(position),
        unit_(ScoreUnits(p).unit),
        diagonal_(p.causal ? (rq_.offset + position) / p.block_k : -1),
        budgeted_(p.any_rule && p.budget.data),
        track_(budgeted_ || (p.any_rule && p.dropped)),
        rows_(reinterpret_cast<DecodeRow*>(scratch)),
        fate_(p.fate + (bh * p.Lq + position) * p.NK) {
    const int64_t b = bh / p.Hkv, first_row = position * p.G;
    for (int64_t g = 0; g < p.G; ++g) {
      DecodeRow& r = rows_[g];
      // The rule's block row counts from the first row that sees anything.
      const int64_t i = position - rq_.first_row;
      r.rule = RowRule::of(p, b, (bh % p.Hkv) * p.G + g, i < 0 ? 0 : i, unit_);
      r.m = r.at = r.top = r.total_log_c = -kInf;
      r.l = r.c = 0;
      r.bound = r.rule.bound(-kInf);
      r.scores = p.scores + (bh * p.rows + first_row + g) * p.score_stride;
      r.block_max = p.block_k == 1 ? r.scores : p.block_max + (bh * p.rows + first_row + g) * p.NK;
    }
  }

  void run() {
    memset(fate_, kUnseen, p_.NK);
    if (sees()) walk();
    int64_t visited = 0, skipped = 0;
    for (int64_t j = 0; j < p_.NK; ++j)
      visited += fate_[j] != kUnseen, skipped += fate_[j] == kSkipped;
    const int64_t b = bh_ / p_.Hkv, head = (bh_ % p_.Hkv) * p_.G;
    for (int64_t g = 0; g < p_.G; ++g) {
      p_.row_max[bh_ * p_.rows + t_ * p_.G + g] = rows_[g].top;
      p_.row_c[bh_ * p_.rows + t_ * p_.G + g] = rows_[g].total_log_c;
      if (t_ >= rq_.end_row) continue;  // right padding is not counted
      int64_t* counts = p_.counts + (b * p_.Hq + head + g) * 2;
      __atomic_fetch_add(counts, visited, __ATOMIC_RELAXED);
      __atomic_fetch_add(counts + 1, skipped, __ATOMIC_RELAXED);
    }
    const int64_t i = t_ - rq_.first_row;
    if (p_.skips && i >= 0) {
      uint8_t* bits = p_.skips + (bh_ * p_.NQ + i) * p_.skip_bytes;
      for (int64_t j = 0; j < p_.NK; ++j)
        if (fate_[j] == kSkipped) bits[j / 8] |= uint8_t(1 << (j % 8));
    }
  }

  // From the scores of the seed alone: what a block's max will at least be compared with.
  void see_seed() {
    if (sees()) keep_seed(span_.lo / p_.block_k, (span_.hi - 1) / p_.block_k + 1);
  }
  bool sees() const { return span_.lo < span_.hi; }
  float bound(int64_t head) const { return rows_[head].bound; }

 private:
  void walk() {
    const int64_t first = span_.lo / p_.block_k, last = (span_.hi - 1) / p_.block_k + 1;
    if (!p_.any_rule) {
      keep_all(first, last);
      return;
    }
    if (p_.order == kDescending) {
      for (int64_t j = last; j-- > first;) visit(j);
      end_split();
      return;
    }
    if (p_.order == kAscending) {
      visit_run(first, last);
      end_split();
      return;
    }
    keep_seed(first, last);
    const int64_t from = first > 1 ? first : 1,
                  to = diagonal_ >= 0 && diagonal_ < last ? diagonal_ : last;
    for (int64_t g = 0; g < p_.G; ++g) {
      DecodeRow& r = rows_[g];
      r.top = r.seed_m = r.m, r.seed_l = r.l, r.seed_at = r.at;
    }
    int64_t splits = 0;
    for (int64_t j = from; j < to; j = end_of_split(j, to))
      splits += has_seen(j, end_of_split(j, to));
    for (int64_t j = from; j < to; j = end_of_split(j, to)) {
      if (!has_seen(j, end_of_split(j, to))) continue;
      begin_split(1.0f / float(splits));
      visit_run(j, end_of_split(j, to));
      end_split();
    }
  }

  // Block 0 and the newest block, kept whatever they hold.
  void keep_seed(int64_t first, int64_t last) {
    if (first == 0 && seen(0)) keep(0);
    if (diagonal_ > 0 && diagonal_ >= first && diagonal_ < last && seen(diagonal_)) keep(diagonal_);
  }

  void keep_all(int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) fate_[j] = seen(j) ? kKept : kUnseen;
    for (int64_t g = 0; g < p_.G; ++g) {
      vf top = splat(-kInf);  // vmax(x, top) passes over a NaN x: its weight will tell
      int64_t j = first;
      for (; j + W <= last; j += W) top = vmax(load(rows_[g].block_max + j), top);
      for (; j < last; ++j) top = vmax(splat(rows_[g].block_max[j]), top);
      for (int i = 0; i < W; ++i) rows_[g].top = top[i] > rows_[g].top ? top[i] : rows_[g].top;
    }
  }

  // The first block behind j's split.
  int64_t end_of_split(int64_t j, int64_t to) const {
    const int64_t split = j * p_.block_k / p_.split_k;
    const int64_t end = ((split + 1) * p_.split_k + p_.block_k - 1) / p_.block_k;
    return end < to ? end : to;
  }

  bool has_seen(int64_t j0, int64_t j1) const {
    if (j0 >= j1) return false;
    if (!rq_.before) return true;
    const int64_t a = j0 * p_.block_k, e = j1 * p_.block_k;
    return rq_.count(a > span_.lo ? a : span_.lo, e < span_.hi ? e : span_.hi) > 0;
  }
  bool seen(int64_t j) const { return has_seen(j, j + 1); }

  // Every split starts from what the seed found, and may spend an equal share of its mass.
  void begin_split(float share) {
    for (int64_t g = 0; g < p_.G; ++g) {
      DecodeRow& r = rows_[g];
      r.m = r.seed_m, r.l = r.seed_l * share, r.at = r.seed_at;
      r.c = 0;
      r.bound = r.rule.bound(r.m);
    }
  }

  void end_split() {
    for (int64_t g = 0; g < p_.G; ++g) {
      DecodeRow& r = rows_[g];
      r.top = r.m > r.top ? r.m : r.top;
      if (r.c <= 0) continue;
      const float log_c = __builtin_log2f(r.c) + r.at * unit_;
      const float hi = log_c > r.total_log_c ? log_c : r.total_log_c;
      r.total_log_c =
          hi + __builtin_log2f(__builtin_exp2f(log_c - hi) + __builtin_exp2f(r.total_log_c - hi));
    }
  }

  void visit_run(int64_t j0, int64_t j1) {
    const bool plain = p_.block_k == 1 && !track_ && !rq_.valid && !p_.threshold.data;
    for (int64_t j = j0; j < j1; ++j) {
      if (plain && j + W <= j1 && visit_many(j))
        j += W - 1;
      else
        visit(j);
    }
  }

  // Decides W single-key blocks at once; false if one of them raises a running max, on which the
  // others then depend.
  bool visit_many(int64_t j) {
    vi keep = {};
    for (int64_t g = 0; g < p_.G; ++g) {
      const vf x = load(rows_[g].scores + j);
      const vi rises = ~(x <= rows_[g].m);  // NaN too: let the careful path look at it
      if (any_set(rises)) return false;
      keep |= ~(x < rows_[g].bound);
    }
    typedef uint8_t bytes __attribute__((vector_size(W)));
    const bytes fate =
        __builtin_convertvector(int32_t(kSkipped) + keep, bytes);  // a true compare is -1
    memcpy(fate_ + j, &fate, W);
    return true;
  }

  void visit(int64_t j) {
    if (!seen(j)) return;
    if (p_.any_rule && !forced(j) && agrees(j)) {
      fate_[j] = kSkipped;
    } else {
      keep(j);
    }
  }

  bool forced(int64_t j) const {
    return p_.threshold.data && (j == diagonal_ || (j == 0 && p_.keep_sink));
  }

  bool agrees(int64_t j) {
    for (int64_t g = 0; g < p_.G; ++g)
      if (!(rows_[g].block_max[j] < rows_[g].bound)) return false;
    if (!track_) return true;
    for (int64_t g = 0; g < p_.G; ++g) {
      DecodeRow& r = rows_[g];
      const float x = r.block_max[j];
      follow(r, x);
      if (budgeted_ && x != -kInf && !(r.c + added(r, x) <= r.rule.budget * r.l)) return false;
    }
    for (int64_t g = 0; g < p_.G; ++g) rows_[g].c += added(rows_[g], rows_[g].block_max[j]);
    return true;
  }

  float added(const DecodeRow& r, float x) const {
    return float(p_.block_k) * exp2s((x - (r.at == -kInf ? 0.0f : r.at)) * unit_);
  }

  void follow(DecodeRow& r, float x) const {
    if (!((x - r.at) * unit_ > 20.0f)) return;
    const float factor = exp2s((r.at - x) * unit_);
    r.c *= factor;
    r.l *= factor;
    r.at = x;
  }

  void keep(int64_t j) {
    fate_[j] = kKept;
    for (int64_t g = 0; g < p_.G; ++g) {
      DecodeRow& r = rows_[g];
      const float x = r.block_max[j];
      if (x > r.m) r.m = x, r.bound = r.rule.bound(x);
      if (!budgeted_) continue;
      follow(r, r.m);
      const int64_t a = j * p_.block_k, e = a + p_.block_k;
      const float ref = r.at == -kInf ? 0.0f : r.at;
      for (int64_t c = a > span_.lo ? a : span_.lo; c < (e < span_.hi ? e : span_.hi); ++c)
        r.l += exp2s((r.scores[c] - ref) * unit_);
    }
  }

  const Problem& p_;
  const Request& rq_;
  const Span span_;
  const int64_t bh_, t_;
  const float unit_;
  const int64_t diagonal_;
  const bool budgeted_, track_;
  DecodeRow* const rows_;
  uint8_t* const fate_;
};

static void decode_decide(const Problem& p, int64_t bh, int64_t position, char* scratch) {
  Decider(p, bh, position, scratch).run();
}

}  // namespace bsa::BSA_LEVEL
