// The instructions of sm_80 and later that C++ has no word for, one function each. The emulator of
// the tests puts others of the same names in their place.
#pragma once
#include "params.h"

#if defined(BSA_EMULATE)
#include "sm80_instructions.h"
#else
#include <cuda_runtime.h>
#endif

namespace bsa::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  static constexpr int kBytes = 2;
};
struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  static constexpr int kBytes = 2;
};
struct Float32 {
  static constexpr int kBytes = 4;
};

#if defined(BSA_EMULATE)

inline unsigned char* dynamic_shared() { return emulator::block->shared; }
inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline void copy_async(uint32_t to, const void* from, bool wanted) {
  emulator::copy_async(to, from, wanted);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t at) { emulator::load_matrices(r, at, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  emulator::load_matrices(r, at, true);
}
template <class Type>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(d, a, {b0, b1}, Type::kIsBFloat16);
}
inline void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_bytes(d, a, {b0, b1});
}
inline void load_words(uint32_t (&to)[4], const void* from) { emulator::load_16(to, from); }
inline void load_floats(float* to, const float* from) { emulator::load_16(to, from); }
inline uint32_t or_of_warp(uint32_t x) { return __reduce_or_sync(kAllLanes, x); }
template <class Type>
float widen(uint32_t bits) {
  return emulator::half_of(bits, 0, Type::kIsBFloat16);
}
template <class Type>
uint32_t pack(float low, float high) {
  const auto narrow = Type::kIsBFloat16 ? emulator::to_bfloat16 : emulator::to_float16;
  return narrow(low) | uint32_t(narrow(high)) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : std::max(a, b); }

#else

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, some time before `wait_for_copies` says so; zeros if not wanted.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the latest `kPending` groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d += a b, with a [16, 16] and b [16, 8].
template <class Type>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (Type::kIsBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d += a b in integers, with a [16, 32] signed and b [32, 8] unsigned bytes.
__device__ __forceinline__ void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes that are read once and by no one else, and not written to by this kernel.
__device__ __forceinline__ void load_words(uint32_t (&to)[4], const void* from) {
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "l"(from));
}
__device__ __forceinline__ void load_floats(float* to, const float* from) {
  asm("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "l"(from));
}

__device__ __forceinline__ uint32_t or_of_warp(uint32_t x) {
  return __reduce_or_sync(kAllLanes, x);
}

// The lower 16 bits, as a float.
template <class Type>
__device__ __forceinline__ float widen(uint32_t bits) {
  float x;
  if constexpr (Type::kIsBFloat16)
    x = __uint_as_float(bits << 16);
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

// Two floats, each rounded to the nearest 16-bit one.
template <class Type>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (Type::kIsBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two; NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

#endif

}  // namespace bsa::cuda
