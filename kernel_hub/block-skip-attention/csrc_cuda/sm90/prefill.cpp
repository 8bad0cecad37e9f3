// Which calls the Hopper kernel takes.
#include "prefill.h"

#include <utility>

namespace bsa::cuda {

namespace sm90 {
void prefill_bf16(const Params& p, void* stream, float expected_sparsity);
void prefill_f16(const Params& p, void* stream, float expected_sparsity);
}  // namespace sm90

const char* refusal_sm90(const Params& p) {
  const std::pair<int, int> sizes = {p.D, p.Dv};
  if (sizes != std::pair(64, 64) && sizes != std::pair(128, 128) && sizes != std::pair(192, 128))
    return "head sizes: sm_90a kernels are compiled for 64, 128, and 192 with 128";
  if (p.block_q != 64 || (p.block_k != 128 && (p.block_k != 64 || p.D > 128)))
    return "geometry: sm_90a kernels run 64x128, and 64x64 at head sizes up to 128";
  if (p.order == kDescending) return "order: sm_90a kernels do not run descending";
  if (p.decode()) return "decode: the sm_90a kernel is one for prefill";
  if (p.B > 65535 || p.Hkv > 65535) return "expected at most 65535 requests and key/value heads";
  // The copy engine has no tensors that repeat themselves.
  const auto repeats = [&p](const Strided& x, int heads, int rows) {
    return (x.batch == 0 && p.B > 1) || (x.head == 0 && heads > 1) || (x.row == 0 && rows > 1);
  };
  if (repeats(p.q, p.Hq, p.Lq) || repeats(p.k, p.Hkv, p.Lk) || repeats(p.v, p.Hkv, p.Lk))
    return "strides: sm_90a kernels take no expanded tensors";
  return nullptr;
}

void prefill_sm90(const Params& p, void* stream, float expected_sparsity) {
  (p.dtype == kBFloat16 ? sm90::prefill_bf16 : sm90::prefill_f16)(p, stream, expected_sparsity);
}

}  // namespace bsa::cuda
