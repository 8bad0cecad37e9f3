// The int8 copy of K that a caller keeps beside a cache, and how new keys enter it.
//
// Unlike the copy that prefill makes for itself (key_planes.h) it grows key by key, so scale and
// norms are each key's own. With k = mean + a k8 + e, a chunk of 64 keys holds
//
//   uint8 [width / 4][64][4]   k8 + 128, four channels of a key together: the lanes of a vector are
//                              keys, so that products need no sums across lanes
//   float [3][64]              a, and upper bounds on the norms of a k8 and of e; a = 0: not known
//
// and a chunk before all others holds the head's mean, float [D], and whether there is one, int32.
// The first keys that enter a head make its mean. All zeros is an empty copy.
#pragma once
#include "key_planes.h"

namespace bsa::BSA_LEVEL {

// Keys and queries beyond this norm are not filtered, so that none of their products overflows.
constexpr float kLargestNorm = 1e18f;

// To the nearest integer, for |x| < 2^22.
BSA_INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

BSA_INLINE int32_t& has_mean(uint8_t* head, int64_t D) {
  return *reinterpret_cast<int32_t*>(head + D * sizeof(float));
}

template <class T>
void make_mean(const NewKeys& a, const T* k, float* mean) {
  for (int64_t d = 0; d < a.D; ++d) mean[d] = 0;
  for (int64_t c = 0; c < a.n; ++c)
    for (int64_t d = 0; d < a.D; ++d) mean[d] += to_float(k[c * a.k.row + d]);
  // Any vector will do, but it should be a number.
  for (int64_t d = 0; d < a.D; ++d) {
    mean[d] /= float(a.n);
    if (!(__builtin_fabsf(mean[d]) < kLargestNorm)) mean[d] = 0;
  }
}

template <class T>
void append_keys(const NewKeys& a, int64_t bh) {
  const T* k = row_of<T>(a.k, bh / a.Hkv, bh % a.Hkv, 0);
  uint8_t* head = a.copy.head(bh);
  if (a.n == 0) return;
  if (!has_mean(head, a.D)) {
    make_mean(a, k, reinterpret_cast<float*>(head));
    has_mean(head, a.D) = 1;
  }
  alignas(64) float mean[512 + W] = {}, x[512 + W] = {};
  memcpy(mean, head, a.D * sizeof(float));
  for (int64_t c = 0; c < a.n; ++c) {
    uint8_t* plane = a.copy.chunk(bh, (a.start + c) / kLanes);
    const int64_t lane = (a.start + c) % kLanes;
    widen(k + c * a.k.row, a.D, x);
    for (int64_t d = 0; d < a.D; d += W) store(x + d, load(x + d) - load(mean + d));
    const float top = max_abs(x, a.D, 0.0f);
    const Int8Scale scale(top);
    vf copied = {}, rest = {};
    for (int64_t d = 0; d < a.D; d += W) {
      const vf y = load(x + d) * scale.inverse, q = nearest(y);
      copied += q * q;
      rest += (y - q) * (y - q);
      alignas(64) int32_t bytes[W];
      const vi moved = __builtin_convertvector(q + 128.0f, vi);
      memcpy(bytes, &moved, sizeof(bytes));
      for (int64_t i = 0; i < W && d + i < a.D; ++i)
        plane[(d + i) / 4 * 4 * kLanes + lane * 4 + (d + i) % 4] = uint8_t(bytes[i]);
    }
    float* bounds = reinterpret_cast<float*>(plane + kLanes * a.copy.width) + lane;
    bounds[kLanes] = scale.alpha * __builtin_sqrtf(sum_of(copied)) * kNormSlack;
    bounds[2 * kLanes] = scale.norm(sum_of(rest), a.D);
    // `not <`, so that what is not a number is not known either.
    const bool known = top < kLargestNorm && bounds[kLanes] < kLargestNorm;
    bounds[0] = known ? scale.alpha : 0.0f;
  }
}

}  // namespace bsa::BSA_LEVEL
