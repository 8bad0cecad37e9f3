// Any machine: gcc's vectors at the width that the target's baseline has (SSE2 on x86-64, NEON on
// aarch64).
#define BSA_LEVEL portable
#define BSA_ISA 0
#include "level.h"

namespace bsa {
BSA_DEFINE_LEVEL(kPortable, "portable")
}  // namespace bsa
