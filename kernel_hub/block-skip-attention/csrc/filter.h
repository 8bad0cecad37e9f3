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
struct Filter {
  const KeyPlanes* planes = nullptr;
  int64_t bh = 0, D = 0;
  uint32_t* q8 = nullptr;  // [width / 4][64]: four bytes of q a lane, each 128 too large
  alignas(64) float beta[kLanes], q_norm[kLanes], f_norm[kLanes], shift[kLanes];
  // A filter that proves nothing costs a quarter of the scores: after each failure in a row it
  // sits out twice as many steps, and it is only tried where the step before was skipped.
  bool likely = false;
  int failures = 0, wait = 0;

  bool on() const { return planes != nullptr; }

  static size_t bytes(const Problem& p) { return p.planes.data ? p.planes.width * kLanes : 0; }

  template <class T>
  void start(const Problem& p, int64_t b, int64_t h, int64_t row0, int64_t rows, char* memory) {
    planes = &p.planes;
    bh = b * p.Hkv + h / p.G;
    D = p.D;
    q8 = reinterpret_cast<uint32_t*>(memory);
    memset(q8, 128, bytes(p));
    const float* mean = planes->mean + bh * D;
    uint8_t* y = reinterpret_cast<uint8_t*>(q8);
    alignas(64) float x[512 + W];
    for (int r = 0; r < kLanes; ++r) {
      // Lanes without a row take no part: start with what any bound passes.
      beta[r] = q_norm[r] = f_norm[r] = 0, shift[r] = -kInf;
      if (r >= rows) continue;
      widen(row_of<T>(p.q, b, h, row0 + r), D, x);
      const Int8Scale scale(max_abs(x, D, 0.0f));
      float squares = 0, rest = 0, dot = 0;
      for (int64_t d = 0; d < D; ++d) {
        const float z = x[d] * scale.inverse, q = __builtin_rintf(z);
        squares += z * z, rest += (z - q) * (z - q), dot += x[d] * mean[d];
        y[(d / 4 * kLanes + r) * 4 + d % 4] = uint8_t(int(q) + 128);
      }
      beta[r] = scale.alpha;
      q_norm[r] = scale.norm(squares, D), f_norm[r] = scale.norm(rest, D), shift[r] = dot;
    }
  }

  bool worth_trying() {
    if (!on() || !likely) return false;
    if (wait > 0) return --wait, false;
    return true;
  }
  void report(bool proved) {
    failures = proved ? 0 : failures < 6 ? failures + 1 : 6;
    wait = failures > 1 ? 1 << (failures - 1) : 0;
  }

  // A bit for each key of the chunk that may reach the bound of some lane.
  uint64_t open_keys(int64_t chunk, const float* bound) const {
    const int64_t at = bh * planes->chunks + chunk;
    __m512i limit[kVectors];
    for (int j = 0; j < kVectors; ++j) limit[j] = limits(planes->chunk[at], bound, j * W);
    const int8_t* plane = planes->data + at * kLanes * planes->width;
    const int32_t* sums = planes->sums + at * kLanes;
    uint64_t open = 0;
    for (int c = 0; c < kLanes; c += 4) open |= uint64_t(four(plane, sums, c, limit)) << c;
    return open;
  }

 private:
  // A key is proved to lie below the bound in a lane if its int8 product is below this.
  __m512i limits(const ChunkBounds& k, const float* bound, int i) const {
    constexpr float u = 5.9604645e-08f;
    const float mean_norm = planes->mean_norm[bh], steps = 32.0f * float(D + 8) * u;
    const vf q = load(q_norm + i), f = load(f_norm + i), limit = load(bound + i);
    const vf size = (vf)((vi)limit & 0x7fffffff);
    const vf slack =
        q * (steps * (k.plane_norm + k.rest_norm + mean_norm) + 1e-35f) + size * (8.0f * u);
    const vf room = limit - load(shift + i) - q * k.rest_norm - f * k.plane_norm - slack;
    const vf unit = load(beta + i) * k.alpha;
    // Too small a unit proves nothing; a lane without a row, or without a vote, always passes.
    vf t = unit > kTiny ? room / unit : splat(-kInf);
    t = (load(shift + i) == -kInf) | (limit == kInf) ? splat(kInf) : t;
    const __m512 most = _mm512_min_ps(_mm512_set1_ps(1e9f), (__m512)t);  // NaN stays NaN
    return _mm512_cvt_roundps_epi32(most, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }

  unsigned four(const int8_t* plane, const int32_t* sums, int c, const __m512i* limit) const {
    const int64_t width = planes->width;
    __m512i acc[4][kVectors];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_set1_epi32(sums[c + i]);
    const uint32_t* q = q8;
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
};
#else
struct Filter {  // other levels have no fast int8 products
  bool likely = false;
  static size_t bytes(const Problem&) { return 0; }
  template <class T>
  void start(const Problem&, int64_t, int64_t, int64_t, int64_t, char*) {}
  bool on() const { return false; }
  bool worth_trying() { return false; }
  void report(bool) {}
  uint64_t open_keys(int64_t, const float*) const { return ~uint64_t(0); }
};
#endif

}  // namespace bsa::BSA_LEVEL
