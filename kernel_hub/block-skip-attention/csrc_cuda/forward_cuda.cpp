// The forward's binding for CUDA: from tensors to Params, its outputs, and the launches. Nothing
// here waits for the GPU or looks at a value there, and what is allocated depends on shapes only,
// so that a call can be captured in a CUDA graph.
#include <cstdlib>
#include <string_view>

#include "bindings.h"
#include "sm90/calls.h"

using bsa::MaybeTensor, bsa::ScalarType, bsa::Tensor;
using bsa::cuda::data, bsa::cuda::Params, bsa::cuda::strided;

namespace {

// The tensor as the kernels read it: the last dimension contiguous, everything 16-byte aligned.
bool is_aligned(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(3) == 1;
  for (int i = 0; i < 3; ++i) fits = fits && (x.size(i) == 1 || x.stride(i) % 8 == 0);
  return fits;
}
Tensor aligned(const Tensor& x) {
  if (is_aligned(x)) return x;
  const Tensor dense = torch::stable::contiguous(x);
  return is_aligned(dense) ? dense : torch::stable::clone(dense);
}

int32_t dtype_of(const Tensor& x) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
      "block_skip_attention (CUDA): expected bfloat16 or float16; Triton serves float32");
  return x.scalar_type() == ScalarType::BFloat16 ? bsa::cuda::kBFloat16 : bsa::cuda::kFloat16;
}

void check_limits(const Params& p, const bsa::cuda::Device& device) {
  STD_TORCH_CHECK(device.capability >= 80,
                  "block_skip_attention (CUDA): expected compute capability 8.0 or newer, got ",
                  device.capability / 10, ".", device.capability % 10);
  const char* reason = bsa::cuda::refusal_sm80(p, device);
  STD_TORCH_CHECK(!reason, "block_skip_attention (CUDA): ", reason, ", got head sizes ", p.D,
                  " and ", p.Dv, ", blocks of ", p.block_q, "x", p.block_k, ", ", p.Hq,
                  " heads on ", p.Hkv);
  STD_TORCH_CHECK(
      p.B <= 65535 && p.Hq <= 65535 / bsa::cuda::kDecodeMaxQueries &&
          p.Lq + int64_t(p.Lk) < (int64_t(1) << 31) - 1024,
      "block_skip_attention (CUDA): expected up to 65535 requests, 8191 heads, and fewer than 2^31 "
      "queries and keys, got ",
      p.B, ", ", p.Hq, ", ", p.Lq, ", ", p.Lk);
}

// Scratch memory for decode, to be kept until the kernels are on the stream.
struct Scratch {
  Tensor out, sums;
  std::optional<Tensor> seen, open;
};

Scratch prepare_decode(Params& p, const Tensor& q, int64_t split_k, bsa::cuda::Stream stream) {
  const bool split = p.order == bsa::cuda::kSinkDiagonal;
  const int64_t all = std::max(p.NK, 1), wanted = std::max<int64_t>(split_k / p.block_k, 1);
  p.split_blocks = int32_t(split ? std::min(wanted, all) : all);
  p.splits = int32_t((all + p.split_blocks - 1) / p.split_blocks);
  Scratch scratch{torch::stable::new_empty(q, {p.B, p.Hq, p.Lq, p.splits, p.Dv}, ScalarType::Float),
                  torch::stable::new_empty(q, {p.B, p.Hq, p.Lq, p.splits, 4}, ScalarType::Float),
                  std::nullopt, std::nullopt};
  p.partial_out = data<float>(scratch.out), p.partial_sums = data<float>(scratch.sums);
  if (p.valid) {  // which may have holes as large as a split
    scratch.seen = torch::stable::new_empty(q, {p.B, p.Lq}, ScalarType::Int);
    bsa::cuda::count_splits(p, data<int32_t>(*scratch.seen), stream);
    p.splits_seen = data<int32_t>(*scratch.seen);
  }
  if (bsa::cuda::may_prove(p)) {
    scratch.open = torch::stable::new_empty(q, {p.B, p.Hkv, p.Lq, p.splits, 1 + p.split_blocks},
                                            ScalarType::Int);
    p.open_blocks = data<int32_t>(*scratch.open);
    bsa::cuda::prove_skips(p, stream);
  }
  return scratch;
}

#if !defined(BSA_EMULATE)  // where Hopper's kernels have tests of their own
// Whether the kernels made for Hopper may run: there, and only there, unless
// HF_SPARSE_ATTENTION_CUDA_LEVEL is sm_80.
bool takes_sm90(const bsa::cuda::Device& device) {
  const char* level = std::getenv("HF_SPARSE_ATTENTION_CUDA_LEVEL");
  return device.capability == 90 && !(level && std::string_view(level) == "sm_80");
}
#endif

void prefill(const Params& p, [[maybe_unused]] const bsa::cuda::Device& device,
             bsa::cuda::Stream stream, [[maybe_unused]] double expected_sparsity) {
#if !defined(BSA_EMULATE)
  if (takes_sm90(device) && !bsa::cuda::refusal_prefill_sm90(p))
    return bsa::cuda::prefill_sm90(p, stream, bsa::cuda::expected_or_told(expected_sparsity));
#endif
  bsa::cuda::prefill_sm80(p, stream);
}

// As far as the splits.
void decode(const Params& p, [[maybe_unused]] const bsa::cuda::Device& device,
            bsa::cuda::Stream stream, [[maybe_unused]] double expected_sparsity) {
#if !defined(BSA_EMULATE)
  if (takes_sm90(device) && !bsa::cuda::refusal_decode_sm90(p))
    return bsa::cuda::decode_sm90(p, stream, bsa::cuda::expected_or_told(expected_sparsity),
                                  device.processors);
#endif
  bsa::cuda::decode_sm80(p, stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_cuda(
    Tensor q, Tensor k, Tensor v, MaybeTensor key_valid, MaybeTensor q_offset, MaybeTensor sinks,
    MaybeTensor log_lambda, MaybeTensor block_threshold, MaybeTensor max_dropped_mass, double scale,
    bool causal, int64_t window, double softcap, int64_t block_q, int64_t block_k, int64_t order,
    int64_t split_k, bool keep_sink, bool return_skips, bool return_dropped_mass,
    MaybeTensor int8_keys, double expected_sparsity) {
  using bsa::cuda::RuleTensor, bsa::rule_tensor;
  bsa::check_order(order, split_k);
  bsa::check_numbers(scale, window, softcap);
  bsa::check_inputs(q, k, v);
  bsa::check_masks(q, k, key_valid, q_offset, sinks);
  STD_TORCH_CHECK(scale > 0, "block_skip_attention (CUDA): expected a positive scale, got ", scale);
  for (const MaybeTensor& x : {MaybeTensor(k), MaybeTensor(v), key_valid, q_offset, sinks})
    STD_TORCH_CHECK(!x || x->get_device_index() == q.get_device_index(),
                    "block_skip_attention (CUDA): expected all tensors on one device");

  Params p;
  p.dtype = dtype_of(q);
  p.B = q.size(0), p.Hq = q.size(1), p.Lq = q.size(2), p.D = q.size(3);
  p.Hkv = k.size(1), p.Lk = k.size(2), p.Dv = v.size(3);
  p.group = p.Hkv ? p.Hq / p.Hkv : 1;
  p.block_q = block_q, p.block_k = block_k, p.order = order, p.keep_sink = keep_sink;
  p.scale = scale, p.softcap = softcap, p.causal = causal;
  p.window = std::min<int64_t>(window, std::numeric_limits<int32_t>::max() / 2);
#if !defined(BSA_EMULATE)
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
#endif
  const bsa::cuda::Device device = bsa::cuda::current_device();
  check_limits(p, device);
  p.NQ = p.decode() ? p.Lq : (p.Lq + p.block_q - 1) / p.block_q;
  p.NK = (p.Lk + p.block_k - 1) / p.block_k;
  p.skip_bytes = (p.NK + 7) / 8;
  p.log_lambda = rule_tensor<RuleTensor>(log_lambda, "log_lambda", q, {p.B, p.Hq});
  p.threshold = rule_tensor<RuleTensor>(block_threshold, "block_threshold", q, {p.B, p.Hq, p.NQ});
  p.budget = rule_tensor<RuleTensor>(max_dropped_mass, "max_dropped_mass", q, {p.B, p.Hq});
  if (sinks) p.sinks = data<float>(*sinks);
  if (key_valid) p.valid = data<uint8_t>(*key_valid);
  if (int8_keys) p.int8_keys = bsa::cuda::int8_keys(*int8_keys, k, p.Lk);

  Tensor out = torch::stable::new_empty(q, {p.B, p.Lq, p.Hq, p.Dv});
  Tensor lse = torch::stable::new_empty(q, {p.B, p.Hq, p.Lq}, ScalarType::Float);
  Tensor counts = torch::stable::new_zeros(q, {p.B, p.Hq, 2}, ScalarType::Long);
  Tensor skips = torch::stable::new_empty(q, {0}, ScalarType::Byte);
  if (return_skips) {  // the kernels set bits by words: some bytes more, which no one sees
    const int64_t voters = p.decode() ? p.Hkv : p.Hq;
    const int64_t bytes = p.B * voters * p.NQ * p.skip_bytes;
    Tensor words = torch::stable::new_zeros(q, {(bytes + 3) / 4 * 4}, ScalarType::Byte);
    skips = torch::stable::view(torch::stable::narrow(words, 0, 0, bytes),
                                {p.B, voters, p.NQ, p.skip_bytes});
    p.skips = data<uint8_t>(skips);
  }
  Tensor dropped = return_dropped_mass
                       ? torch::stable::new_empty(q, {p.B, p.Hq, p.Lq}, ScalarType::Float)
                       : torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (return_dropped_mass) p.dropped = data<float>(dropped);
  p.out = out.mutable_data_ptr(), p.lse = data<float>(lse);
  p.counts = reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr());
  if (p.B == 0 || p.Hq == 0 || p.Lq == 0) return {out, lse, counts, skips, dropped};

  q = aligned(q), k = aligned(k), v = aligned(v);
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  const bsa::cuda::Stream stream = bsa::cuda::current_stream(q);
  std::optional<Tensor> requests;
  if (key_valid || q_offset) {
    requests = torch::stable::new_empty(q, {p.B, 4}, ScalarType::Int);
    auto* made = reinterpret_cast<bsa::cuda::Request*>(requests->mutable_data_ptr());
    const auto* offset = q_offset ? data<int64_t>(*q_offset) : nullptr;
    bsa::cuda::make_requests(p, offset, offset && q_offset->size(0) == 1, made, stream);
    p.requests = made;
  }
  if (p.decode()) {
    const Scratch scratch = prepare_decode(p, q, split_k, stream);
    decode(p, device, stream, expected_sparsity);
    bsa::cuda::join_splits(p, stream);
  } else {
    prefill(p, device, stream, expected_sparsity);
  }
  return {out, lse, counts, skips, dropped};
}
