// Matrices in shared memory, as the bulk copy writes and wgmma reads them.
//
// They are panels: rows of 64 elements (128 bytes), one after the other, in which the 16-byte
// pieces of row r are exchanged by xor with r % 8 (the 128-byte swizzle, by which neither a row nor
// a column meets a bank twice). Panels begin at multiples of 1024 bytes. A wider matrix is several
// panels.
#pragma once
#include "../params.h"

namespace bsa::cuda::sm90 {

// The types of elements.
struct Float16 {
  static constexpr bool kIsBFloat16 = false;
};
struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
};

constexpr int kPanel = 64;         // elements in a row of a panel
constexpr int kPanelRow = 128;     // bytes
constexpr int kSwizzleRows = 8;    // rows after which the swizzle repeats
constexpr int kProductDepth = 16;  // columns of A and rows of B in one product

// A shared memory matrix, as wgmma wants to be told. Both kinds of operand step 8 rows of a panel
// at a time: for Q and K those are 8 of the 64 or N, for V 8 of the 16. `next` is the distance of
// panels, which only V's products look at: their N spans several.
BSA_HOST_DEVICE uint64_t descriptor(uint32_t address, uint32_t next) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kStep = uint64_t(kSwizzleRows * kPanelRow >> 4) << 32;
  return kSwizzle128 | kStep | uint64_t(next >> 4 & 0x3fff) << 16 | (address >> 4 & 0x3fff);
}

}  // namespace bsa::cuda::sm90
