// Which calls the Hopper kernel takes.
#include "prefill.h"

#include <cstdlib>
#include <utility>

namespace bsa::cuda {

namespace sm90 {
void prefill_bf16(const Params& p, void* stream, float expected_sparsity);
void prefill_f16(const Params& p, void* stream, float expected_sparsity);
}  // namespace sm90

const char* refusal_sm90([[maybe_unused]] const Params& p) {
#if defined(BSA_EMULATE)
  return "the emulated build has no sm_90a kernels: tests/sm90_runner.cpp runs them";
#else
  const std::pair<int, int> sizes = {p.D, p.Dv};
  const bool large = sizes == std::pair(256, 256);
  if (sizes != std::pair(64, 64) && sizes != std::pair(128, 128) && sizes != std::pair(192, 128) &&
      !large)
    return "head sizes: sm_90a kernels are compiled for 64, 128, 256, and 192 with 128";
  if (p.block_q != 64 || (p.block_k != 64 && (p.block_k != 128 || large)))
    return "geometry: sm_90a kernels run 64x64, and 64x128 at head sizes up to 192";
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
#endif
}

float expected_sparsity() {
  const char* told = std::getenv("HF_SPARSE_ATTENTION_EXPECTED_SPARSITY");
  return told ? std::strtof(told, nullptr) : 0.5f;
}

void prefill_sm90([[maybe_unused]] const Params& p, [[maybe_unused]] void* stream,
                  [[maybe_unused]] float expected_sparsity) {
#if !defined(BSA_EMULATE)
  (p.dtype == kBFloat16 ? sm90::prefill_bf16 : sm90::prefill_f16)(p, stream, expected_sparsity);
#endif
}

}  // namespace bsa::cuda
