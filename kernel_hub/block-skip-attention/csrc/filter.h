// The filter of prefill: which of 64 keys could matter to some of the 64 queries, from the int8
// copy of K alone.
//
// It answers with the keys for which it cannot prove that the exact comparison would find every
// lane below its bound. What it proves is what the exact test would have decided, so outputs and
// decisions are the same with and without it, bit for bit. The proof: docs/int8-filter.md.
#pragma once
#include "key_planes.h"
#include "vote.h"

namespace bsa::BSA_LEVEL {

#if BSA_ISA >= 3
template <class T>
class Filter {
 public:
  static size_t bytes(const Problem& p) { return p.planes.data ? p.planes.width * kLanes : 0; }

  // What start() will need; nothing is made before the filter is first worth trying.
  void offer(const Problem& p, int64_t b, int64_t h, int64_t row0, int64_t rows, char* memory) {
    p_ = &p, b_ = b, h_ = h, row0_ = row0, rows_ = rows, bh_ = b * p.Hkv + h / p.G;
    q8_ = reinterpret_cast<uint32_t*>(memory);
  }

  // A filter that proves nothing costs a quarter of the scores, and half of bfloat16's. So it is
  // only tried where the steps before were skipped for the most part, and sits out twice as many
  // steps after each failure.
  bool worth_trying() {
    if (!p_ || rate_ < (p_->dtype == Dtype::bf16 ? 0.8f : 0.6f)) return false;
    if (wait_ > 0) return --wait_, false;
    return started_ || start();
  }
  void saw(float skipped_share) { rate_ += 0.25f * (skipped_share - rate_); }
  void report(bool proved) {
    failures_ = proved ? 0 : failures_ < 6 ? failures_ + 1 : 6;
    wait_ = failures_ > 1 ? 1 << (failures_ - 1) : 0;
  }

  // A bit for each key of the chunk that may reach the bound of some lane; or, if it is enough to
  // know whether there are such keys, for some of them.
  uint64_t open_keys(int64_t chunk, const float* bound, bool some) {
    const KeyPlanes& planes = p_->planes;
    const int64_t at = bh_ * planes.chunks + chunk;
    if (!once(planes.chunk_state + at, [&] { copy_chunk<T>(*p_, bh_, chunk); }))
      return ~uint64_t(0);
    __m512i limit[kVectors];
    for (int j = 0; j < kVectors; ++j) limit[j] = limits(planes.chunk[at], bound, j * W);
    const int8_t* plane = planes.data + at * kLanes * planes.width;
    const int32_t* sums = planes.sums + at * kLanes;
    uint64_t open = 0;
    for (int c = 0; c < kLanes && !(some && open); c += 4)
      open |= uint64_t(four(plane, sums, c, limit)) << c;
    return open;
  }

 private:
  // Does `work` if nobody has; false while another thread is at it.
  template <class Work>
  static bool once(uint8_t* state, const Work& work) {
    uint8_t seen = __atomic_load_n(state, __ATOMIC_ACQUIRE);
    if (seen) return seen == 2;
    if (!__atomic_compare_exchange_n(state, &seen, uint8_t(1), false, __ATOMIC_ACQUIRE,
                                     __ATOMIC_ACQUIRE))
      return seen == 2;
    work();
    __atomic_store_n(state, uint8_t(2), __ATOMIC_RELEASE);
    return true;
  }

  // The queries in int8, and the norms that bound what that misses.
  bool start() {
    const KeyPlanes& planes = p_->planes;
    const int64_t D = p_->D;
    if (!once(planes.head_state + bh_, [&] { mean_of_head<T>(*p_, bh_); })) return false;
    started_ = true;
    memset(q8_, 128, bytes(*p_));
    const float* mean = planes.mean + bh_ * D;
    alignas(64) float x[512 + W];
    for (int r = 0; r < kLanes; ++r) {
      // Lanes without a row take no part: they start with what any bound passes.
      beta_[r] = q_norm_[r] = f_norm_[r] = 0, shift_[r] = -kInf;
      if (r >= rows_) continue;
      widen(row_of<T>(p_->q, b_, h_, row0_ + r), D, x);
      for (int64_t d = D; d % W; ++d) x[d] = 0;
      const Int8Scale scale(max_abs(x, D, 0.0f));
      __m512 squares = _mm512_setzero_ps(), rest = squares, dot = squares;
      for (int64_t d = 0; d < D; d += W) {
        const __mmask16 here = D - d >= W ? 0xffff : __mmask16((1u << (D - d)) - 1);
        const __m512 value = _mm512_loadu_ps(x + d);
        const __m512 z = _mm512_mul_ps(value, _mm512_set1_ps(scale.inverse));
        const __m512i q = _mm512_cvtps_epi32(z);
        const __m512 miss = _mm512_sub_ps(z, _mm512_cvtepi32_ps(q));
        squares = _mm512_fmadd_ps(z, z, squares);
        rest = _mm512_fmadd_ps(miss, miss, rest);
        dot = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(here, mean + d), dot);
        alignas(16) uint32_t four_bytes[4];
        const __m512i moved = _mm512_add_epi32(q, _mm512_set1_epi32(128));
        _mm_store_si128((__m128i*)four_bytes, _mm512_cvtepi32_epi8(moved));
        for (int i = 0; i < 4 && d + 4 * i < D; ++i) q8_[(d / 4 + i) * kLanes + r] = four_bytes[i];
      }
      beta_[r] = scale.alpha;
      q_norm_[r] = scale.norm(_mm512_reduce_add_ps(squares), D);
      f_norm_[r] = scale.norm(_mm512_reduce_add_ps(rest), D);
      shift_[r] = _mm512_reduce_add_ps(dot);
    }
    return true;
  }

  // A key is proved to lie below the bound in a lane if its int8 product is below this.
  __m512i limits(const ChunkBounds& k, const float* bound, int i) const {
    constexpr float u = 5.9604645e-08f;
    const float mean_norm = p_->planes.mean_norm[bh_], steps = 32.0f * float(p_->D + 8) * u;
    const vf q = load(q_norm_ + i), f = load(f_norm_ + i), limit = load(bound + i);
    const vf size = (vf)((vi)limit & 0x7fffffff);
    const vf slack =
        q * (steps * (k.plane_norm + k.rest_norm + mean_norm) + 1e-35f) + size * (8.0f * u);
    const vf room = limit - load(shift_ + i) - q * k.rest_norm - f * k.plane_norm - slack;
    const vf unit = load(beta_ + i) * k.alpha;
    // Too small a unit proves nothing; a lane without a row, or without a vote, always passes.
    vf t = unit > kTiny ? room / unit : splat(-kInf);
    t = (load(shift_ + i) == -kInf) | (limit == kInf) ? splat(kInf) : t;
    const __m512 most = _mm512_min_ps(_mm512_set1_ps(1e9f), (__m512)t);  // NaN stays NaN
    return _mm512_cvt_roundps_epi32(most, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }

  unsigned four(const int8_t* plane, const int32_t* sums, int c, const __m512i* limit) const {
    const int64_t width = p_->planes.width;
    __m512i acc[4][kVectors];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_set1_epi32(sums[c + i]);
    const uint32_t* q = q8_;
    for (int64_t d = 0; d < width; d += 4, q += kLanes) {
      __m512i lane[kVectors];
      for (int j = 0; j < kVectors; ++j) lane[j] = _mm512_loadu_si512(q + j * W);
      for (int i = 0; i < 4; ++i) {
        int32_t bytes;
        memcpy(&bytes, plane + (c + i) * width + d, 4);
        const __m512i k = _mm512_set1_epi32(bytes);
        for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], lane[j], k);
      }
    }
    unsigned open = 0;
    for (int i = 0; i < 4; ++i) {
      unsigned any = 0;
      for (int j = 0; j < kVectors; ++j) any |= _mm512_cmpge_epi32_mask(acc[i][j], limit[j]);
      open |= unsigned(any != 0) << i;
    }
    return open;
  }

  const Problem* p_ = nullptr;
  int64_t b_ = 0, h_ = 0, row0_ = 0, rows_ = 0, bh_ = 0;
  uint32_t* q8_ = nullptr;  // [width / 4][64]: four bytes of q a lane, each 128 too large
  alignas(64) float beta_[kLanes], q_norm_[kLanes], f_norm_[kLanes], shift_[kLanes];
  float rate_ = 0;  // the share of the last steps that was skipped
  bool started_ = false;
  int failures_ = 0, wait_ = 0;
};
#else
template <class T>
class Filter {  // other levels have no fast int8 products
 public:
  static size_t bytes(const Problem&) { return 0; }
  void offer(const Problem&, int64_t, int64_t, int64_t, int64_t, char*) {}
  bool worth_trying() { return false; }
  void saw(float) {}
  void report(bool) {}
  uint64_t open_keys(int64_t, const float*, bool) { return ~uint64_t(0); }
};
#endif

}  // namespace bsa::BSA_LEVEL
