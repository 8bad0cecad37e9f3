// Whether this process may use AMX tiles. Their state is large, so besides the processor two others
// have a say: the operating system must save the tiles, and Linux must be asked for them once.
#pragma once
#include "problem.h"

namespace bsa {

// What the processor and the operating system say of themselves.
struct AmxFacts {
  uint32_t features = 0;  // CPUID 7.0, EDX: bit 22 bfloat16 products, bit 24 tiles
  uint32_t rows_bytes =
      0;               // CPUID 1D.1, EBX: bytes of a tile's row, above them the number of tiles
  uint32_t rows = 0;   // CPUID 1D.1, ECX: rows of a tile
  uint64_t saved = 0;  // XCR0: bits 17 and 18, the tiles' shapes and contents
  bool (*ask)() = nullptr;  // asks Linux
};

// Null: it may. Else why not.
inline const char* amx_refusal(const AmxFacts& facts) {
  if (!(facts.features >> 24 & 1) || !(facts.features >> 22 & 1))
    return "the processor has no AMX tiles for bfloat16";
  if ((facts.rows_bytes & 0xffff) < 64 || facts.rows_bytes >> 16 < 8 || (facts.rows & 0xffff) < 16)
    return "the processor's AMX tiles are smaller than 8 of 16 rows of 64 bytes";
  if ((facts.saved >> 17 & 3) != 3) return "the operating system does not save AMX tiles";
  if (!facts.ask()) return "Linux refuses AMX tiles to this process (ARCH_REQ_XCOMP_PERM)";
  return nullptr;
}

// The level avx512_amx, from avx512_bf16. In float16 and float32, in decode, which waits for
// memory, and in the backward it is the same. The filter is left out: at the rates Intel states,
// tiles score a key sooner than the filter bounds its score.
inline Level with_amx(Level level) {
  level.name = "avx512_amx";
  level.prefill[int(Dtype::bf16)] = prefill_amx;
  level.filters[int(Dtype::bf16)] = false;
  return level;
}

}  // namespace bsa
