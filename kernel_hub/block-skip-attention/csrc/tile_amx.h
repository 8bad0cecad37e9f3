// The products of prefill on AMX tiles, in bfloat16. A tile has 16 rows of 64 bytes, and one
// instruction is C [16][16] += A [16][32] B [16][16][2], where B holds pairs of neighbours. S, P,
// Q^T and O^T lie as tile_bf16.h has them; only V is transposed:
//
//   S    C: 16 keys of S [keys][64]    A: 16 rows of K where they lie   B: Q^T [D / 2][64][2]
//   O^T  C: 16 rows of O^T [Dv][64]    A: V^T [Dv][64], once a flush    B: P [keys / 2][64][2]
//
// An instruction sums 32 products in float, then adds them to C. Which ones does not depend on the
// other keys of the tile, so a key has the same scores in whatever step it is scored.
#pragma once
#include "tile_bf16.h"

namespace bsa::BSA_LEVEL {

constexpr int kTileRows = 16, kTileDepth = 32;

// What the eight tiles of this thread look like while this lives: 0 to 3 are the sums for four
// vectors of lanes, 4 and 5 A and B. What a head size leaves behind its last whole 32 goes through
// 6 and 7, so that no tile reads past a row of K.
class Tiles {
 public:
  explicit Tiles(int64_t D) {
    const int left = int(D % kTileDepth);
    for (int i = 0; i < 6; ++i) config_.bytes[i] = 64, config_.rows[i] = kTileRows;
    if (left) {
      config_.bytes[6] = uint16_t(left * 2), config_.rows[6] = kTileRows;
      config_.bytes[7] = 64, config_.rows[7] = uint8_t(left / 2);
    }
    // g++'s intrinsic says that it reads eight bytes.
    asm volatile("" : : "r"(&config_) : "memory");
    _tile_loadconfig(&config_);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
};

// What was stored before is in memory: g++'s _tile_loadd does not say that it reads any.
BSA_INLINE void stored() { asm volatile("" ::: "memory"); }

// The registers are numbers in the instructions' text, so each is spelled out.
#define BSA_SUMS(NV, each)  \
  each(0);                  \
  if constexpr (NV > 1) {   \
    each(1);                \
  }                         \
  if constexpr (NV > 2) {   \
    static_assert(NV == 4); \
    each(2);                \
    each(3);                \
  }

template <int NV>
BSA_INLINE void clear_sums() {
#define BSA_CLEAR(j) _tile_zero(j)
  BSA_SUMS(NV, BSA_CLEAR)
#undef BSA_CLEAR
}

template <int NV>
BSA_INLINE void load_sums(const float* c) {
#define BSA_LOAD(j) _tile_loadd(j, c + j * W, kLanes * 4)
  BSA_SUMS(NV, BSA_LOAD)
#undef BSA_LOAD
}

template <int NV>
BSA_INLINE void store_sums(float* c) {
#define BSA_STORE(j) _tile_stored(j, c + j * W, kLanes * 4)
  BSA_SUMS(NV, BSA_STORE)
#undef BSA_STORE
}

// The sums of NV vectors of lanes += A, `stride` bytes from row to row, times B.
template <int NV>
BSA_INLINE void add_product(const bf16* a, int64_t stride, const uint32_t* b) {
  _tile_loadd(4, a, stride);
#define BSA_ADD(j)                       \
  _tile_loadd(5, b + j * W, kLanes * 4); \
  _tile_dpbf16ps(j, 4, 5)
  BSA_SUMS(NV, BSA_ADD)
#undef BSA_ADD
}

// The same for what a head size leaves.
template <int NV>
BSA_INLINE void add_rest(const bf16* a, int64_t stride, const uint32_t* b) {
  _tile_loadd(6, a, stride);
#define BSA_ADD(j)                       \
  _tile_loadd(7, b + j * W, kLanes * 4); \
  _tile_dpbf16ps(j, 6, 7)
  BSA_SUMS(NV, BSA_ADD)
#undef BSA_ADD
}
#undef BSA_SUMS

// Scores of the 16 keys at k.
template <int NV>
BSA_INLINE void score_tile_amx(const bf16* k, int64_t stride, const uint32_t* q, int64_t D,
                               float* s) {
  stored();
  clear_sums<NV>();
  int64_t d = 0;
  for (; d + kTileDepth <= D; d += kTileDepth)
    add_product<NV>(k + d, stride * 2, q + d / 2 * kLanes);
  if (d < D) add_rest<NV>(k + d, stride * 2, q + d / 2 * kLanes);
  store_sums<NV>(s);
}

// V^T [Dv, in whole tiles][64] of n rows of V; the keys behind them, in whole tiles, are zeros.
BSA_INLINE void transpose_values(const int64_t* keys, int64_t n, const bf16* v, int64_t stride,
                                 int64_t Dv, bf16* vt) {
  for (int64_t d = 0; d < Dv; d += 16) {
    const __mmask16 here = Dv - d >= 16 ? 0xffff : __mmask16((1u << (Dv - d)) - 1);
    const auto row = [&](int64_t k) {
      const __mmask16 some = k < n ? here : __mmask16(0);
      const bf16* const at = v + (k < n ? keys[k] * stride + d : 0);
      return (vi)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at));
    };
    for (int64_t k = 0; k < n; k += kTileDepth) {
      vi x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = row(k + 2 * i) | row(k + 2 * i + 1) << 16;
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(vt + (d + i) * kLanes + k, (__m512i)x[i]);
    }
  }
}

// Needs Tiles(D) around it.
struct AmxEngine : Bf16Engine {
  template <class Ahead = NothingAhead>
  static void scores(const bf16* k, int64_t stride, int64_t n, const void* qt, int64_t D,
                     int vectors, float* wide, float* s, float* top, const Ahead& ahead = {}) {
    const uint32_t* q = static_cast<const uint32_t*>(qt);
    with_tile(vectors, [&]<int, int NV>() __attribute__((always_inline)) {
      vf tops[NV];
      for (int j = 0; j < NV; ++j) tops[j] = splat(-kInf);
      for (int64_t i = 0; i < n; i += kTileRows) {
        const int64_t m = n - i < kTileRows ? n - i : kTileRows;
        const bf16* rows = k + i * stride;
        int64_t step = stride;
        ahead(i, m);
        if (m < kTileRows) {  // a tile reads 16 rows, and S has room for 16, but K may end here
          bf16* const copy = reinterpret_cast<bf16*>(wide);
          memset(copy, 0, kTileRows * D * sizeof(bf16));
          for (int64_t x = 0; x < m; ++x) memcpy(copy + x * D, rows + x * step, D * sizeof(bf16));
          rows = copy, step = D;
        }
        score_tile_amx<NV>(rows, step, q, D, s + i * kLanes);
        for (int64_t x = i; x < i + m; ++x)
          for (int j = 0; j < NV; ++j) tops[j] = vmax(tops[j], load(s + x * kLanes + j * W));
      }
      for (int j = 0; j < NV; ++j) store(top + j * W, tops[j]);
    });
  }

  static void values(float* s, int64_t n, const int64_t* keys, const bf16* v, int64_t stride,
                     int64_t Dv, float unit, const float* minus_top, int vectors, float* l,
                     void* packed, float* wide, float* ot) {
    uint32_t* const p = static_cast<uint32_t*>(packed);
    bf16* const vt = reinterpret_cast<bf16*>(wide);
    weigh(s, n, unit, minus_top, l, p, [](int64_t) {});
    const int64_t pairs = (n + 1) / 2, whole = (pairs + 15) / 16 * 16;
    memset(p + pairs * kLanes, 0, (whole - pairs) * kLanes * sizeof(uint32_t));
    transpose_values(keys, n, v, stride, Dv, vt);
    stored();
    with_tile(vectors, [&]<int, int NV>() __attribute__((always_inline)) {
      for (int64_t d = 0; d < Dv; d += kTileRows) {
        load_sums<NV>(ot + d * kLanes);
        for (int64_t k = 0; k < n; k += kTileDepth)
          add_product<NV>(vt + d * kLanes + k, kLanes * 2, p + k / 2 * kLanes);
        store_sums<NV>(ot + d * kLanes);
      }
    });
  }
};

}  // namespace bsa::BSA_LEVEL
