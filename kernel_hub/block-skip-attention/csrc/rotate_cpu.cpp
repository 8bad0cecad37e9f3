// The binding of rotate_.
#include "../torch-ext/torch_binding.h"
#include "parallel.h"
#include "tensors.h"

using bsa::MaybeTensor, bsa::ScalarType, bsa::Tensor;

namespace {

constexpr int64_t kPositions = 64;  // of one task

bsa::Strided table(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == x.size(0) || t.size(0) == 1) &&
                      t.size(1) == x.size(2) && t.size(2) == x.size(3) &&
                      t.scalar_type() == x.scalar_type(),
                  name, ": expected [batch or 1, length, head size] as x ", bsa::shape(x),
                  " has them, in its dtype, got ", bsa::shape(t));
  STD_TORCH_CHECK(t.size(2) == 0 || t.stride(2) == 1, name, ": expected dense rows");
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), 0, t.stride(1)};
}

}  // namespace

void rotate_cpu(Tensor x, Tensor cos, Tensor sin, MaybeTensor norm, double eps) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) >= 2 && x.size(3) <= 512 && x.size(3) % 2 == 0,
                  "x: expected [batch, heads, length, even head size up to 512], got ",
                  bsa::shape(x));
  STD_TORCH_CHECK(x.stride(3) == 1, "x: expected dense rows");
  bsa::Rotate a;
  a.x = bsa::strided(x), a.cos = table(cos, "cos", x), a.sin = table(sin, "sin", x);
  a.H = x.size(1), a.L = x.size(2), a.D = x.size(3), a.eps = float(eps);
  if (norm) {
    STD_TORCH_CHECK(norm->scalar_type() == ScalarType::Float && norm->dim() == 2 &&
                        (norm->size(0) == a.H || norm->size(0) == 1) && norm->size(1) == a.D,
                    "norm: expected float32 [heads or 1, head size] as x ", bsa::shape(x),
                    " has them, got ", bsa::shape(*norm));
    norm = torch::stable::contiguous(*norm);
    a.norm = static_cast<const float*>(norm->const_data_ptr());
    a.norm_stride = norm->size(0) == 1 ? 0 : a.D;
  }
  const bsa::Level& level = bsa::level();
  const int type = int(bsa::dtype_of(x));
  const int64_t positions = x.size(0) * a.L;
  bsa::run_tasks((positions + kPositions - 1) / kPositions, 64, [&](int64_t t, char*) {
    const int64_t end = (t + 1) * kPositions;
    level.rotate[type](a, t * kPositions, end < positions ? end : positions);
  });
}
