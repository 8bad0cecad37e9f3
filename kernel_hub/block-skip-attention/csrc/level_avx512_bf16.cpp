// x86-64 with AVX-512 and its bfloat16 and int8 dot products. A pragma, not a flag, so that one
// list of sources serves every machine.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4,avx512bf16,avx512vnni")
#define BSA_LEVEL avx512_bf16
#define BSA_ISA 3
#include "level.h"

namespace bsa {
BSA_DEFINE_LEVEL(kAvx512Bf16, "avx512_bf16")
}  // namespace bsa
#endif
