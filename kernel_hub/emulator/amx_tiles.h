// AMX tiles in plain C++, after Intel's manual: the chapter on programming with AMX in volume 1,
// the instructions' own pages in volume 2. Included before a source (-include), it takes the place
// of the intrinsics. What the processor answers with a fault is an exception here; so is a tile
// that reads `guard`, which stands for memory that may not be there.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace emulator {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;  // palette 1

struct Tile {
  int rows = 0, bytes = 0;  // 0: not configured
  alignas(64) uint8_t data[kTileRows][kTileBytes] = {};
};

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// The tiles of a thread.
inline thread_local bool tiles_configured = false;
inline thread_local Tile tiles[kTiles];
inline thread_local long tile_products = 0;
// Set for all threads before they start.
inline const char *guard_begin = nullptr, *guard_end = nullptr;

inline void tile_fault_if(bool wrong, const char* why) {
  if (wrong) throw std::runtime_error(std::string("AMX fault: ") + why);
}

inline void release_tiles() {
  tiles_configured = false;
  for (Tile& tile : tiles) tile = Tile();
}

inline void configure_tiles(const void* memory) {
  TileConfig c;
  std::memcpy(&c, memory, sizeof(c));
  release_tiles();
  if (c.palette == 0) return;
  tile_fault_if(c.palette != 1, "LDTILECFG: unknown palette");
  tile_fault_if(c.start_row != 0, "LDTILECFG: a start row, which nothing here resumes at");
  for (uint8_t x : c.reserved) tile_fault_if(x, "LDTILECFG: reserved bytes are not zero");
  for (int i = 0; i < 16; ++i) {
    tile_fault_if(i >= kTiles && (c.rows[i] || c.bytes[i]), "LDTILECFG: more than 8 tiles");
    tile_fault_if(c.rows[i] > kTileRows || c.bytes[i] > kTileBytes, "LDTILECFG: too large a tile");
    tile_fault_if(!c.rows[i] != !c.bytes[i],
                  "LDTILECFG: rows without bytes, or bytes without rows");
    if (i < kTiles) tiles[i].rows = c.rows[i], tiles[i].bytes = c.bytes[i];
  }
  tiles_configured = true;
}

inline Tile& use_tile(int t) {
  tile_fault_if(!tiles_configured, "tiles are not configured in this thread");
  tile_fault_if(tiles[t].rows == 0, "this tile is not configured");
  return tiles[t];
}

inline void zero_tile(int t) { std::memset(use_tile(t).data, 0, sizeof(Tile::data)); }

inline void load_tile(int t, const void* base, int64_t stride) {
  Tile& tile = use_tile(t);
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; ++r) {
    const char* const row = static_cast<const char*>(base) + r * stride;
    tile_fault_if(row + tile.bytes > guard_begin && row < guard_end,
                  "TILELOADD reads beyond what it was given");
    std::memcpy(tile.data[r], row, tile.bytes);
  }
}

inline void store_tile(int t, void* base, int64_t stride) {
  const Tile& tile = use_tile(t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tile.data[r], tile.bytes);
}

// A row of C += a row of A times B. Even and odd products have a sum each; those two are added, and
// their sum is added to C. Never inlined: the rounding mode must be set around it.
__attribute__((noinline, target("arch=x86-64-v4"))) inline void multiply_row(
    const uint16_t* a, int pairs, const uint8_t (*b)[kTileBytes], float* c) {
  float sums[2 * kTileBytes / 4] = {};
  const auto widen = [](uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  };
  for (int k = 0; k < pairs; ++k) {
    const float even = widen(a[2 * k]), odd = widen(a[2 * k + 1]);
    uint16_t row[kTileBytes / 2];
    std::memcpy(row, b[k], kTileBytes);
    for (int n = 0; n < kTileBytes / 4; ++n) {
      sums[2 * n] = __builtin_fmaf(even, widen(row[2 * n]), sums[2 * n]);
      sums[2 * n + 1] = __builtin_fmaf(odd, widen(row[2 * n + 1]), sums[2 * n + 1]);
    }
  }
  for (int n = 0; n < kTileBytes / 4; ++n) {
    const float both = sums[2 * n] + sums[2 * n + 1];
    c[n] = c[n] + both;
  }
}

// Rounds to nearest even and counts subnormals as zeros, in and out, whatever MXCSR says.
inline void multiply_tiles(int c, int a, int b) {
  tile_fault_if(c == a || c == b || a == b, "TDPBF16PS: the same tile twice");
  Tile &to = use_tile(c), &left = use_tile(a), &right = use_tile(b);
  tile_fault_if(to.bytes % 4 || left.bytes % 4 || right.bytes % 4, "TDPBF16PS: half a pair");
  tile_fault_if(to.rows != left.rows || to.bytes != right.bytes || left.bytes / 4 != right.rows,
                "TDPBF16PS: shapes that do not fit");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);
  for (int m = 0; m < to.rows; ++m) {
    alignas(64) uint16_t row[kTileBytes / 2];
    alignas(64) float sums[kTileBytes / 4];
    std::memcpy(row, left.data[m], kTileBytes);
    std::memcpy(sums, to.data[m], kTileBytes);
    multiply_row(row, left.bytes / 4, right.data, sums);
    std::memset(to.data[m], 0, kTileBytes);
    std::memcpy(to.data[m], sums, to.bytes);
  }
  _mm_setcsr(before);
  ++tile_products;
}

}  // namespace emulator

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulator::configure_tiles(config)
#define _tile_release() emulator::release_tiles()
#define _tile_loadd(t, base, stride) emulator::load_tile(t, base, stride)
#define _tile_stored(t, base, stride) emulator::store_tile(t, base, stride)
#define _tile_zero(t) emulator::zero_tile(t)
#define _tile_dpbf16ps(c, a, b) emulator::multiply_tiles(c, a, b)
