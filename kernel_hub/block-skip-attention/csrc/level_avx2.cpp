// x86-64 with AVX2, FMA and F16C. A pragma, not a flag, so that one list of sources serves every
// machine.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define BSA_LEVEL avx2
#define BSA_ISA 1
#include "level.h"

namespace bsa {
BSA_DEFINE_LEVEL(kAvx2, "avx2")
}  // namespace bsa
#endif
