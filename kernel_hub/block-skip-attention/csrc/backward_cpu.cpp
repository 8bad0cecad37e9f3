// The backward's binding: from tensors to a Backward, and its outputs.
#include "../torch-ext/torch_binding.h"
#include "backward.h"
#include "tensors.h"

using bsa::MaybeTensor, bsa::ScalarType, bsa::Tensor;

namespace {

bool is(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != int64_t(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes)
    if (x.size(i++) != size) return false;
  return true;
}

void check_lse(const bsa::Backward& p, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is(x, {p.B, p.Hq, p.Lq}) && x.scalar_type() == ScalarType::Float, name,
                  ": expected float32 [B, Hq, Lq], got ", bsa::shape(x));
}

void check_saved(const bsa::Backward& p, const Tensor& dout, const Tensor& out, const Tensor& lse,
                 const Tensor& skips) {
  for (const Tensor* x : {&dout, &out})
    STD_TORCH_CHECK(is(*x, {p.B, p.Lq, p.Hq, p.Dv}) && bsa::dtype_of(*x) == p.dtype,
                    "dout, out: expected [B, Lq, Hq, Dv] in q's dtype, got ", bsa::shape(*x));
  check_lse(p, lse, "lse");
  STD_TORCH_CHECK(
      skips.scalar_type() == ScalarType::Byte &&
          (skips.numel() == 0 || is(skips, {p.B, p.decode() ? p.Hkv : p.Hq, p.NQ, p.skip_bytes})),
      "skips: expected the forward's, or none, got ", bsa::shape(skips));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    Tensor dout, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor skips, MaybeTensor key_valid, MaybeTensor q_offset, MaybeTensor sinks, double scale,
    bool causal, int64_t window, double softcap, int64_t block_q, int64_t block_k) {
  bsa::Backward p;
  const bsa::Requests requests = bsa::fill(p, q, k, v, key_valid, q_offset, sinks, scale, causal,
                                           window, softcap, block_q, block_k);
  check_saved(p, dout, out, lse, skips);
  dout = bsa::with_dense_rows(dout);
  out = torch::stable::contiguous(out), lse = torch::stable::contiguous(lse);
  skips = torch::stable::contiguous(skips);
  p.dout = {dout.const_data_ptr(), dout.stride(0), dout.stride(2), dout.stride(1)};
  p.kept_out = out.const_data_ptr();
  p.kept_lse = static_cast<const float*>(lse.const_data_ptr());
  if (skips.numel()) p.skip_bits = static_cast<const uint8_t*>(skips.const_data_ptr());
  if (dlse) {
    check_lse(p, *dlse, "dlse");
    dlse = torch::stable::contiguous(*dlse);
    p.dlse = static_cast<const float*>(dlse->const_data_ptr());
  }
  Tensor dq = torch::stable::new_zeros(q, {p.B, p.Hq, p.Lq, p.D});
  Tensor dk = torch::stable::new_empty(q, {p.B, p.Hkv, p.Lk, p.D});
  Tensor dv = torch::stable::new_empty(q, {p.B, p.Hkv, p.Lk, p.Dv});
  Tensor dsinks = torch::stable::new_zeros(q, {sinks ? p.Hq : 0}, ScalarType::Float);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  bsa::run_backward(p, bsa::level());
  return {dq, dk, dv, dsinks};
}
