// The int8 copy of K that a caller keeps beside a cache, and how new keys enter it. The layout is
// the CPU's (csrc/int8_keys.h), and so are the bounds; docs/int8-filter.md has the proof.
//
// With k = mean + a k8 + e, a chunk of 64 keys holds
//
//   uint8 [width / 4][64][4]   k8 + 128: four channels of a key are a word, which is what a lane
//                              holds of the right factor of an int8 product
//   float [3][64]              a, and upper bounds on the norms of a k8 and of e; a = 0: not known
//
// and a chunk before all others holds the head's mean, float [D], and whether there is one, int32.
#pragma once
#include "blocks_sm80.cuh"

namespace bsa::cuda {

constexpr int kChunk = 64;
constexpr int kMostCopied = 512;  // the largest head size

// Norms are sums of D floats and a root: 1.0001 is above all of their rounding for D <= 512.
constexpr float kNormSlack = 1.0001f;
// By how much x = fl(fl(k - mean) * fl(127 / max)) may miss (k - mean) / alpha, |x| <= 127.
constexpr float kQuantSlack = 5e-5f;
constexpr float kTiny = 1e-30f;  // what is below is copied as zeros
// Keys and queries beyond this norm prove nothing, so that none of their products overflows.
constexpr float kLargestNorm = 1e18f;

// The scale of values with largest magnitude `top`, in int8; and its inverse, 0 for `kTiny`.
struct Int8Scale {
  float alpha = 1.0f, inverse = 0.0f;
  __device__ __forceinline__ explicit Int8Scale(float top) {
    if (top >= kTiny) alpha = top / 127.0f, inverse = 127.0f / top;
  }
  // An upper bound on a norm from the sum of `n` squares in units of alpha.
  __device__ __forceinline__ float norm(float squares, int n) const {
    const float root = sqrtf(float(n));
    if (inverse == 0.0f) return root * kTiny * kNormSlack;
    return alpha * (sqrtf(squares) * kNormSlack + root * kQuantSlack);
  }
};

constexpr int kMostInMean = 256;  // keys that a mean is made of

template <class Type>
__device__ __forceinline__ float element(const void* data, int64_t i) {
  if constexpr (Type::kBytes == 4)
    return static_cast<const float*>(data)[i];
  else
    return widen<Type>(static_cast<const uint16_t*>(data)[i]);
}

// The mean of a head's first keys, unless it has one. Any vector would do, but it should be a
// number: of many keys, some evenly spaced ones speak for all.
template <class Type>
__device__ __forceinline__ void make_mean(const NewKeys& a, int64_t k_at, uint8_t* head) {
  auto* const mean = reinterpret_cast<float*>(head);
  auto* const has_mean = reinterpret_cast<int32_t*>(head + a.D * sizeof(float));
  if (*has_mean) return;
  const int taken = min(a.n, kMostInMean), step = a.n / taken;
  for (int d = threadIdx.x; d < a.D; d += kThreads) {
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < taken; ++i)
      sum += element<Type>(a.k.data, k_at + int64_t(i) * step * a.k.row + d);
    sum /= float(taken);
    mean[d] = fabsf(sum) < kLargestNorm ? sum : 0.0f;
  }
  __syncthreads();
  if (threadIdx.x == 0) *has_mean = 1;
}

__device__ __forceinline__ float sum_of_warp(float x) {
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// A warp's copy of the key at k_at, as number `key` of a chunk.
template <class Type>
__device__ __forceinline__ void append_key(const NewKeys& a, int64_t k_at, const float* mean,
                                           uint8_t* chunk, int key) {
  constexpr int kWords = kMostCopied / 4 / 32;  // of a lane
  float x[kWords][4];
  float top = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = 4 * (lane_index() + 32 * i) + j;
      x[i][j] = d < a.D ? element<Type>(a.k.data, k_at + d) - mean[d] : 0.0f;
      top = max_or_nan(top, fabsf(x[i][j]));
    }
  for (int lanes = 16; lanes; lanes /= 2)
    top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, lanes));
  const bool tame = top < kLargestNorm;  // not if it is no number
  const Int8Scale scale(tame ? top : 0.0f);
  float copied = 0, missed = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float y = tame ? x[i][j] * scale.inverse : 0.0f, z = rintf(y);
      copied += z * z, missed += (y - z) * (y - z);
      word |= uint32_t(int(z) + 128) << 8 * j;
    }
    const int at = lane_index() + 32 * i;
    if (at < a.copy.width / 4) reinterpret_cast<uint32_t*>(chunk)[at * kChunk + key] = word;
  }
  copied = sum_of_warp(copied), missed = sum_of_warp(missed);
  if (lane_index()) return;
  float* const bounds = reinterpret_cast<float*>(chunk + kChunk * a.copy.width) + key;
  const float norm = scale.alpha * sqrtf(copied) * kNormSlack;
  bounds[0] = tame && norm < kLargestNorm ? scale.alpha : 0.0f;
  bounds[kChunk] = norm, bounds[2 * kChunk] = scale.norm(missed, a.D);
}

// Grid (B * Hkv).
template <class Type>
__global__ void __launch_bounds__(kThreads) mean_kernel(const __grid_constant__ NewKeys a) {
  const int head = blockIdx.x;
  make_mean<Type>(a, head / a.Hkv * a.k.batch + head % a.Hkv * a.k.head, a.copy.head(head));
}

// Grid (B * Hkv, keys). Where a head's new keys are one block of threads', that makes the mean.
template <class Type>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ NewKeys a) {
  const int head = blockIdx.x;
  const int64_t k_at = head / a.Hkv * a.k.batch + head % a.Hkv * a.k.head;
  uint8_t* const first = a.copy.head(head);
  if (gridDim.y == 1) make_mean<Type>(a, k_at, first);
  __syncthreads();
  const int begin = blockIdx.y * kKeysAtOnce, end = min(a.n, begin + kKeysAtOnce);
  for (int c = begin + warp_index(); c < end; c += kWarps) {
    const int64_t key = *a.position + c;
    if (key < 0 || key >= int64_t(a.copy.chunks) * kChunk) continue;  // there is no such place
    append_key<Type>(a, k_at + c * a.k.row, reinterpret_cast<const float*>(first),
                     a.copy.chunk(head, int(key / kChunk)), int(key % kChunk));
  }
}

}  // namespace bsa::cuda
