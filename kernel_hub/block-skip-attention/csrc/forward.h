// Runs a filled Problem on all threads.
#pragma once
#include "problem.h"

namespace bsa {

// Prefill: one parallel loop over heads and block rows. Decode: one over its four passes, see
// decode_*.h.
void run_prefill(Problem& p, const Level& level);
void run_decode(Problem& p, const Level& level);
// Enters new keys into an int8 copy of K.
void run_append(const NewKeys& keys, const Level& level);

}  // namespace bsa
