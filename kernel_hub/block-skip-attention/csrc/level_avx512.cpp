// x86-64 with AVX-512 F, BW, CD, DQ and VL. A pragma, not a flag, so that one list of sources
// serves every machine.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4")
#define BSA_LEVEL avx512
#define BSA_ISA 2
#include "level.h"

namespace bsa {
BSA_DEFINE_LEVEL(kAvx512, "avx512")
}  // namespace bsa
#endif
