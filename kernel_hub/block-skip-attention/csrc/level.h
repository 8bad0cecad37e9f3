// Fills the table of one level from the templates; included once by each level_*.cpp, after
// BSA_LEVEL.
#pragma once
#include "backward_row.h"
#include "decode_region.h"
#include "decode_seed.h"
#include "decode_values.h"
#include "observe_row.h"
#include "prefill_team.h"
#include "rotate.h"
#include "tile_bf16.h"

namespace bsa::BSA_LEVEL {

static size_t scratch_bytes(const Problem& p) {
  auto round = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t prefill = p.team * prefill_bytes(p);
  const size_t scores = size_t(p.rows) * ((p.D + 31) / 32 * 32) * 4 + size_t(p.region) * 4;
  const size_t values = size_t(p.region) * (sizeof(void*) + 4 + 4 * p.G) + 64;
  const size_t decide = size_t(p.G) * sizeof(DecodeRow);
  size_t most = prefill;
  most = scores > most ? scores : most;
  most = values > most ? values : most;
  most = decide > most ? decide : most;
  return round(most);
}

template <class T>
float max_abs_of_head(const Problem& p, int64_t b, int64_t kv_head) {
  float top = 0;
  const Request& rq = p.requests[b];
  for (int64_t c = 0; c < rq.keys(); ++c) {
    if (rq.valid && !rq.valid[c]) continue;
    top = max_abs(row_of<T>(p.k, b, kv_head, rq.first + c), p.D, top);
  }
  return top;
}

#if BSA_ISA >= 3
// An odd head size has half a pair of bfloat16, which the paired engine cannot read.
static void prefill_bf16(const Problem& p, int64_t b, int64_t kv_head, int64_t t0, int64_t t1,
                         char* scratch) {
  if (Bf16Engine::serves(p.D))
    prefill<Bf16Engine>(p, b, kv_head, t0, t1, scratch);
  else
    prefill<FloatEngine<bf16>>(p, b, kv_head, t0, t1, scratch);
}
static void observe_bf16(const Problem& p, const Observe& o, int64_t kv_head, int64_t i,
                         char* scratch) {
  if (Bf16Engine::serves(p.D))
    observe<Bf16Engine>(p, o, kv_head, i, scratch);
  else
    observe<FloatEngine<bf16>>(p, o, kv_head, i, scratch);
}
#define BSA_PREFILL_BF16 BSA_LEVEL::prefill_bf16
#define BSA_OBSERVE_BF16 BSA_LEVEL::observe_bf16
#define BSA_DOTS_BF16 BSA_LEVEL::Bf16Dots
#else
#define BSA_PREFILL_BF16 BSA_LEVEL::prefill<BSA_LEVEL::FloatEngine<BSA_LEVEL::bf16>>
#define BSA_OBSERVE_BF16 BSA_LEVEL::observe<BSA_LEVEL::FloatEngine<BSA_LEVEL::bf16>>
#define BSA_DOTS_BF16 BSA_LEVEL::FloatDots<BSA_LEVEL::bf16>
#endif

#define BSA_EACH(name) \
  {BSA_LEVEL::name<float>, BSA_LEVEL::name<BSA_LEVEL::bf16>, BSA_LEVEL::name<BSA_LEVEL::f16>}
#define BSA_EACH_DOTS(name)                                                      \
  {BSA_LEVEL::name<BSA_LEVEL::FloatDots<float>>, BSA_LEVEL::name<BSA_DOTS_BF16>, \
   BSA_LEVEL::name<BSA_LEVEL::FloatDots<BSA_LEVEL::f16>>}

#define BSA_DEFINE_LEVEL(symbol, label)                                     \
  const Level symbol = {                                                    \
      label,                                                                \
      BSA_EACH(max_abs_of_head),                                            \
      {BSA_ISA >= 3, BSA_ISA >= 3, BSA_ISA >= 3},                           \
      {BSA_LEVEL::prefill<BSA_LEVEL::FloatEngine<float>>, BSA_PREFILL_BF16, \
       BSA_LEVEL::prefill<BSA_LEVEL::FloatEngine<BSA_LEVEL::f16>>},         \
      BSA_EACH(append_keys),                                                \
      BSA_EACH_DOTS(decode_seed),                                           \
      BSA_EACH_DOTS(decode_scores),                                         \
      BSA_LEVEL::decode_decide,                                             \
      BSA_EACH(decode_values),                                              \
      BSA_EACH(decode_finish),                                              \
      BSA_LEVEL::scratch_bytes,                                             \
      BSA_EACH(backward_row),                                               \
      BSA_EACH(backward_key),                                               \
      BSA_EACH(backward_scratch),                                           \
      {BSA_LEVEL::observe<BSA_LEVEL::FloatEngine<float>>, BSA_OBSERVE_BF16, \
       BSA_LEVEL::observe<BSA_LEVEL::FloatEngine<BSA_LEVEL::f16>>},         \
      BSA_LEVEL::observe_bytes,                                             \
      BSA_EACH(rotate),                                                     \
  };

}  // namespace bsa::BSA_LEVEL
