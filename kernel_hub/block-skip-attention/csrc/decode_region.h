// Decode, pass 1 of 4, for one region of keys: all of its scores, or, with a filter, only those
// that it leaves open.
#pragma once
#include "decode_filter.h"
#include "decode_scores.h"

namespace bsa::BSA_LEVEL {

// What the filter proves to be skipped gets -inf for a score, which decide() skips as well.
class FilteredScores {
 public:
  FilteredScores(const Problem& p, int64_t bh, const Seen& seen, int32_t* keys)
      : p_(p), bh_(bh), seen_(seen), seed_(p, p.requests[bh / p.Hkv]), keys_(keys) {}

  template <class X>
  void run(const typename X::Query* q) {
    OpenKeys open(p_, bh_, seen_.lo, p_.requests[bh_ / p_.Hkv].first);
    const int64_t n = choose(open, sizeof(typename X::Element));
    score_keys<X>(p_, bh_, q, keys_, 0, n);
    if (p_.requests[bh_ / p_.Hkv].valid) finish_scores(p_, bh_, seen_.lo, seen_.hi);
    if (p_.block_k == 1) return;
    for (int64_t j = seen_.lo / p_.block_k; j * p_.block_k < seen_.hi; ++j) {
      if (seed_.has(j)) continue;  // decode_seed() has seen to it
      if (open.any(begin(j), end(j))) {
        block_maxima(p_, bh_, j);
      } else {
        for (int64_t r = 0; r < p_.rows; ++r) p_.block_max[(bh_ * p_.rows + r) * p_.NK + j] = -kInf;
      }
    }
  }

 private:
  int64_t begin(int64_t j) const { return j * p_.block_k < seen_.lo ? seen_.lo : j * p_.block_k; }
  int64_t end(int64_t j) const {
    return (j + 1) * p_.block_k > seen_.hi ? seen_.hi : (j + 1) * p_.block_k;
  }

  // Names the keys whose exact scores are needed; returns how many.
  int64_t choose(OpenKeys& open, int64_t key_bytes) {
    FilterTrust trust(p_, bh_);
    if (trust.sits_out()) return list(open);
    // What a scan costs beside an exact pass, with something on top.
    const float pays = key_bytes == 4 ? 0.4f : 0.65f;
    const int64_t wide = p_.block_k > kLanes ? p_.block_k : kLanes;
    const int64_t middle = (seen_.lo + seen_.hi) / 2 / wide * wide;
    Seen probe = seen_;
    if (!trust.trusted()) {
      probe.lo = middle > seen_.lo ? middle : seen_.lo;
      probe.hi = middle + wide < seen_.hi ? middle + wide : seen_.hi;
    }
    open.scan(probe.lo, probe.hi);
    int64_t n = list(open);
    const auto saved = [&](const Seen& x) {
      return float(seen_.hi - seen_.lo - n) >= pays * float(x.hi - x.lo);
    };
    if (!trust.trusted() && saved(probe)) {
      open.scan(seen_.lo, seen_.hi);
      n = list(open);
      probe = seen_;
    }
    trust.report(saved(probe));
    return n;
  }

  int64_t list(OpenKeys& open) {
    if (p_.block_k == 1) return list_single(open);
    int64_t n = 0;
    for (int64_t j = seen_.lo / p_.block_k; j * p_.block_k < seen_.hi; ++j)
      if (!seed_.has(j) && open.any(begin(j), end(j)))
        for (int64_t c = begin(j); c < end(j); ++c) keys_[n++] = int32_t(c);
    return n;
  }

  // Blocks of one key: scores are their maxima.
  int64_t list_single(OpenKeys& open) {
    for (int64_t r = 0; r < p_.rows; ++r) {
      float* x = p_.scores + (bh_ * p_.rows + r) * p_.score_stride;
      for (int64_t c = seen_.lo; c < seen_.hi; ++c) x[c] = -kInf;
    }
    if (seen_.lo == 0) open.keep(0);
    for (int64_t c = seed_.newest; c < seed_.behind; ++c)
      if (c >= seen_.lo && c < seen_.hi) open.keep(c);
    return open.list(seen_.lo, seen_.hi, keys_);
  }

  const Problem& p_;
  const int64_t bh_;
  const Seen seen_;
  const Seed seed_;
  int32_t* const keys_;
};

template <class X>
void decode_scores(const Problem& p, int64_t bh, int64_t region, char* scratch) {
  const Request& rq = p.requests[bh / p.Hkv];
  const int64_t c0 = region * p.region, c1 = c0 + p.region < rq.keys() ? c0 + p.region : rq.keys();
  if (c0 >= c1) return;
  // A region that no row sees (behind a window, or beyond the newest token) is not read.
  const Seen seen(p, rq, c0, c1);
  if (seen.lo >= seen.hi) return;
  const auto* q = pack_rows<X>(p, bh, scratch);
  if (p.filter_rows) {
    auto* keys = reinterpret_cast<int32_t*>(scratch + p.rows * X::padded(p.D) * sizeof(*q));
    FilteredScores(p, bh, seen, keys).run<X>(q);
    return;
  }
  score_keys<X>(p, bh, q, nullptr, seen.lo, seen.hi - seen.lo);
  finish_scores(p, bh, seen.lo, seen.hi);
  if (p.block_k == 1) return;
  for (int64_t j = seen.lo / p.block_k; j * p.block_k < seen.hi; ++j) block_maxima(p, bh, j);
}

}  // namespace bsa::BSA_LEVEL
