// Decode with an int8 copy of K, before decode itself: which blocks are proved to be skipped. Their
// K is then never read.
//
// A split starts from the running max that the seed gives, and a running max only rises. So the
// seed's scores are computed first, as decode will, and what a block's maximum is compared with is
// known from below. The copy's products with the queries in int8 are exact, and what they miss is
// bounded: docs/int8-filter.md, inequality (1). A block is proved if all its keys lie below, for
// all heads of the group. What is not proved is listed, and decode visits that alone.
//
// One block of threads has one split, as in decode, and goes through it 128 keys at a time, 32 to a
// warp. It stops where what it proved has not paid for what it read: that changes no result.
#pragma once
#include "int8_keys.cuh"
#include "seed.cuh"

namespace bsa::cuda {

constexpr int kStretch = 1024;  // keys whose bits are in shared memory at once
constexpr int kUnit = 32;       // keys that a warp takes at once

struct Stretch {
  uint32_t open[kStretch / kUnit + 2];  // a bit for each key: whether it may matter
};

// The smaller of two; NaN if one of them is.
__device__ __forceinline__ float min_or_nan(float a, float b) { return -max_or_nan(-a, -b); }

// What is to be proved of a row, whose scale is `unit`: that the score of a key, with the product
// of their integers, is at most what is below `room`.
struct Bound {
  int start;  // 128 times the sum of its integers less: the copy's bytes are k8 + 128
  float unit, per_copied, per_missed, room;
};

// The group's queries in int8, as a left factor, and the bounds of the lane's two rows.
template <class Type, int kHead>
struct Proof {
  static constexpr int kSteps = kHead / 32, kWords = kHead / 16;  // of a product; of a lane's row

  const Work& w;
  uint32_t q[kSteps][4];
  Bound rows[2];

  // `most`: the largest product of each row with the seed.
  __device__ __forceinline__ Proof(const Work& w_, const float (&most)[2]) : w(w_) {
#pragma unroll 1  // one after the other: for both at once there are no registers
    for (int x = 0; x < 2; ++x) {
      uint32_t packed[kWords];
      const Bound row = make_row(x, x ? most[1] : most[0], packed);
      if (x)
        rows[1] = row;
      else
        rows[0] = row;
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (x)
          q[i / 2][1 + 2 * (i % 2)] = packed[i];
        else
          q[i / 2][2 * (i % 2)] = packed[i];
    }
  }

  // Whether anything can be proved at all: the same for all warps.
  __device__ __forceinline__ bool has_room() const {
    return __all_sync(kAllLanes, rows[0].room > kMinusInfinity && rows[1].room > kMinusInfinity);
  }

  // Which of 32 keys of a chunk, half 0 or 1, may reach the bound of a row: a bit for each.
  __device__ __forceinline__ uint32_t open_keys(const uint8_t* chunk, int half) const {
    const int lane = lane_index(), key = kUnit * half + 4 * (lane / 4);
    const int words = w.p.int8_keys.width / 4;
    // Register t of a lane is the word of key 4 (lane / 4) + t: so each load is 16 bytes.
    uint32_t k[kSteps][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int word = 8 * step + 4 * i + lane % 4;
        if (word < words)
          load_words(k[step][i], chunk + (word * kChunk + key) * 4);
        else
          k[step][i][0] = k[step][i][1] = k[step][i][2] = k[step][i][3] = 0;
      }
    float bounds[3][8];
    const float* const from =
        reinterpret_cast<const float*>(chunk + 4 * words * kChunk) + kUnit * half + 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j < 8; j += 4) load_floats(&bounds[i][j], from + i * kChunk + j);
    int products[4][4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[t][i] = rows[i / 2].start;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        multiply_bytes(products[t], q[step], k[step][0][t], k[step][1][t]);
    }
    // Column n of product t is key 4 n + t: a lane has eight keys in a row.
    uint32_t open = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = bounds[0][i];
      bool proved = a > 0.0f;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const Bound& row = rows[x];
        const float most = float(products[i % 4][2 * x + i / 4]) * (a * row.unit) +
                           (bounds[1][i] * row.per_copied + bounds[2][i] * row.per_missed);
        proved = proved && most < row.room;
      }
      open |= uint32_t(!proved) << i;
    }
    return or_of_warp(open << 8 * (lane % 4));
  }

 private:
  __device__ __forceinline__ Bound make_row(int x, float most, uint32_t (&packed)[kWords]) const {
    const Params& p = w.p;
    uint32_t halves[kWords][2];
    float top = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int d = 4 * (4 * i + lane_index() % 4);
      const bool there = w.is_real(x) && d < p.D;
      const auto* from =
          reinterpret_cast<const uint32_t*>(w.queries() + w.member(x) * p.q.head + d);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        halves[i][j] = there ? from[j] : 0;
        top = max_or_nan(top, fabsf(widen<Type>(halves[i][j])));
        top = max_or_nan(top, fabsf(widen<Type>(halves[i][j] >> 16)));
      }
    }
    top = max_of_quad(top);
    const bool tame = top < kLargestNorm;  // not if it is no number
    const Int8Scale scale(tame ? top : 0.0f);
    const auto* const mean =
        reinterpret_cast<const float*>(p.int8_keys.head(int64_t(w.batch) * p.Hkv + w.kv_head));
    float squares = 0, missed = 0, dot = 0, mean_squares = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int d = 4 * (4 * i + lane_index() % 4);
      float m[4] = {};
      if (d < p.D) load_floats(m, mean + d);
      packed[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = tame ? widen<Type>(halves[i][j / 2] >> 16 * (j % 2)) : 0.0f;
        const float y = value * scale.inverse, z = rintf(y);
        squares += y * y, missed += (y - z) * (y - z);
        dot += value * m[j], mean_squares += m[j] * m[j], sum += int(z);
        packed[i] |= uint32_t(int(z) & 255) << 8 * j;
      }
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float norm = scale.norm(sum_of_quad(squares), p.D);
    // Squares below the normal range may be flushed: hence the term behind.
    const float mean_norm = sqrtf(sum_of_quad(mean_squares)) * kNormSlack + 1e-17f;
    const float steps = 32.0f * float(p.D + 8) * kRounding, product = sum_of_quad(dot);
    const float bound = least_bound(x, most * p.scale) / p.scale;
    Bound row{-128 * sum, scale.alpha, scale.norm(sum_of_quad(missed), p.D) + steps * norm,
              norm * (1.0f + steps), kMinusInfinity};
    if (tame && norm < kLargestNorm && mean_norm < kLargestNorm)
      row.room = bound - product - norm * (steps * mean_norm + 1e-30f) -
                 (8.0f * kRounding * fabsf(bound) + 1e-30f);
    return w.is_real(x) ? row : Bound{0, 0.0f, 0.0f, 0.0f, 1.0f};  // or proved of anything
  }

  // A score below it is skipped from a running max of m on. -inf where m is: there, seeing a block
  // makes a difference by itself.
  __device__ __forceinline__ float least_bound(int x, float m) const {
    const RowRule rule = w.read_rule(x);
    if (!(fabsf(m) < __builtin_huge_valf())) return kMinusInfinity;
    float bound = __builtin_huge_valf();
    // The test computes score - m: the terms behind are for its rounding.
    if (w.p.log_lambda.data)
      bound = m + rule.log_lambda - 4.0f * kRounding * (fabsf(m) + fabsf(rule.log_lambda));
    if (w.p.threshold.data)
      bound = min_or_nan(bound, rule.threshold - 4.0f * kRounding * fabsf(rule.threshold));
    return bound;
  }

  static constexpr float kRounding = 5.9604645e-8f;  // 2^-24
};

// Which of the blocks [first, first + count) are proved to be skipped, at most kStretch keys: a bit
// for each, the same in all lanes. Lane i looks after block i.
template <class Type, int kHead>
__device__ __forceinline__ uint32_t prove_stretch(const Proof<Type, kHead>& proof, Stretch& stretch,
                                                  int first, int count) {
  const Work& w = proof.w;
  const Params& p = w.p;
  // What is seen; blocks may begin anywhere in a chunk, as padding is left out of their count.
  const int low = p.window ? max(w.here - p.window + 1, 0) : 0;
  const int high = p.causal ? min(w.r.keys, w.here + 1) : w.r.keys;
  const int base = (w.r.first + first * p.block_k) / kUnit * kUnit, shift = w.r.first - base;
  const int mine = (first + lane_index()) * p.block_k;
  const int begin = max(mine, low), end = min(mine + p.block_k, high);
  const int units = ceil_div(min((first + count) * p.block_k, high) + shift, kUnit);
  const int head = w.batch * p.Hkv + w.kv_head;

  int scanned = 0;
  while (true) {
    const int unit = scanned + warp_index(), key = base + unit * kUnit;
    if (unit < units) {
      const uint8_t* const chunk = p.int8_keys.chunk(head, key / kChunk);
      const uint32_t open = proof.open_keys(chunk, key / kUnit % 2);
      if (lane_index() == 0) stretch.open[unit] = open;
    }
    scanned += kWarps;
    __syncthreads();
    const bool known = lane_index() < count && end + shift <= scanned * kUnit;
    bool proved = known;
    for (int c = begin + shift; proved && c < end + shift;) {
      const int bit = c % kUnit, bits = min(kUnit - bit, end + shift - c);
      proved = !(stretch.open[c / kUnit] >> bit & 0xFFFFFFFFu >> (kUnit - bits));
      c += bits;
    }
    // What nobody sees is not visited, and so not skipped.
    int seen = begin;
    while (proved && seen < end && !is_valid(p, w.r, w.batch, seen)) ++seen;
    const uint32_t all = __ballot_sync(kAllLanes, known);
    const uint32_t found = __ballot_sync(kAllLanes, proved && seen < end);
    // A key's copy is width + 12 bytes, which are lost, and the key 2 D, which are won. To begin
    // with, one of one block counts as proved.
    const bool pays = (__popc(found) + 1) * 2 * p.D >= (__popc(all) + 1) * (p.int8_keys.width + 12);
    if (scanned >= units || !pays) return found;
  }
}

// Grid (splits, Lq * Hkv, B). Fills open_blocks, and counts and marks what is proved.
template <class Type, int kHead>
__global__ void __launch_bounds__(kThreads, kHead > 192 ? 2 : 3)
    prove_kernel(const __grid_constant__ Params p) {
  __shared__ Stretch stretch;
  const Work w(p);
  const SplitBlocks blocks = p.block_k == 128 ? blocks_of_split<128>(p, w.r, w.split, w.here)
                                              : blocks_of_split<64>(p, w.r, w.split, w.here);
  int32_t* const list = p.open_blocks + w.list_at();
  if (!blocks.own) {
    if (threadIdx.x == 0) list[0] = 0;
    return;
  }
  float most[2];
  max_of_seed<Type, kHead>(w, blocks, most);
  const Proof<Type, kHead> proof(w, most);
  const bool tries = proof.has_room();
  int listed = 0;
  for (int first = blocks.begin; first < blocks.end; first += kStretch / p.block_k) {
    const int count = min(kStretch / p.block_k, blocks.end - first);
    const uint32_t found = tries ? prove_stretch(proof, stretch, first, count) : 0;
    __syncthreads();  // all are done with the stretch's bits
    const uint32_t open = ~found & 0xFFFFFFFFu >> (32 - count), me = 1u << lane_index();
    if (warp_index() == 0) {
      if (open & me) list[1 + listed + __popc(open & (me - 1))] = first + lane_index();
      if (found & me && p.skips) mark_skipped(p, w.voter_row(), first + lane_index());
    }
    listed += __popc(open);
  }
  if (threadIdx.x == 0) list[0] = listed;
  const int proved = blocks.own - listed;
  w.add_counts(proved, proved);
}

}  // namespace bsa::cuda
