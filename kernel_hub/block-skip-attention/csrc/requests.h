// Where each request of a batch begins and ends. Grids of blocks count from there, so that a padded
// request decides exactly as it would alone.
#pragma once
#include <memory>
#include <vector>

#include "problem.h"

namespace bsa {

struct Requests {
  std::vector<Request> list;
  std::vector<std::unique_ptr<int32_t[]>> counts;  // what `Request::before` points to
};

// `key_valid` [B, Lk] and `q_offset` [1] or [B] may be null.
inline Requests make_requests(const Problem& p, const uint8_t* key_valid, const int64_t* q_offset,
                              bool one_offset) {
  Requests all;
  all.list.resize(p.B);
  for (int64_t b = 0; b < p.B; ++b) {
    Request& r = all.list[b];
    r.end = p.Lk;
    const uint8_t* valid = key_valid ? key_valid + b * p.Lk : nullptr;
    if (valid) {
      while (r.first < r.end && !valid[r.first]) ++r.first;
      while (r.end > r.first && !valid[r.end - 1]) --r.end;
      int64_t holes = 0;
      for (int64_t c = r.first; c < r.end; ++c) holes += !valid[c];
      if (holes) {
        all.counts.emplace_back(new int32_t[r.keys() + 1]);
        int32_t* before = all.counts.back().get();
        before[0] = 0;
        for (int64_t c = 0; c < r.keys(); ++c)
          before[c + 1] = before[c] + (valid[r.first + c] != 0);
        r.before = before;
        r.valid = valid + r.first;
      }
    }
    const int64_t offset = q_offset ? q_offset[one_offset ? 0 : b] : p.Lk - p.Lq;
    r.offset = offset - r.first;
    // A row at a negative position, before the first key, sees nothing.
    r.first_row = p.causal && r.offset < 0 ? (-r.offset < p.Lq ? -r.offset : p.Lq) : 0;
    if (r.keys() == 0) r.first_row = p.Lq;
    const int64_t voters = r.keys() - r.offset;
    r.end_row = !p.causal || voters > p.Lq ? p.Lq : voters > 0 ? voters : 0;
  }
  return all;
}

}  // namespace bsa
