// Decode's filter: from an int8 copy of K, which keys could reach what the exact test compares
// with.
//
// Every split of a row starts from the running max that the seed gave, and a running max only
// rises: a key whose score is proved to lie below the bound that follows from the seed is below
// every bound it will ever be compared with. The proof: docs/int8-filter.md.
#pragma once
#include "int8_keys.h"

namespace bsa::BSA_LEVEL {

// acc + the products of four unsigned bytes of each lane of k with four signed ones of q. Without
// an instruction for it, q comes as two pairs of 16 bits: channels 0 and 2, and 1 and 3.
#if BSA_ISA >= 3
constexpr int kQueryParts = 1;
BSA_INLINE vi dot4(vi acc, vi k, const int32_t* q) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)k, _mm512_set1_epi32(q[0]));
}
#else
constexpr int kQueryParts = 2;
BSA_INLINE vi pairs(vi k, vi q) {
#if BSA_ISA >= 2
  return (vi)_mm512_madd_epi16((__m512i)k, (__m512i)q);
#elif BSA_ISA >= 1
  return (vi)_mm256_madd_epi16((__m256i)k, (__m256i)q);
#elif defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)k, (__m128i)q);
#else
  return (k & 0xffff) * ((q << 16) >> 16) + (k >> 16) * (q >> 16);
#endif
}
BSA_INLINE vi dot4(vi acc, vi k, const int32_t* q) {
  const vi even = k & 0x00ff00ff, odd = (k >> 8) & 0x00ff00ff;
  return acc + pairs(even, q[0] - vi{}) + pairs(odd, q[1] - vi{});
}
#endif

// A bit for each lane of a comparison.
BSA_INLINE uint64_t lane_bits(vi mask) {
#if BSA_ISA >= 2
  return _mm512_movepi32_mask((__m512i)mask);
#elif BSA_ISA >= 1
  return uint64_t(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return uint64_t(_mm_movemask_ps((__m128)mask));
#else
  uint64_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint64_t(mask[i] & 1) << i;
  return bits;
#endif
}

// Asks for the copy this many bytes ahead of its use: the hardware stops at every page.
constexpr int64_t kScanAhead = 12288;

// Which of the 64 keys of a chunk may reach the bound of one of RR rows.
template <int RR>
BSA_INLINE uint64_t open_keys(const uint8_t* plane, int64_t width, const FilterRow* rows,
                              const int32_t* q, int64_t step) {
  const float* bounds = reinterpret_cast<const float*>(plane + kLanes * width);
  uint64_t open = 0;
  for (int at = 0; at < kLanes; at += kGroupLanes) {
    vi acc[RR][NR];
    for (int r = 0; r < RR; ++r)
      for (int j = 0; j < NR; ++j) acc[r][j] = rows[r].start - vi{};
    const int32_t* k = reinterpret_cast<const int32_t*>(plane) + at;
    for (int64_t d = 0; d < width / 4; ++d, k += kLanes) {
      vi x[NR];
      for (int j = 0; j < NR; ++j) x[j] = *reinterpret_cast<const vi_any*>(k + j * W);
      for (int j = 0; j < kGroupLanes; j += 16) __builtin_prefetch(k + kScanAhead / 4 + j);
      for (int r = 0; r < RR; ++r)
        for (int j = 0; j < NR; ++j)
          acc[r][j] = dot4(acc[r][j], x[j], q + r * step + d * kQueryParts);
    }
    for (int j = 0; j < NR; ++j) {
      const float* y = bounds + at + j * W;
      for (int i = 0; i < 3; ++i) __builtin_prefetch(y + i * kLanes + kScanAhead / 4);
      const vf unit = load(y), copied = load(y + kLanes), rest = load(y + 2 * kLanes);
      vi proved = unit > 0.0f;
      for (int r = 0; r < RR; ++r) {
        const vf most = __builtin_convertvector(acc[r][j], vf) * (unit * rows[r].unit) +
                        (copied * rows[r].per_copied + rest * rows[r].per_rest);
        proved &= most < rows[r].room;
      }
      open |= lane_bits(~proved) << (at + j * W);
    }
  }
  return open;
}

// Whether the filter is worth trying, one head's view of it. While it proves too little, it is
// tried on one block of a region only, and after n failures sits out up to 8 regions. Threads share
// the state loosely: it has no effect on results.
class FilterTrust {
 public:
  FilterTrust(const Problem& p, int64_t bh) : state_(p.filter_state + 2 * bh) {}
  bool sits_out() {
    const int32_t wait = get(state_ + 1);
    if (wait > 0) set(state_ + 1, wait - 1);
    return wait > 0;
  }
  bool trusted() const { return get(state_) == kTrusted; }
  void report(bool pays) {
    const int32_t failures = pays ? 0 : trusted() ? 1 : get(state_) < 4 ? get(state_) + 1 : 4;
    set(state_, pays ? kTrusted : failures);
    set(state_ + 1, failures > 1 ? 1 << (failures - 1) : 0);
  }

 private:
  static constexpr int32_t kTrusted = -1;
  static int32_t get(const int32_t* x) { return __atomic_load_n(x, __ATOMIC_RELAXED); }
  static void set(int32_t* x, int32_t y) { __atomic_store_n(x, y, __ATOMIC_RELAXED); }
  int32_t* state_;
};

// Which keys of one region are open.
class OpenKeys {
 public:
  // Keys are counted from the request's first one, `first`; the chunks of the copy from the
  // tensor's.
  OpenKeys(const Problem& p, int64_t bh, int64_t lo, int64_t first)
      : p_(p), bh_(bh), first_(first), base_((first + lo) / kLanes) {
    memset(open_, 255, sizeof(open_));
  }

  void scan(int64_t lo, int64_t hi) {
    for (int64_t i = (first_ + lo) / kLanes; i * kLanes < first_ + hi; ++i)
      open_[i - base_] = chunk(p_.int8.chunk(bh_, i));
  }

  bool any(int64_t lo, int64_t hi) const {
    for (int64_t c = at(lo), end = at(hi); c < end;) {
      const int64_t n = 64 - c % 64 < end - c ? 64 - c % 64 : end - c;
      if ((open_[c / 64] >> (c % 64)) & (~uint64_t(0) >> (64 - n))) return true;
      c += n;
    }
    return false;
  }

  void keep(int64_t c) { open_[at(c) / 64] |= uint64_t(1) << (at(c) % 64); }

  // Writes the open keys of [lo, hi) to `keys`; returns how many.
  int64_t list(int64_t lo, int64_t hi, int32_t* keys) const {
    int64_t n = 0;
    for (int64_t w = at(lo) / 64; w * 64 < at(hi); ++w) {
      const int64_t c0 = lo - at(lo) + w * 64;
      uint64_t bits = open_[w];
      if (c0 < lo) bits &= ~uint64_t(0) << (lo - c0);
      if (c0 + 64 > hi) bits &= ~uint64_t(0) >> (c0 + 64 - hi);
      for (; bits; bits &= bits - 1) keys[n++] = int32_t(c0 + __builtin_ctzll(bits));
    }
    return n;
  }

 private:
  int64_t at(int64_t c) const { return first_ + c - base_ * kLanes; }

  uint64_t chunk(const uint8_t* plane) const {
    const int64_t width = p_.int8.width, step = width / 4 * kQueryParts;
    const FilterRow* rows = p_.filter_rows + bh_ * p_.rows;
    const int32_t* q = p_.filter_q + bh_ * p_.rows * (width / 2);
    uint64_t open = 0;
    for (int64_t r = 0; r < p_.rows && ~open; r += 4) {
      const int64_t left = p_.rows - r;
      if (left >= 4)
        open |= open_keys<4>(plane, width, rows + r, q + r * step, step);
      else if (left == 3)
        open |= open_keys<3>(plane, width, rows + r, q + r * step, step);
      else if (left == 2)
        open |= open_keys<2>(plane, width, rows + r, q + r * step, step);
      else
        open |= open_keys<1>(plane, width, rows + r, q + r * step, step);
    }
    return open;
  }

  const Problem& p_;
  const int64_t bh_, first_, base_;
  uint64_t open_[1024 / kLanes + 2];
};

// A row that sees nothing: everything passes.
BSA_INLINE void filter_nothing(const Problem& p, FilterRow* row, int32_t* packed) {
  *row = {0.0f, 0.0f, 0.0f, kInf, 0};
  memset(packed, 0, p.int8.width / 4 * kQueryParts * sizeof(int32_t));
}

// A query row as the filter wants it: what open_keys proves of it is that its score lies below
// `bound`.
template <class T>
void filter_row(const Problem& p, int64_t bh, const T* q, float bound, FilterRow* row,
                int32_t* packed) {
  constexpr float u = 5.9604645e-08f;
  alignas(64) float x[512 + W] = {}, mean[512 + W] = {};
  memcpy(mean, p.int8.head(bh), p.D * sizeof(float));
  widen(q, p.D, x);
  const float top = max_abs(x, p.D, 0.0f);
  const bool tame = top < kLargestNorm;
  if (!tame) memset(x, 0, sizeof(x));
  const Int8Scale scale(tame ? top : 0.0f);
  vf squares = {}, rest = {}, dot = {}, mean_squares = {};
  int32_t sum = 0;
  memset(packed, 0, p.int8.width / 4 * kQueryParts * sizeof(int32_t));
  for (int64_t d = 0; d < p.D; d += W) {
    const vf y = load(x + d) * scale.inverse, z = nearest(y), m = load(mean + d);
    squares += y * y;
    rest += (y - z) * (y - z);
    dot += load(x + d) * m;
    mean_squares += m * m;
    const vi whole = __builtin_convertvector(z, vi);
    for (int64_t i = 0; i < W && d + i < p.D; ++i) {
      const int64_t at = d + i;
      const int32_t value = whole[i];
      sum += value;
      if (kQueryParts == 1)
        packed[at / 4] |= int32_t(uint32_t(value & 0xff) << (at % 4 * 8));
      else
        packed[at / 4 * 2 + at % 2] |= int32_t(uint32_t(value & 0xffff) << (at % 4 / 2 * 16));
    }
  }
  const float norm = scale.norm(sum_of(squares), p.D), missed = scale.norm(sum_of(rest), p.D);
  // Squares below the normal range are flushed: hence the term behind.
  const float mean_norm = __builtin_sqrtf(sum_of(mean_squares)) * kNormSlack + 1e-17f;
  const float steps = 32.0f * float(p.D + 8) * u;
  row->unit = scale.alpha;
  row->per_copied = missed + steps * norm;
  row->per_rest = norm * (1.0f + steps);
  row->start = -128 * sum;
  row->room = -kInf;  // proves nothing; `<` fails for what is not a number
  if (tame && norm < kLargestNorm && mean_norm < kLargestNorm)
    row->room = bound - sum_of(dot) - norm * (steps * mean_norm + 1e-30f) -
                (__builtin_fabsf(bound) * (8.0f * u) + 1e-30f);
}

}  // namespace bsa::BSA_LEVEL
