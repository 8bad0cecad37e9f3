// Which calls the Hopper kernels take.
#include "calls.h"

#include <cstdlib>
#include <utility>

namespace bsa::cuda {

namespace sm90 {
void prefill_bf16(const Params& p, void* stream, float expected_sparsity);
void prefill_f16(const Params& p, void* stream, float expected_sparsity);
void decode_bf16(const Params& p, void* stream, float expected_sparsity, int processors);
void decode_f16(const Params& p, void* stream, float expected_sparsity, int processors);
}  // namespace sm90

namespace {

// The copy engine has no tensors that repeat themselves.
bool repeats(const Params& p, const Strided& x, int heads, int rows) {
  return (x.batch == 0 && p.B > 1) || (x.head == 0 && heads > 1) || (x.row == 0 && rows > 1);
}
constexpr char kRepeats[] = "strides: sm_90a kernels take no expanded tensors";

}  // namespace

const char* refusal_prefill_sm90(const Params& p) {
  const std::pair<int, int> sizes = {p.D, p.Dv};
  const bool large = sizes == std::pair(256, 256);
  if (sizes != std::pair(64, 64) && sizes != std::pair(128, 128) && sizes != std::pair(192, 128) &&
      !large)
    return "head sizes: sm_90a kernels are compiled for 64, 128, 256, and 192 with 128";
  if (p.block_q != 64 || (p.block_k != 64 && (p.block_k != 128 || large)))
    return "geometry: sm_90a kernels run 64x64, and 64x128 at head sizes up to 192";
  if (p.order == kDescending) return "order: sm_90a kernels do not run descending";
  if (p.B > 65535 || p.Hkv > 65535) return "expected at most 65535 requests and key/value heads";
  if (repeats(p, p.q, p.Hq, p.Lq) || repeats(p, p.k, p.Hkv, p.Lk) || repeats(p, p.v, p.Hkv, p.Lk))
    return kRepeats;
  return nullptr;
}

// Beside what sm_80 decode takes.
const char* refusal_decode_sm90(const Params& p) {
  if (repeats(p, p.k, p.Hkv, p.Lk) || repeats(p, p.v, p.Hkv, p.Lk)) return kRepeats;
  return nullptr;
}

float expected_or_told(double expected_sparsity) {
  const char* told = std::getenv("HF_SPARSE_ATTENTION_EXPECTED_SPARSITY");
  return told ? std::strtof(told, nullptr) : float(expected_sparsity);
}

void prefill_sm90(const Params& p, void* stream, float expected_sparsity) {
  const auto run = p.dtype == kBFloat16 ? sm90::prefill_bf16 : sm90::prefill_f16;
  run(p, stream, expected_sparsity);
}

void decode_sm90(const Params& p, void* stream, float expected_sparsity, int processors) {
  const auto run = p.dtype == kBFloat16 ? sm90::decode_bf16 : sm90::decode_f16;
  run(p, stream, expected_sparsity, processors);
}

}  // namespace bsa::cuda
