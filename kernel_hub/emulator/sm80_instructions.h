// The instructions of sm_80 that ptx_sm80.cuh wraps, after the PTX manual's description of their
// fragments.
#pragma once
#include "cuda_words.h"

namespace emulator {

// 16-bit floats, by their bits.
inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
// Not every compiler has a type for float16.
inline float from_float16(uint16_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      float x =
          std::ldexp(float(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
      if (exponent == 31) x = fraction ? NAN : INFINITY;
      all[i] = i >> 15 ? -x : x;
    }
    return all;
  }();
  return values[bits];
}
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t to_float16(float x) {
  if (x != x) return 0x7FFF;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (size >= 65520.0f) return sign | 0x7C00;
  // Steps of its binade, or of the subnormals; ties to even. A carry moves on to the next binade.
  const int binade = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  const int steps = int(std::nearbyint(std::ldexp(size, 10 - binade)));
  return sign | uint16_t(((binade + 14) << 10) + steps);
}
inline float half_of(uint32_t pair, int which, bool is_bfloat16) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  return is_bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// ldmatrix.x4: lane i names row i % 8 of matrix i / 8; register j gets two elements of matrix j.
inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  struct {
    uint32_t address;
    uint32_t* r;
  } mine{address, r};
  together(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [&](auto** all) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 4; ++j) {
      uint32_t banks = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32_t at = all[8 * j + row]->address;
        std::memcpy(matrix[row], shared_pointer(at, 16, 16), 16);
        banks |= 1u << (at / 16 % 8);
      }
      totals.bank_conflicts += banks != 0xFF;
      for (int lane = 0; lane < kWarp; ++lane) {
        const int a = lane / 4, b = 2 * (lane % 4);
        const uint16_t low = transposed ? matrix[b][a] : matrix[a][b];
        const uint16_t high = transposed ? matrix[b + 1][a] : matrix[a][b + 1];
        all[lane]->r[j] = low | uint32_t(high) << 16;
      }
    }
  });
}

// mma.sync.m16n8k16, row by column, float32 sums.
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     bool is_bfloat16) {
  struct {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  together("mma", mine, [&](auto** all) {
    ++totals.products;
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i)
        for (int x = 0; x < 2; ++x)
          left[group + 8 * (i % 2)][pair + 8 * (i / 2) + x] =
              half_of(all[lane]->a[i], x, is_bfloat16);
      for (int i = 0; i < 2; ++i)
        for (int x = 0; x < 2; ++x)
          right[pair + 8 * i + x][group] = half_of(all[lane]->b[i], x, is_bfloat16);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = all[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        all[lane]->d[i] = sum;
      }
  });
}

// mma.sync.m16n8k32 of signed by unsigned bytes, row by column, 32-bit sums.
inline void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct {
    int* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  together("mma.s8", mine, [&](auto** all) {
    ++totals.byte_products;
    int left[16][32], right[32][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane / 4, four = 4 * (lane % 4);
      for (int i = 0; i < 4; ++i)
        for (int x = 0; x < 4; ++x)
          left[group + 8 * (i % 2)][four + 16 * (i / 2) + x] = int8_t(all[lane]->a[i] >> 8 * x);
      for (int i = 0; i < 2; ++i)
        for (int x = 0; x < 4; ++x)
          right[four + 16 * i + x][group] = uint8_t(all[lane]->b[i] >> 8 * x);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 32; ++k) all[lane]->d[i] += left[row][k] * right[k][column];
      }
  });
}

// ld.global of 16 bytes.
inline void load_16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("a load of 16 bytes from a misaligned address");
  std::memcpy(to, from, 16);
}

}  // namespace emulator
