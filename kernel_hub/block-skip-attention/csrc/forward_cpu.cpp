// The forward's binding: from tensors to a Problem, and its outputs.
#include "../torch-ext/torch_binding.h"
#include "forward.h"
#include "int8_keys_cpu.h"
#include "tensors.h"

using bsa::MaybeTensor, bsa::ScalarType, bsa::Tensor;

std::string cpu_level() { return bsa::level().name; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_cpu(
    Tensor q, Tensor k, Tensor v, MaybeTensor key_valid, MaybeTensor q_offset, MaybeTensor sinks,
    MaybeTensor log_lambda, MaybeTensor block_threshold, MaybeTensor max_dropped_mass, double scale,
    bool causal, int64_t window, double softcap, int64_t block_q, int64_t block_k, int64_t order,
    int64_t split_k, bool keep_sink, bool return_skips, bool return_dropped_mass,
    MaybeTensor int8_keys, double) {
  bsa::check_order(order, split_k);
  bsa::Problem p;
  p.split_k = split_k, p.order = bsa::Order(order), p.keep_sink = keep_sink;
  const bsa::Requests requests = bsa::fill(p, q, k, v, key_valid, q_offset, sinks, scale, causal,
                                           window, softcap, block_q, block_k);
  p.log_lambda = bsa::rule_tensor<bsa::RuleTensor>(log_lambda, "log_lambda", q, {p.B, p.Hq});
  p.threshold =
      bsa::rule_tensor<bsa::RuleTensor>(block_threshold, "block_threshold", q, {p.B, p.Hq, p.NQ});
  p.budget =
      bsa::rule_tensor<bsa::RuleTensor>(max_dropped_mass, "max_dropped_mass", q, {p.B, p.Hq});
  p.any_rule = p.log_lambda.data || p.threshold.data || p.budget.data;

  if (int8_keys) p.int8 = bsa::int8_keys(*int8_keys, p.B, p.Hkv, p.D, p.Lk);

  Tensor out = torch::stable::new_empty(q, {p.B, p.Lq, p.Hq, p.Dv});
  Tensor lse = torch::stable::new_empty(q, {p.B, p.Hq, p.Lq}, ScalarType::Float);
  Tensor counts = torch::stable::new_zeros(q, {p.B, p.Hq, 2}, ScalarType::Long);
  Tensor skips =
      return_skips ? torch::stable::new_zeros(
                         q, {p.B, p.decode() ? p.Hkv : p.Hq, p.NQ, p.skip_bytes}, ScalarType::Byte)
                   : torch::stable::new_empty(q, {0}, ScalarType::Byte);
  Tensor dropped = return_dropped_mass
                       ? torch::stable::new_zeros(q, {p.B, p.Hq, p.Lq}, ScalarType::Float)
                       : torch::stable::new_empty(q, {0}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  if (return_skips) p.skips = static_cast<uint8_t*>(skips.mutable_data_ptr());
  if (return_dropped_mass) p.dropped = static_cast<float*>(dropped.mutable_data_ptr());

  if (p.B > 0 && p.Hq > 0 && p.Lq > 0) {
    if (p.decode())
      bsa::run_decode(p, bsa::level());
    else
      bsa::run_prefill(p, bsa::level());
  }
  return {out, lse, counts, skips, dropped};
}
