// A decoder layer of Llama or Qwen2 for a few query tokens: what its kernels are called with.
#pragma once

#include <cstdint>

namespace decoder_layer {

// Most query tokens of a forward, over all batch rows: the rows of one tensor core product.
constexpr int kMostTokens = 16;

// x [tokens, width] times the transposed weights [rows, width], all bfloat16. Where `norm` [width]
// is given, x is normalized by its root mean square first.
struct Product {
  const void *x, *weights, *norm;
  int tokens, rows, width;
  float epsilon;
};

// query [tokens, heads, head_dim] and the slots of the cache [B, capacity, 2 * kv_heads, head_dim],
// keys before values. `queries` tokens of the Product belong to each batch row.
struct Heads {
  int queries, capacity, heads, kv_heads, head_dim;
};

// Each returns a cudaError_t. They are launched in the order of few_tokens.py: what x, query,
// residual, ids and start hold may still be written by the launch in front of it. Weights, tables
// and slots older than `positions` may not, nor may `positions` in launch_attention: they are read
// before that launch has ended.
int launch_embed(const int64_t* ids, const int64_t* start, int64_t row_stride, int64_t stride,
                 int64_t ahead, int64_t vocab_size, int tokens, int width, const Heads& heads,
                 const void* table, const void* rotation, void* x, int64_t* positions,
                 void* rotated, void* stream);
int launch_qkv(const Product& product, const Heads& heads, const void* bias, const void* rotated,
               const int64_t* positions, void* query, void* cache, void* stream);
int launch_attention(const Heads& heads, int tokens, const void* query, const void* cache,
                     const int64_t* positions, float scaling, void* attended, void* stream);
int launch_add(const Product& product, void* residual, void* stream);
// later: the `later_bytes` of weights that the next launch reads first.
int launch_gated(const Product& product, void* gated, const void* later, int64_t later_bytes,
                 void* stream);
int launch_logits(const Product& product, void* logits, void* stream);

}  // namespace decoder_layer
