// The order of the tasks: those of one key/value head follow each other, so that its keys and their
// sums stay in the cache.
#include "backward.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace bsa {

void run_backward(Backward& p, const Level& level) {
  const int type = int(p.dtype);
  const int64_t heads = p.B * p.Hkv, per_head = p.NQ * p.G, sums = p.Lk * p.key_width();
  static thread_local Workspace workspace;
  p.key_sums = reinterpret_cast<float*>(workspace.get(std::max<int64_t>(heads * sums, 1) * 4));
  std::vector<float> sink_parts(p.sinks ? p.B * p.Hq * p.NQ : 0);
  p.sink_parts = sink_parts.data();
  std::vector<int64_t> progress(heads * per_head);
  p.progress = progress.data();

  constexpr int64_t kKeys = 256;  // of one task
  const int64_t parts = (p.Lk + kKeys - 1) / kKeys;
  run_tasks(heads * parts, 64, [&](int64_t t, char*) {
    const int64_t bh = t / parts, from = t % parts * kKeys, to = std::min(from + kKeys, p.Lk);
    std::fill(p.key_sums + bh * sums + from * p.key_width(),
              p.key_sums + bh * sums + to * p.key_width(), 0.0f);
  });
  run_tasks(heads * per_head, level.backward_scratch[type](p), [&](int64_t t, char* scratch) {
    level.backward_row[type](p, t / per_head, t % per_head, scratch);
  });
  run_tasks(heads * parts, 64, [&](int64_t t, char*) {
    const int64_t bh = t / parts, from = t % parts * kKeys, to = std::min(from + kKeys, p.Lk);
    for (int64_t c = from; c < to; ++c) level.backward_key[type](p, bh, c);
  });
  for (int64_t h = 0; p.sinks && h < p.Hq; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t i = 0; i < p.NQ; ++i) sum += sink_parts[(b * p.Hq + h) * p.NQ + i];
    p.dsinks[h] = float(sum);
  }
  workspace.trim(size_t(256) << 20);
}

}  // namespace bsa
