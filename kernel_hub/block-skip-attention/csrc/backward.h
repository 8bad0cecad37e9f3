// The gradients of one attention call, in plain pointers: what `Problem` is to the forward.
#pragma once
#include "problem.h"

namespace bsa {

// The forward's inputs are those of Problem, and the blocks that it skipped are left out again:
// they are read from its own skip bits, never decided anew.
struct Backward : Problem {
  // What the forward returned; no skip bits if nothing was skipped.
  const void* kept_out = nullptr;      // [B, Lq, Hq, Dv]
  const float* kept_lse = nullptr;     // [B, Hq, Lq]
  const uint8_t* skip_bits = nullptr;  // [B, Hq | Hkv, NQ, skip_bytes]
  Strided dout;                        // [B, Hq, Lq, Dv]
  const float* dlse = nullptr;         // [B, Hq, Lq], null if nobody asks for that gradient

  void* dq = nullptr;                 // [B, Hq, Lq, D], zeros
  void *dk = nullptr, *dv = nullptr;  // [B, Hkv, Lk, D | Dv]
  float* dsinks = nullptr;            // [Hq], null without sinks

  // Sums over a group's heads and all queries: [B * Hkv, Lk, key_width], dK before dV.
  float* key_sums = nullptr;
  float* sink_parts = nullptr;  // [B * Hq, NQ]
  // How far each task of a key/value head has come, [B * Hkv, NQ * G]: chunks of keys.
  int64_t* progress = nullptr;

  // Rows of sums are whole vectors at every level.
  BSA_PLAIN int64_t k_width() const { return (D + 15) / 16 * 16; }
  BSA_PLAIN int64_t v_width() const { return (Dv + 15) / 16 * 16; }
  BSA_PLAIN int64_t key_width() const { return k_width() + v_width(); }
};

// Runs a filled Backward on all threads.
void run_backward(Backward& p, const Level& level);

}  // namespace bsa
