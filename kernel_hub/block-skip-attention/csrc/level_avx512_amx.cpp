// x86-64 with AMX: what differs from avx512_bf16 is prefill in bfloat16. A pragma, not a flag, so
// that one list of sources serves every machine.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4,avx512bf16,avx512vnni,amx-tile,amx-bf16")
#define BSA_LEVEL avx512_amx
#define BSA_ISA 3
#include "prefill_team.h"
#include "tile_amx.h"

namespace bsa {
void prefill_amx(const Problem& p, int64_t b, int64_t kv_head, int64_t t0, int64_t t1,
                 char* scratch) {
  if (!avx512_amx::AmxEngine::serves(p.D))
    return kAvx512Bf16.prefill[int(Dtype::bf16)](p, b, kv_head, t0, t1, scratch);
  const avx512_amx::Tiles tiles(p.D);
  avx512_amx::prefill<avx512_amx::AmxEngine>(p, b, kv_head, t0, t1, scratch);
}
}  // namespace bsa
#endif
