// What a round of the decoding loop leaves behind: src/decoding/state.py in one launch.
#pragma once

#include <cstdint>

namespace decoding_round {

// Most draft tokens and the one after them: the lanes of a warp.
constexpr int kMostColumns = 32;

// Shapes as in state.py: of a batch of B rows with K draft tokens each.
struct Round {
  const int64_t *token_ids, *draft_ids, *eos;  // [B, K + 1], [B, K], [eos_count]
  const int32_t* num_accepted;                 // [B]
  int64_t *tokens, *start, *newest, *limit, *offsets, *counts, *left;
  int batch_size, spec_length, eos_count, row_length;  // row_length: of tokens
};

// Returns a cudaError_t. token_ids, num_accepted and draft_ids may still be written by the launch
// in front of it.
int launch_advance(const Round& round, void* stream);

}  // namespace decoding_round
