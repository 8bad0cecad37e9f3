// Blocks of Q, K and V in shared memory, and their products, on sm_80's tensor cores.
//
// A block lies in chunks of 16 bytes, eight of which are a panel's row. Chunk c of row r is stored
// at c ^ (r % 8), so that the eight rows that ldmatrix reads at once lie in different banks. Where
// the panels lie is a matter of who fills them, see `Rows` and `Panels`.
//
// Fragments (16x8 scores of a warp, `j` counts the 8 columns): lane i holds rows i / 4 and i / 4 +
// 8, columns 8 j + 2 (i % 4) and the next: elements 0, 1 of the first row, 2, 3 of the second.
#pragma once
#include "ptx_sm80.cuh"
#include "rules.cuh"
#include "visits.cuh"

namespace bsa::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// How far rows and panels lie apart, in bytes: row by row, as our own copies write;
template <int kWidth>
struct Rows {
  static constexpr int kRowBytes = kWidth * 2, kPanelBytes = 128;
};
// or panel by panel, as Hopper's bulk copy does.
template <int kRows>
struct Panels {
  static constexpr int kRowBytes = 128, kPanelBytes = kRows * 128;
};

// The offset, in bytes, of a chunk.
template <class Layout>
__device__ __forceinline__ uint32_t place(int row, int chunk) {
  return row * Layout::kRowBytes + chunk / 8 * Layout::kPanelBytes + ((chunk % 8 ^ (row & 7)) << 4);
}

// `at` moved on by a pair of chunks, `pairs` times; it is the address of a chunk below 2. Few
// registers: only bits of eight chunks are swizzled, what lies beyond is a constant offset.
template <class Layout>
__device__ __forceinline__ uint32_t move_on(uint32_t at, int pairs) {
  return (at ^ (pairs % 4 << 5)) + pairs / 4 * Layout::kPanelBytes;
}

// Starts to copy kRows rows of kWidth elements. Those from `rows` on, and columns from `columns`
// on, become zeros; the first row exists.
template <int kRows, int kWidth>
__device__ __forceinline__ void load_block(uint32_t to, const void* data, int64_t at,
                                           int64_t stride, int rows, int columns) {
  constexpr int kRowsAtOnce = kThreads / 8;
  const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
  const auto* const start = static_cast<const uint16_t*>(data) + at;
  const auto* from = start + first * stride + chunk * 8;
#pragma unroll
  for (int row = first; row < first + kRows; row += kRowsAtOnce, from += kRowsAtOnce * stride)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel) {
      const bool wanted = row < rows && panel * 64 + chunk * 8 < columns;
      copy_async(to + place<Rows<kWidth>>(row, panel * 8 + chunk),
                 wanted ? from + panel * 64 : start, wanted);
    }
}

// A warp's 16 rows of Q, from `first` on, as left factors.
template <int kHead>
__device__ __forceinline__ void load_left(uint32_t (&q)[4], uint32_t block, int first, int step) {
  const int lane = lane_index();
  load_matrices(
      q, move_on<Rows<kHead>>(block + place<Rows<kHead>>(first + lane % 16, lane / 16), step));
}

// s += q k^T for one step of 16 dimensions: a warp's 16 rows by kKeys keys, from `first` on.
template <class Type, class Layout, int kKeys>
__device__ __forceinline__ void add_scores(float (&s)[kKeys / 8][4], const uint32_t (&q)[4],
                                           uint32_t keys, int first, int step) {
  const int lane = lane_index(), row = first + lane % 8 + lane / 16 * 8;
  const uint32_t at = move_on<Layout>(keys + place<Layout>(row, lane / 8 % 2), step);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    uint32_t k[4];
    load_matrices(k, at + n * 16 * Layout::kRowBytes);
    multiply<Type>(s[2 * n], q, k[0], k[1]);
    multiply<Type>(s[2 * n + 1], q, k[2], k[3]);
  }
}

// A warp's 16 rows of weights of 16 keys, rounded, as left factor: of scores s[j] and s[j + 1].
template <class Type>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[4], const float (&left)[4],
                                             const float (&right)[4]) {
  a[0] = pack<Type>(left[0], left[1]), a[1] = pack<Type>(left[2], left[3]);
  a[2] = pack<Type>(right[0], right[1]), a[3] = pack<Type>(right[2], right[3]);
}

// Where a lane reads values of keys from `first` on; each further 16 keys are 16 rows on.
template <class Layout>
__device__ __forceinline__ uint32_t values_at(uint32_t values, int first) {
  return values + place<Layout>(first + lane_index() % 16, lane_index() / 16);
}

// o += p v, for 16 keys.
template <class Type, class Layout, int kValue>
__device__ __forceinline__ void add_values(float (&o)[kValue / 8][4], const uint32_t (&weights)[4],
                                           uint32_t at) {
#pragma unroll
  for (int n = 0; n < kValue / 16; ++n) {
    uint32_t v[4];
    load_matrices_transposed(v, move_on<Layout>(at, n));
    multiply<Type>(o[2 * n], weights, v[0], v[1]);
    multiply<Type>(o[2 * n + 1], weights, v[2], v[3]);
  }
}

// Of the two rows of scores that a lane holds.
struct TwoRows {
  int position[2];
  bool real[2];
};

// Softcaps the scores, if that is wanted; returns what they are then still to be multiplied with.
template <int kColumns>
__device__ __forceinline__ float cap_scores(const Params& p, float (&s)[kColumns][4]) {
  if (p.softcap == 0) return p.scale;
  // tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor loses the sign.
  const float unit = p.scale / p.softcap * 2 * kLog2E;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[j][i] = p.softcap * (1.0f - 2.0f * reciprocal_fast(exp2_fast(s[j][i] * unit) + 1.0f));
  return 1.0f;
}

// What is not seen becomes -inf; columns from `first` on.
template <int kColumns>
__device__ __forceinline__ void hide_scores(const Params& p, const Request& r, int batch,
                                            const TwoRows& rows, int first,
                                            float (&s)[kColumns][4]) {
  static_assert(kColumns <= 16);
  const int mine = first + 2 * (lane_index() % 4);
  uint32_t valid = 0;  // a bit for each of the lane's columns; rolled up, as it is rarely needed
#pragma unroll 1
  for (int j = 0; j < kColumns; ++j)
    for (int x = 0; x < 2; ++x)
      valid |= uint32_t(is_valid(p, r, batch, mine + 8 * j + x)) << (2 * j + x);
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = rows.real[i / 2] && (valid >> (2 * j + i % 2) & 1) &&
                        sees(p, rows.position[i / 2], mine + 8 * j + i % 2);
      if (!seen) s[j][i] = kMinusInfinity;
    }
}

// The maximum of each of the lane's two rows, over all lanes that hold them; NaN if there is one.
template <int kColumns>
__device__ __forceinline__ void max_of_rows(const float (&s)[kColumns][4], float (&most)[2]) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    float y = max_or_nan(s[0][2 * x], s[0][2 * x + 1]);
#pragma unroll
    for (int j = 1; j < kColumns; ++j) y = max_or_nan(y, max_or_nan(s[j][2 * x], s[j][2 * x + 1]));
    y = max_or_nan(y, __shfl_xor_sync(kAllLanes, y, 1));
    most[x] = max_or_nan(y, __shfl_xor_sync(kAllLanes, y, 2));
  }
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// s becomes exp(unit * s - shift), and is added to each row's l: the lane's own share of it.
template <int kColumns>
__device__ __forceinline__ void weigh(float (&s)[kColumns][4], Row (&rows)[2], float unit) {
  const float unit2 = unit * kLog2E;
  const float shift2[2] = {rows[0].shift() * kLog2E, rows[1].shift() * kLog2E};
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_fast(fmaf(s[j][i], unit2, -shift2[i / 2]));
      rows[i / 2].l += s[j][i];
    }
}

template <int kColumns>
__device__ __forceinline__ void shrink(float (&o)[kColumns][4], const float (&by)[2]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) o[j][i] *= by[i / 2];
}

}  // namespace bsa::cuda
