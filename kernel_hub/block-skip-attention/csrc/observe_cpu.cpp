// The binding of `observe`.
#include "../torch-ext/torch_binding.h"
#include "observe.h"
#include "tensors.h"

using bsa::MaybeTensor, bsa::ScalarType, bsa::Tensor;

namespace {

std::string size(int64_t n) { return n < 0 ? "any" : std::to_string(n); }

// A negative number of rows or columns stands for any.
const int64_t* integers(Tensor& x, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_cpu() && x.dim() == 2 &&
                      (rows < 0 || x.size(0) == rows) && (columns < 0 || x.size(1) == columns),
                  name, ": expected int64 [", size(rows), ", ", size(columns), "], got ",
                  bsa::shape(x));
  x = torch::stable::contiguous(x);
  return static_cast<const int64_t*>(x.const_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> observe_cpu(
    Tensor q, Tensor k, Tensor v, MaybeTensor sinks, double scale, int64_t window, double softcap,
    Tensor geometries, Tensor kept, bool keep_sink, Tensor groups, int64_t group_count, Tensor eps,
    int64_t bins, double u_min, double bins_per_nat, double mass_unit, int64_t sample_from,
    int64_t sample_every) {
  bsa::Problem p;
  MaybeTensor none;
  const bsa::Requests requests = bsa::fill(p, q, k, v, none, none, sinks, scale, true, window,
                                           softcap, bsa::kLanes, bsa::kLanes);
  STD_TORCH_CHECK(p.B == 1 && p.Lq == p.Lk && p.Lq > 0,
                  "q, k: expected one request with as many queries as keys, got ", bsa::shape(q),
                  " and ", bsa::shape(k));
  const int64_t n = geometries.size(0);
  const int64_t* const blocks = integers(geometries, "geometries", -1, 2);
  STD_TORCH_CHECK(n >= 1 && n <= bsa::kMaxObserved, "geometries: expected 1 to ", bsa::kMaxObserved,
                  ", got ", n);
  const int64_t* const keep = integers(kept, "kept", n, -1);
  const int64_t* const group = integers(groups, "groups", 1, p.NQ);
  STD_TORCH_CHECK(eps.scalar_type() == ScalarType::Float && eps.dim() == 1 && eps.is_cpu() &&
                      eps.size(0) <= bsa::kMaxEps,
                  "eps: expected float32 with up to ", bsa::kMaxEps, " values, got ",
                  bsa::shape(eps));
  STD_TORCH_CHECK(bins >= 2 && bins <= bsa::kMaxBins, "bins: expected 2 to ", bsa::kMaxBins,
                  ", got ", bins);
  STD_TORCH_CHECK(mass_unit > 0 && sample_every >= 1 && bins_per_nat > 0,
                  "mass_unit, bins_per_nat, sample_every: expected positive numbers");

  bsa::Observe o;
  o.geometries = int(n), o.levels = kept.size(1), o.positions = p.Lq / bsa::kLanes;
  o.eps_count = eps.size(0), o.keep_sink = keep_sink, o.groups = group, o.bins = bins;
  o.width = 2 * bins + 1 + o.eps_count;
  o.u_min = float(u_min), o.bins_per_nat = float(bins_per_nat), o.mass_unit = mass_unit;
  o.sample_from = sample_from, o.sample_every = sample_every;
  eps = torch::stable::contiguous(eps);
  for (int64_t e = 0; e < o.eps_count; ++e)
    o.eps[e] = static_cast<const float*>(eps.const_data_ptr())[e];
  for (int64_t i = 0; i < p.NQ; ++i)
    STD_TORCH_CHECK(group[i] >= 0 && group[i] < group_count, "groups: expected 0 to ",
                    group_count - 1, ", got ", group[i]);

  Tensor out = torch::stable::new_empty(q, {1, p.Lq, p.Hq, p.Dv});
  Tensor prefill = torch::stable::new_zeros(q, {n, p.Hq, o.width}, ScalarType::Long);
  Tensor decode = torch::stable::new_zeros(q, {n, group_count, p.Hkv, o.width}, ScalarType::Long);
  Tensor prefill_tops =
      torch::stable::new_empty(q, {n, o.levels, p.Hq, o.positions}, ScalarType::Float);
  Tensor decode_tops =
      torch::stable::new_empty(q, {n, o.levels, p.Hkv, o.positions}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  for (int64_t g = 0; g < n; ++g) {
    const int64_t block_k = blocks[2 * g], split_k = blocks[2 * g + 1];
    STD_TORCH_CHECK(block_k == 1 || (block_k > 0 && block_k % bsa::kLanes == 0),
                    "geometries: expected 1 or a multiple of 64 as block_k, got ", block_k);
    STD_TORCH_CHECK(split_k >= 1, "geometries: expected split_k of at least 1, got ", split_k);
    for (int64_t i = 0; i < o.levels; ++i)
      STD_TORCH_CHECK(keep[g * o.levels + i] >= (i ? keep[g * o.levels + i - 1] : 1),
                      "kept: expected positive numbers, ascending");
    const int64_t tops = o.levels * o.positions;
    o.geometry[g] = {
        block_k,
        split_k,
        static_cast<int64_t*>(prefill.mutable_data_ptr()) + g * p.Hq * o.width,
        static_cast<int64_t*>(decode.mutable_data_ptr()) + g * group_count * p.Hkv * o.width,
        static_cast<float*>(prefill_tops.mutable_data_ptr()) + g * tops * p.Hq,
        static_cast<float*>(decode_tops.mutable_data_ptr()) + g * tops * p.Hkv,
        keep + g * o.levels};
  }
  if (p.Hq > 0) bsa::run_observe(p, o, bsa::level());
  return {out, prefill, decode, prefill_tops, decode_tops};
}
