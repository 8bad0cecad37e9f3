// The matrix product of a warpgroup, and where its operands lie.
//
// wgmma multiplies A [64, 16] by B [16, N] and adds to D [64, N], asynchronously, for four warps at
// once. D lies in registers; A there or in shared memory; B in shared memory.
//
// D: warp w holds rows 16 w to 16 w + 15. A thread holds, of row r = lane / 4 and of row r + 8, the
// columns 8 i + 2 (lane % 4) + {0, 1} for each i: d[4 i + {0, 1}] of row r, d[4 i + {2, 3}] of
// row r + 8. A in registers is the same for 16 columns, two values to a register, so that weights
// computed from D are the A of the next product where they lie.
//
// Matrices in shared memory: see panels.h.
//
// Sources: the PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once
#include "ptx.h"

namespace bsa::cuda::sm90 {

// Registers are about to be read by products; every product waits for this.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last call are one group.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// clang-format off
#define BSA_LIST_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define BSA_LIST_64 \
  BSA_LIST_32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BSA_LIST_128 \
  BSA_LIST_64 \
  "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
  "%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
  "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125," \
  "%126,%127"
#define BSA_IO_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define BSA_IO_32(d, i) BSA_IO_8(d, i), BSA_IO_8(d, i + 8), BSA_IO_8(d, i + 16), BSA_IO_8(d, i + 24)
#define BSA_IO_64(d) BSA_IO_32(d, 0), BSA_IO_32(d, 32)
#define BSA_IO_128(d) BSA_IO_64(d), BSA_IO_32(d, 64), BSA_IO_32(d, 96)

// Operands after the `n` of D: A's descriptor or registers, B's descriptor, whether D counts.
#define BSA_SHARED(n, list, a, b, c, type, io) \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" c ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
               " {" list "}, %" a ", %" b ", add, 1, 1, 0, 0;\n}" \
               : io : "l"(a_), "l"(b_), "r"(add))
#define BSA_REGISTERS(n, list, a, b, c, type, transposed, ...) \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" c ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
               " {" list "}, {" a "}, %" b ", add, 1, 1, " transposed ";\n}" \
               : __VA_ARGS__ : "r"(a_[0]), "r"(a_[1]), "r"(a_[2]), "r"(a_[3]), "l"(b_), "r"(add))
// clang-format on

// D = A B^T (+ D if `add`): A [64, 16] and B [N, 16] in shared memory.
template <class T, int kN>
__device__ __forceinline__ void product(float (&d)[kN / 2], uint64_t a_, uint64_t b_, int add) {
  static_assert(kN == 64 || kN == 128);
  if constexpr (kN == 128 && T::kIsBFloat16)
    BSA_SHARED("128", BSA_LIST_64, "64", "65", "66", "bf16", BSA_IO_64(d));
  else if constexpr (kN == 128)
    BSA_SHARED("128", BSA_LIST_64, "64", "65", "66", "f16", BSA_IO_64(d));
  else if constexpr (T::kIsBFloat16)
    BSA_SHARED("64", BSA_LIST_32, "32", "33", "34", "bf16", BSA_IO_32(d, 0));
  else
    BSA_SHARED("64", BSA_LIST_32, "32", "33", "34", "f16", BSA_IO_32(d, 0));
}

// The same with A in registers. kTransposed: B is [16, N] in shared memory, as V is.
template <class T, int kN, bool kTransposed>
__device__ __forceinline__ void product(float (&d)[kN / 2], const uint32_t (&a_)[4], uint64_t b_,
                                        int add) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
#define BSA_CASE(n, list, a, b, c, type, ...)                \
  if constexpr (kTransposed)                                 \
    BSA_REGISTERS(n, list, a, b, c, type, "1", __VA_ARGS__); \
  else                                                       \
    BSA_REGISTERS(n, list, a, b, c, type, "0", __VA_ARGS__)
  if constexpr (kN == 256 && T::kIsBFloat16) {
    BSA_CASE("256", BSA_LIST_128, "%128,%129,%130,%131", "132", "133", "bf16", BSA_IO_128(d));
  } else if constexpr (kN == 256) {
    BSA_CASE("256", BSA_LIST_128, "%128,%129,%130,%131", "132", "133", "f16", BSA_IO_128(d));
  } else if constexpr (kN == 128 && T::kIsBFloat16) {
    BSA_CASE("128", BSA_LIST_64, "%64,%65,%66,%67", "68", "69", "bf16", BSA_IO_64(d));
  } else if constexpr (kN == 128) {
    BSA_CASE("128", BSA_LIST_64, "%64,%65,%66,%67", "68", "69", "f16", BSA_IO_64(d));
  } else if constexpr (T::kIsBFloat16) {
    BSA_CASE("64", BSA_LIST_32, "%32,%33,%34,%35", "36", "37", "bf16", BSA_IO_32(d, 0));
  } else {
    BSA_CASE("64", BSA_LIST_32, "%32,%33,%34,%35", "36", "37", "f16", BSA_IO_32(d, 0));
  }
#undef BSA_CASE
}

// Waits until at most kPending groups are under way. What is passed was computed, or is read, on
// this side of the wait: the compiler may move it no further.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void products_wait(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : BSA_IO_128(d) : "n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void products_wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : BSA_IO_64(d) : "n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void products_wait(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : BSA_IO_32(d, 0) : "n"(kPending) : "memory");
}

// Keeps the compiler from moving what computes or reads these registers past this point.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#undef BSA_LIST_32
#undef BSA_LIST_64
#undef BSA_LIST_128
#undef BSA_IO_8
#undef BSA_IO_32
#undef BSA_IO_64
#undef BSA_IO_128
#undef BSA_SHARED
#undef BSA_REGISTERS

}  // namespace bsa::cuda::sm90
