// One forward call without torch: reads it from the file argv[1], writes the outputs to argv[2].
// test_cpu_kernel_aarch64.py compiles this for aarch64 and runs it under emulation.
//
// Torch gives the kernel two functions; here they are stand-ins for one thread.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "forward.h"
#include "requests.h"

extern "C" {
int32_t torch_get_num_threads(uint32_t* n) { return *n = 1, 0; }
int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) {
  std::abort();  // one thread never gets here
}
}

namespace {

struct Header {
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv, dtype, causal, window, block_q, block_k, order, split_k, rule;
  float scale, softcap, log_lambda, budget;
};

template <class T>
std::vector<T> read(FILE* file, size_t n) {
  std::vector<T> x(n);
  if (std::fread(x.data(), sizeof(T), n, file) != n) std::abort();
  return x;
}

template <class T>
void write(FILE* file, const std::vector<T>& x) {
  if (std::fwrite(x.data(), sizeof(T), x.size(), file) != x.size()) std::abort();
}

}  // namespace

int main(int, char** argv) {
  FILE* const in = std::fopen(argv[1], "rb");
  const Header h = read<Header>(in, 1)[0];
  const size_t size = h.dtype == 0 ? 4 : 2;
  const auto q = read<char>(in, h.B * h.Hq * h.Lq * h.D * size);
  const auto k = read<char>(in, h.B * h.Hkv * h.Lk * h.D * size);
  const auto v = read<char>(in, h.B * h.Hkv * h.Lk * h.Dv * size);

  bsa::Problem p;
  p.q = {q.data(), h.Hq * h.Lq * h.D, h.Lq * h.D, h.D};
  p.k = {k.data(), h.Hkv * h.Lk * h.D, h.Lk * h.D, h.D};
  p.v = {v.data(), h.Hkv * h.Lk * h.Dv, h.Lk * h.Dv, h.Dv};
  p.dtype = bsa::Dtype(h.dtype), p.order = bsa::Order(h.order);
  p.B = h.B, p.Hq = h.Hq, p.Hkv = h.Hkv, p.G = h.Hq / h.Hkv;
  p.Lq = h.Lq, p.Lk = h.Lk, p.D = h.D, p.Dv = h.Dv;
  p.causal = h.causal, p.window = h.window, p.scale = h.scale, p.softcap = h.softcap;
  p.block_q = h.block_q, p.block_k = h.block_k, p.split_k = h.split_k;
  if (h.rule == 1) p.log_lambda.data = &h.log_lambda;
  if (h.rule == 2) p.budget.data = &h.budget;
  p.any_rule = h.rule != 0;
  p.NQ = p.decode() ? p.Lq : (p.Lq + p.block_q - 1) / p.block_q;
  p.NK = (p.Lk + p.block_k - 1) / p.block_k, p.skip_bytes = (p.NK + 7) / 8;
  const bsa::Requests requests = bsa::make_requests(p, nullptr, nullptr, true);
  p.requests = requests.list.data();

  std::vector<char> out(h.B * h.Lq * h.Hq * h.Dv * size);
  std::vector<float> lse(h.B * h.Hq * h.Lq), dropped(lse.size());
  std::vector<int64_t> counts(h.B * h.Hq * 2);
  std::vector<uint8_t> skips(h.B * (p.decode() ? h.Hkv : h.Hq) * p.NQ * p.skip_bytes);
  p.out = out.data(), p.lse = lse.data(), p.dropped = dropped.data();
  p.counts = counts.data(), p.skips = skips.data();
  if (p.decode())
    bsa::run_decode(p, bsa::kPortable);
  else
    bsa::run_prefill(p, bsa::kPortable);

  FILE* const to = std::fopen(argv[2], "wb");
  write(to, out), write(to, lse), write(to, counts), write(to, skips), write(to, dropped);
  return std::fclose(to);
}
