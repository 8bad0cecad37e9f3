// One prefill call at the level avx512_amx, for ctypes: amx_emulated.py compiles this with
// level_avx512_amx.cpp on emulated tiles.
#define BSA_LEVEL runner
#define BSA_ISA 0
#include "level.h"

// Behind the level's own headers.
#include "amx_support.h"
#include "forward.h"
#include "requests.h"

namespace bsa {
// What prefill_amx hands an odd head size to, and what the level is made from.
const Level kAvx512Bf16 = {
    .name = "base",
    .max_abs = {nullptr, runner::max_abs_of_head<runner::bf16>, nullptr},
    .filters = {true, true, true},
    .prefill = {nullptr, runner::prefill<runner::FloatEngine<runner::bf16>>, nullptr},
    .scratch_bytes = runner::scratch_bytes,
};
}  // namespace bsa

namespace {
struct Call {
  bsa::Strided q, k, v;
  bsa::RuleTensor log_lambda, threshold, budget;
  const uint8_t* valid;
  const int64_t* offset;
  const float* sinks;
  const char *guard_begin, *guard_end;
  void *out, *lse, *counts, *skips, *dropped;
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv, offsets, causal, window, block_q, block_k, order, keep_sink;
  float scale, softcap;
};
}  // namespace

// Null, or what went wrong.
extern "C" const char* attend(const Call* call) {
  const Call& c = *call;
  bsa::Problem p;
  p.q = c.q, p.k = c.k, p.v = c.v;
  p.log_lambda = c.log_lambda, p.threshold = c.threshold, p.budget = c.budget;
  p.any_rule = c.log_lambda.data || c.threshold.data || c.budget.data;
  p.dtype = bsa::Dtype::bf16, p.order = bsa::Order(c.order), p.keep_sink = c.keep_sink;
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.G = c.Hq / c.Hkv;
  p.Lq = c.Lq, p.Lk = c.Lk, p.D = c.D, p.Dv = c.Dv;
  p.causal = c.causal, p.window = c.window, p.scale = c.scale, p.softcap = c.softcap;
  p.block_q = c.block_q, p.block_k = c.block_k, p.sinks = c.sinks;
  p.NQ = (p.Lq + p.block_q - 1) / p.block_q;
  p.NK = (p.Lk + p.block_k - 1) / p.block_k, p.skip_bytes = (p.NK + 7) / 8;
  const bsa::Requests requests = bsa::make_requests(p, c.valid, c.offset, c.offsets == 1);
  p.requests = requests.list.data();
  p.out = c.out, p.lse = static_cast<float*>(c.lse);
  p.counts = static_cast<int64_t*>(c.counts), p.skips = static_cast<uint8_t*>(c.skips);
  p.dropped = static_cast<float*>(c.dropped);
  emulator::guard_begin = c.guard_begin, emulator::guard_end = c.guard_end;
  static thread_local std::string wrong;
  try {
    bsa::run_prefill(p, bsa::with_amx(bsa::kAvx512Bf16));
  } catch (const std::exception& error) {
    return (wrong = error.what()).c_str();
  }
  return emulator::tiles_configured ? "the tiles were not released" : nullptr;
}

// How many products of tiles this thread has made so far.
extern "C" long products() { return emulator::tile_products; }

// C [rows][n] += A [rows][2 k] B [k][n][2], as one product of tiles of just that size.
extern "C" void product(const uint16_t* a, const uint16_t* b, float* c, int rows, int k, int n) {
  emulator::TileConfig config = {};
  config.palette = 1;
  config.rows[0] = config.rows[1] = uint8_t(rows), config.rows[2] = uint8_t(k);
  config.bytes[0] = config.bytes[2] = uint16_t(4 * n), config.bytes[1] = uint16_t(4 * k);
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 4 * n);
  _tile_loadd(1, a, 4 * k);
  _tile_loadd(2, b, 4 * n);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 4 * n);
  _tile_release();
}

// What the emulator says to four mistakes.
extern "C" const char* mistake(int which) {
  static thread_local std::string said;
  alignas(64) char memory[1024] = {};
  emulator::TileConfig config = {};
  config.palette = uint8_t(which == 1 ? 2 : 1);
  config.rows[0] = 16, config.bytes[0] = uint16_t(which == 2 ? 128 : 64);
  config.rows[1] = 16, config.bytes[1] = 32;
  config.rows[2] = 16, config.bytes[2] = 64;
  try {
    if (which > 0) _tile_loadconfig(&config);
    _tile_loadd(0, memory, 64);
    _tile_dpbf16ps(0, 1, 2);
    said = "nothing";
  } catch (const std::exception& error) {
    said = error.what();
  }
  _tile_release();
  return said.c_str();
}

// Why a process may not use tiles, if the machine says this of itself.
extern "C" const char* refusal(uint32_t features, uint32_t rows_bytes, uint32_t rows,
                               uint64_t saved, int granted) {
  const auto yes = [] { return true; };
  const auto no = [] { return false; };
  return bsa::amx_refusal({features, rows_bytes, rows, saved, granted ? +yes : +no});
}
