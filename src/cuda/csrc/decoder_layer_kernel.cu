// Decoder layers of Llama and Qwen2 for a few query tokens, in five kernels each.
//
// A step of decoding reads every weight once and computes little, so its time is the bytes' and
// what it takes to get from one kernel to the next. Weights go from memory to the registers that a
// tensor core multiplies from, without shared memory between: a product's terms may be added in any
// order, so that the columns are taken in one that gives each lane 16 bytes in a row. Normalization
// and activation are done by the products that need them, and a kernel starts before the one in
// front of it has ended: it loads its first weights, which depend on nothing, asks for the next,
// and only then waits.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "decoder_layer.h"
#include "overlap.cuh"

namespace decoder_layer {
namespace {

using fused_rejection::allow_next_launch;
using fused_rejection::prefetch_line;
using fused_rejection::wait_for_launch_before;

constexpr int kWarp = 32, kQuad = 4;
constexpr int kTileRows = 8;                    // weight rows of a tensor core product
constexpr int kChunk = 64;                      // columns that a warp takes at a time: a cache line
constexpr int kVectors = 2;                     // 16-byte loads of a lane for a row of a chunk
constexpr int kStep = kQuad * 8;                // columns that a quad's lanes load at once
constexpr int kTokens = kMostTokens, kFew = 8;  // few: the lower half of a tensor core's rows
constexpr float kLog2E = 1.4426950408889634f;

using Bf16 = __nv_bfloat16;
using Pair = __nv_bfloat162;

// Weights are read once, by one warp.
__device__ __forceinline__ uint4 load_once(const Bf16* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}
__device__ __forceinline__ uint4 load(const Bf16* at) {
  return *reinterpret_cast<const uint4*>(at);
}

// sums += a b: 16 rows of `a`, 8 columns of `b`, over 16 terms. A lane has its quad's row of a (and
// the row eight further on), its quad's column of b, and two columns of two rows of the sums.
__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
// 32 terms, eight of them in each lane.
__device__ __forceinline__ void multiply(float (&sums)[4], const uint4& low, const uint4& high,
                                         const uint4& b) {
  multiply(sums, low.x, high.x, low.y, high.y, b.x, b.y);
  multiply(sums, low.z, high.z, low.w, high.w, b.z, b.w);
}

__device__ __forceinline__ uint32_t scaled(uint32_t values, uint32_t factors) {
  const Pair product = __hmul2(reinterpret_cast<Pair&>(values), reinterpret_cast<Pair&>(factors));
  return reinterpret_cast<const uint32_t&>(product);
}
__device__ __forceinline__ uint4 scaled(const uint4& values, const uint4& factors) {
  return {scaled(values.x, factors.x), scaled(values.y, factors.y), scaled(values.z, factors.z),
          scaled(values.w, factors.w)};
}
__device__ __forceinline__ float squares(const uint4& values) {
  float sum = 0;
  for (const uint32_t pair : {values.x, values.y, values.z, values.w}) {
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000u);
    sum = fmaf(low, low, fmaf(high, high, sum));
  }
  return sum;
}
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const Pair pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}

// ---- Products. A block has 8 * tiles weight rows, its warps share their columns. An Epilogue says
// which rows these are, and what becomes of the results of two of them: row i and row i + half.

template <int tiles, int ahead>
struct Weights {
  uint4 values[ahead][kVectors][tiles];

  // `ahead` chunks, `warps` apart; 0 where there is none.
  __device__ __forceinline__ void load(const Bf16* const (&rows)[tiles], int chunk, int warps,
                                       int chunks) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int at = chunk + i * warps;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
          values[i][v][t] = at < chunks ? load_once(rows[t] + at * kChunk + v * kStep) : uint4{};
        }
      }
    }
  }
};

// many: more tokens than kFew.
template <int tiles, int ahead, bool normalize, bool many, typename Epilogue>
__global__ void product_kernel(const Product a, const Epilogue epilogue) {
  constexpr int rows = tiles * kTileRows, half = rows / 2, halves = many ? 2 : 1;
  extern __shared__ float partial[];  // [warps][tokens][rows], then [warps][tokens] of squares
  if (Epilogue::kNextMayStart) allow_next_launch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int group = lane / kQuad, column = lane % kQuad * 8;
  const int chunks = a.width / kChunk;
  const Bf16* row[tiles];
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
    const int64_t r = epilogue.row(half, t * kTileRows + group);
    row[t] = static_cast<const Bf16*>(a.weights) + r * a.width + column;
  }
  Weights<tiles, ahead> next;
  next.load(row, warp, warps, chunks);
  if (lane < rows && warp + ahead * warps < chunks) {
    const Bf16* line = static_cast<const Bf16*>(a.weights) + epilogue.row(half, lane) * a.width;
    prefetch_line(line + (warp + ahead * warps) * kChunk);
  }
  epilogue.bring_later();
  const int token = threadIdx.x / half, i = threadIdx.x % half;
  const bool stores = token < a.tokens;
  wait_for_launch_before();
  if (!Epilogue::kNextMayStart) allow_next_launch();
  typename Epilogue::Extra extra = {};
  if (stores) extra = epilogue.load(half, token, i);

  const Bf16* x = static_cast<const Bf16*>(a.x) + group * a.width + column;
  const Bf16* norm = static_cast<const Bf16*>(a.norm) + column;
  float sums[tiles][4] = {}, square[halves] = {};
  for (int chunk = warp; chunk < chunks; chunk += ahead * warps) {
    const Weights<tiles, ahead> now = next;
    uint4 values[ahead][kVectors][2] = {}, factors[ahead][kVectors] = {};
#pragma unroll
    for (int n = 0; n < ahead; ++n) {
      const int at = chunk + n * warps;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int from = at * kChunk + v * kStep;
#pragma unroll
        for (int h = 0; h < halves; ++h) {
          if (at < chunks && group + h * kFew < a.tokens) {
            values[n][v][h] = load(x + h * kFew * a.width + from);
          }
        }
        if (normalize && at < chunks) factors[n][v] = load(norm + from);
      }
    }
    next.load(row, chunk + ahead * warps, warps, chunks);
#pragma unroll
    for (int n = 0; n < ahead; ++n) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (normalize) {
#pragma unroll
          for (int h = 0; h < halves; ++h) {
            square[h] += squares(values[n][v][h]);
            values[n][v][h] = scaled(values[n][v][h], factors[n][v]);
          }
        }
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
          multiply(sums[t], values[n][v][0], values[n][v][1], now.values[n][v][t]);
        }
      }
    }
  }

  // A lane's sums are of the tokens `group` and group + 8, and of two rows of each tile.
  float* const squared = partial + warps * a.tokens * rows;
#pragma unroll
  for (int h = 0; h < halves; ++h) {
    const int mine = group + h * kFew;
    if (normalize) square[h] = quad_sum(square[h]);
    if (mine >= a.tokens) continue;
    float* const to = partial + (warp * a.tokens + mine) * rows + lane % kQuad * 2;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      *reinterpret_cast<float2*>(to + t * kTileRows) = {sums[t][2 * h], sums[t][2 * h + 1]};
    }
    if (normalize && lane % kQuad == 0) squared[warp * a.tokens + mine] = square[h];
  }
  __syncthreads();
  if (!stores) return;
  float first = 0, second = 0, factor = 0;
  for (int w = 0; w < warps; ++w) {
    const float* from = partial + (w * a.tokens + token) * rows + i;
    first += from[0];
    second += from[half];
    if (normalize) factor += squared[w * a.tokens + token];
  }
  if (normalize) {
    factor = rsqrtf(factor / static_cast<float>(a.width) + a.epsilon);
    first *= factor;
    second *= factor;
  }
  epilogue.store(half, token, i, first, second, extra);
}

struct Nothing {};

// For most products the weights of the next launch come early enough when its blocks ask for them.
struct BringsNothing {
  __device__ void bring_later() const {}
};

// residual [tokens, size] += the product.
struct Add : BringsNothing {
  struct Extra {
    Bf16 first, second;
  };
  static constexpr bool kNextMayStart = true;
  Bf16* residual;
  int size;

  __device__ int64_t row(int half, int i) const { return blockIdx.x * 2 * half + i; }
  __device__ Bf16* at(int half, int token, int i) const {
    return residual + token * size + row(half, i);
  }
  __device__ Extra load(int half, int token, int i) const {
    const Bf16* from = at(half, token, i);
    return {from[0], from[half]};
  }
  __device__ void store(int half, int token, int i, float first, float second, Extra extra) const {
    Bf16* const to = at(half, token, i);
    to[0] = __float2bfloat16(__bfloat162float(extra.first) + first);
    to[half] = __float2bfloat16(__bfloat162float(extra.second) + second);
  }
};

// logits [tokens, size].
struct Store : BringsNothing {
  using Extra = Nothing;
  static constexpr bool kNextMayStart = true;
  Bf16* logits;
  int64_t size;

  __device__ int64_t row(int half, int i) const {
    return static_cast<int64_t>(blockIdx.x) * 2 * half + i;
  }
  __device__ Extra load(int, int, int) const { return {}; }
  __device__ void store(int half, int token, int i, float first, float second, Extra) const {
    Bf16* const to = logits + token * size + row(half, i);
    to[0] = __float2bfloat16(first);
    to[half] = __float2bfloat16(second);
  }
};

// gated [tokens, size]: silu of one half of the weights' rows times x, times the other's.
struct Gate {
  using Extra = Nothing;
  static constexpr bool kNextMayStart = true;
  Bf16* gated;
  int size;
  const char* later;
  int64_t later_bytes;

  __device__ void bring_later() const {
    constexpr int kLine = 128;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kLine;
    int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
    for (; at < later_bytes; at += step) prefetch_line(later + at);
  }
  __device__ int64_t row(int half, int i) const {
    return blockIdx.x * half + i % half + i / half * size;
  }
  __device__ Extra load(int, int, int) const { return {}; }
  __device__ void store(int half, int token, int i, float gate, float up, Extra) const {
    const float activated = gate / (1 + __expf(-gate));
    gated[token * size + blockIdx.x * half + i] = __float2bfloat16(activated * up);
  }
};

// query, and keys and values into their slots, rotated by their positions. What a rotation turns
// together lies half a head apart.
struct Rotate : BringsNothing {
  struct Extra {
    float cos, sin;
    int64_t position;
  };
  // Attention reads what was there before this launch: it starts when all of it has waited.
  static constexpr bool kNextMayStart = false;
  Heads shape;
  const Bf16 *bias, *rotated;  // bias [rows] or null; rotated [tokens, 2, head_dim]: cos, sin
  const int64_t* positions;    // [tokens]
  Bf16 *query, *cache;

  __device__ int head(int half) const { return blockIdx.x / (shape.head_dim / (2 * half)); }
  // Where the i-th row of this block lies in its head.
  __device__ int in_head(int half, int i) const {
    const int tile = blockIdx.x % (shape.head_dim / (2 * half));
    return tile * half + i % half + i / half * (shape.head_dim / 2);
  }
  __device__ int64_t row(int half, int i) const {
    return head(half) * shape.head_dim + in_head(half, i);
  }
  __device__ Extra load(int half, int token, int i) const {
    const int64_t position = positions[token];
    if (head(half) >= shape.heads + shape.kv_heads) return {1, 0, position};  // a value
    const Bf16* from = rotated + token * 2 * shape.head_dim + in_head(half, i);
    // The first half of the sines has the sign of the other use.
    const float sin = __bfloat162float(from[shape.head_dim + shape.head_dim / 2]);
    return {__bfloat162float(from[0]), sin, position};
  }
  __device__ void store(int half, int token, int i, float low, float high, Extra extra) const {
    if (bias) {
      low += __bfloat162float(bias[row(half, i)]);
      high += __bfloat162float(bias[row(half, i + half)]);
    }
    const int h = head(half);
    Bf16* to = query + (token * shape.heads + h) * shape.head_dim;
    if (h >= shape.heads) {
      const int64_t slot = static_cast<int64_t>(token / shape.queries) * shape.capacity;
      const int64_t kv = (slot + extra.position) * 2 * shape.kv_heads + h - shape.heads;
      to = cache + kv * shape.head_dim;
    }
    to += in_head(half, i);
    to[0] = __float2bfloat16(low * extra.cos - high * extra.sin);
    to[shape.head_dim / 2] = __float2bfloat16(high * extra.cos + low * extra.sin);
  }
};

// ---- What the layers begin with: a block a token.

struct Embedding {
  const int64_t *ids, *start;  // [B, Q], [B]
  int64_t row_stride, stride;  // of ids
  int64_t ahead, vocab_size;
  int queries, capacity, width, head_dim;
  const Bf16 *table, *rotation;  // [vocab_size, width], [capacity, 2, head_dim]
  Bf16 *x, *rotated;             // [B * Q, width], [B * Q, 2, head_dim]
  int64_t* positions;            // [B, Q]
};

__device__ __forceinline__ void copy(Bf16* to, const Bf16* from, int count) {
  for (int i = threadIdx.x * 8; i < count; i += blockDim.x * 8) {
    *reinterpret_cast<uint4*>(to + i) = load(from + i);
  }
}

__global__ void embed_kernel(const Embedding a) {
  allow_next_launch();
  wait_for_launch_before();
  const int token = blockIdx.x, row = token / a.queries, query = token % a.queries;
  const int64_t id = a.ids[row * a.row_stride + query * a.stride];
  const int64_t position = max(a.start[row] + a.ahead + query, int64_t{0});
  // Another row's slots begin at the capacity.
  if (id < 0 || id >= a.vocab_size || position >= a.capacity) __trap();
  if (threadIdx.x == 0) a.positions[token] = position;
  copy(a.x + static_cast<int64_t>(token) * a.width, a.table + id * a.width, a.width);
  copy(a.rotated + token * 2 * a.head_dim, a.rotation + position * 2 * a.head_dim, 2 * a.head_dim);
}

// ---- Attention. A block has 16 query rows of one key/value head of one batch row: the query heads
// of that head, token by token. Its warps share the slots, 16 at a time.

constexpr int kAttentionWarps = 8, kSlots = 16;

// The same 16-bit half of two pairs.
__device__ __forceinline__ uint32_t interleaved(uint32_t a, uint32_t b, bool high) {
  return __byte_perm(a, b, high ? 0x7632 : 0x5410);
}
__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <int head_dim>
struct AttentionShared {
  float largest[kAttentionWarps][kTokens], total[kAttentionWarps][kTokens];
  float result[kAttentionWarps][kTokens][head_dim + 4];
};

template <int head_dim>
struct Slots {
  uint4 key[2][head_dim / kStep], value[head_dim / 64][4];

  // Of the 16 slots from `slot`, those in [from, to); the others stay as they are.
  __device__ __forceinline__ void load(const Bf16* keys, const Bf16* values, int stride, int slot,
                                       int from, int to) {
    const int group = threadIdx.x % kWarp / kQuad, quarter = threadIdx.x % kQuad;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = slot + n * kTileRows + group;
      if (at < from || at >= to) continue;
#pragma unroll
      for (int s = 0; s < head_dim / kStep; ++s) {
        key[n][s] = decoder_layer::load(keys + at * stride + s * kStep + quarter * 8);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // the slots that this lane's terms of a product are of
      const int at = slot + quarter * 2 + k % 2 + k / 2 * 8;
      if (at < from || at >= to) continue;
#pragma unroll
      for (int d = 0; d < head_dim / 64; ++d) {
        value[d][k] = decoder_layer::load(values + at * stride + d * 64 + group * 8);
      }
    }
  }
};

template <int head_dim>
__global__ void __launch_bounds__(kAttentionWarps* kWarp)
    attention_kernel(const Heads shape, const Bf16* query, const Bf16* cache,
                     const int64_t* positions, float scaling, Bf16* attended) {
  constexpr int steps = head_dim / kStep, spans = head_dim / 64;
  constexpr int round = kAttentionWarps * kSlots;
  extern __shared__ __align__(16) unsigned char bytes[];
  AttentionShared<head_dim>& shared = *reinterpret_cast<AttentionShared<head_dim>*>(bytes);
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / kQuad, quarter = lane % kQuad;
  const int batch_row = blockIdx.x / shape.kv_heads, kv_head = blockIdx.x % shape.kv_heads;
  const int groups = shape.heads / shape.kv_heads, count = shape.queries * groups;
  const int first = blockIdx.y * kTokens;
  const int stride = 2 * shape.kv_heads * head_dim;  // of a slot
  const Bf16* keys =
      cache + static_cast<int64_t>(batch_row) * shape.capacity * stride + kv_head * head_dim;
  const Bf16* values = keys + shape.kv_heads * head_dim;
  // Of query row i of this block: which token of all, and where its head starts in `query`.
  const auto token_of = [&](int i) { return batch_row * shape.queries + (first + i) / groups; };
  const auto head_of = [&](int i) {
    const int head = kv_head * groups + (first + i) % groups;
    return (static_cast<int64_t>(token_of(i)) * shape.heads + head) * head_dim;
  };
  // Positions, which ascend in a batch row, and older slots: there before the launch before this.
  const int last = min(first + kTokens, count) - 1 - first;
  const int old = static_cast<int>(positions[batch_row * shape.queries]);
  const int end = static_cast<int>(positions[token_of(last)]) + 1;
  int position[2] = {-1, -1};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = group + h * kFew;
    if (first + i < count) position[h] = static_cast<int>(positions[token_of(i)]);
  }
  Slots<head_dim> slots = {};
  slots.load(keys, values, stride, warp * kSlots, 0, old);
  for (int slot = round + threadIdx.x / 2; slot < old; slot += blockDim.x / 2) {
    const Bf16* line = (threadIdx.x % 2 ? values : keys) + slot * stride;
    for (int d = 0; d < head_dim; d += 64) prefetch_line(line + d);
  }
  wait_for_launch_before();
  uint4 q[2][steps] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = group + h * kFew;
    if (first + i >= count) continue;
#pragma unroll
    for (int s = 0; s < steps; ++s) q[h][s] = load(query + head_of(i) + s * kStep + quarter * 8);
  }
  slots.load(keys, values, stride, warp * kSlots, old, end);

  float largest[2] = {-1e30f, -1e30f}, total[2] = {};
  float result[spans][8][4] = {};
  for (int slot = warp * kSlots; slot < end; slot += round) {
    if (slot >= round) {
      slots = {};
      slots.load(keys, values, stride, slot, 0, end);
    }
    const auto& key = slots.key;
    const auto& value = slots.value;
    float score[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int s = 0; s < steps; ++s) multiply(score[n], q[0][s], q[1][s], key[n][s]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float here = -1e30f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& one = score[n][2 * h + c];
          const bool seen = slot + n * kTileRows + quarter * 2 + c <= position[h];
          one = seen ? one * (scaling * kLog2E) : -INFINITY;
          here = fmaxf(here, one);
        }
      }
      const float higher = fmaxf(largest[h], quad_max(here)), rescale = exp2f(largest[h] - higher);
      largest[h] = higher;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& one = score[n][2 * h + c];
          one = exp2f(one - higher);
          sum += one;
        }
      }
      total[h] = total[h] * rescale + sum;
#pragma unroll
      for (int d = 0; d < spans; ++d) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          result[d][j][2 * h] *= rescale;
          result[d][j][2 * h + 1] *= rescale;
        }
      }
    }
    const uint32_t a0 = packed(score[0][0], score[0][1]), a1 = packed(score[0][2], score[0][3]);
    const uint32_t a2 = packed(score[1][0], score[1][1]), a3 = packed(score[1][2], score[1][3]);
#pragma unroll
    for (int d = 0; d < spans; ++d) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // columns 64 d + 8 g + j of the values, g = 0 to 7
        const auto pair = [&](int k) {
          return interleaved(word(value[d][k], j / 2), word(value[d][k + 1], j / 2), j % 2);
        };
        multiply(result[d][j], a0, a1, a2, a3, pair(0), pair(2));
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = group + h * kFew;
    const float sum = quad_sum(total[h]);
    if (quarter == 0) {
      shared.largest[warp][i] = largest[h];
      shared.total[warp][i] = sum;
    }
#pragma unroll
    for (int d = 0; d < spans; ++d) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float* const to = &shared.result[warp][i][d * 64 + (quarter * 2 + c) * 8];
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          *reinterpret_cast<float4*>(to + j) = {
              result[d][j][2 * h + c], result[d][j + 1][2 * h + c], result[d][j + 2][2 * h + c],
              result[d][j + 3][2 * h + c]};
        }
      }
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < kTokens * head_dim / 2; n += blockDim.x) {
    const int i = n / (head_dim / 2), d = n % (head_dim / 2) * 2;
    if (first + i >= count) break;
    float most = -1e30f, sum = 0, low = 0, high = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, shared.largest[w][i]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float share = exp2f(shared.largest[w][i] - most);
      sum = fmaf(shared.total[w][i], share, sum);
      low = fmaf(shared.result[w][i][d], share, low);
      high = fmaf(shared.result[w][i][d + 1], share, high);
    }
    const uint32_t pair = packed(low / sum, high / sum);
    *reinterpret_cast<uint32_t*>(attended + head_of(i) + d) = pair;
  }
}

// ---- Launches

template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
                   void* stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return fused_rejection::launch_asking(kernel, config, args...);
}

int multiprocessors() {
  int ordinal = 0, count = 0;
  if (cudaGetDevice(&ordinal) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal);
  return count;
}

// With the first of `ahead, less...` that is no more than a warp's chunks and with which all blocks
// run at once, or the last.
template <bool normalize, bool many, int tiles, int ahead, int... less, typename Epilogue>
cudaError_t launch_cut(const Product& a, int warps, const Epilogue& epilogue, void* stream) {
  constexpr int rows = tiles * kTileRows;
  if (a.rows % rows || a.width % kChunk || a.tokens * rows / 2 > warps * kWarp) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = product_kernel<tiles, ahead, normalize, many, Epilogue>;
  const size_t shared_bytes = sizeof(float) * warps * a.tokens * (rows + 1);
  const int blocks = a.rows / rows;
  if constexpr (sizeof...(less) > 0) {
    int at_once = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &at_once, kernel, warps * kWarp, shared_bytes);
    if (error != cudaSuccess) return error;
    const bool has_chunks = (ahead - 1) * warps < a.width / kChunk;
    if (!has_chunks || at_once * multiprocessors() < blocks) {
      return launch_cut<normalize, many, tiles, less...>(a, warps, epilogue, stream);
    }
  }
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), warps * kWarp, shared_bytes, stream, a,
                epilogue);
}

// A token's terms are added in an order that depends on `warps` alone, and that not on the number
// of tokens: a token gets the same bits with any others beside it.
template <bool normalize, int few_tiles, int many_tiles, int... ahead, typename Epilogue>
cudaError_t launch_product(const Product& a, int warps, const Epilogue& epilogue, void* stream) {
  if (a.tokens < 1 || a.tokens > kMostTokens) return cudaErrorInvalidValue;
  return a.tokens <= kFew
             ? launch_cut<normalize, false, few_tiles, ahead...>(a, warps, epilogue, stream)
             : launch_cut<normalize, true, many_tiles, ahead...>(a, warps, epilogue, stream);
}

template <int head_dim>
cudaError_t launch_heads(const Heads& shape, int batch_size, const Bf16* query, const Bf16* cache,
                         const int64_t* positions, float scaling, Bf16* attended, void* stream) {
  const auto kernel = attention_kernel<head_dim>;
  constexpr int shared_bytes = sizeof(AttentionShared<head_dim>);
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int rows = shape.queries * (shape.heads / shape.kv_heads);
  const dim3 blocks(static_cast<unsigned>(batch_size * shape.kv_heads),
                    static_cast<unsigned>((rows + kTokens - 1) / kTokens));
  return launch(kernel, blocks, kAttentionWarps * kWarp, shared_bytes, stream, shape, query, cache,
                positions, scaling, attended);
}

}  // namespace

int launch_embed(const int64_t* ids, const int64_t* start, int64_t row_stride, int64_t stride,
                 int64_t ahead, int64_t vocab_size, int tokens, int width, const Heads& heads,
                 const void* table, const void* rotation, void* x, int64_t* positions,
                 void* rotated, void* stream) {
  const Embedding a{ids,
                    start,
                    row_stride,
                    stride,
                    ahead,
                    vocab_size,
                    heads.queries,
                    heads.capacity,
                    width,
                    heads.head_dim,
                    static_cast<const Bf16*>(table),
                    static_cast<const Bf16*>(rotation),
                    static_cast<Bf16*>(x),
                    static_cast<Bf16*>(rotated),
                    positions};
  return launch(embed_kernel, dim3(static_cast<unsigned>(tokens)), 128, 0, stream, a);
}

// How products are cut: near the fastest (within 2 %) of those with one to four tiles, one to eight
// chunks ahead and 4 to 16 warps, in whole forwards of Llama-3.2's and Qwen2.5's shapes on an H100
// (docs/decoding.md).

int launch_qkv(const Product& a, const Heads& heads, const void* bias, const void* rotated,
               const int64_t* positions, void* query, void* cache, void* stream) {
  const Rotate epilogue{{},
                        heads,
                        static_cast<const Bf16*>(bias),
                        static_cast<const Bf16*>(rotated),
                        positions,
                        static_cast<Bf16*>(query),
                        static_cast<Bf16*>(cache)};
  const int warps = a.rows / (4 * kTileRows) <= multiprocessors() ? 16 : 8;
  return launch_product<true, 4, 4, 1>(a, warps, epilogue, stream);
}

int launch_attention(const Heads& heads, int tokens, const void* query, const void* cache,
                     const int64_t* positions, float scaling, void* attended, void* stream) {
  const auto launch_for = heads.head_dim == 64    ? launch_heads<64>
                          : heads.head_dim == 128 ? launch_heads<128>
                                                  : nullptr;
  if (!launch_for) return cudaErrorInvalidValue;
  return launch_for(heads, tokens / heads.queries, static_cast<const Bf16*>(query),
                    static_cast<const Bf16*>(cache), positions, scaling,
                    static_cast<Bf16*>(attended), stream);
}

int launch_add(const Product& a, void* residual, void* stream) {
  const Add epilogue{{}, static_cast<Bf16*>(residual), a.rows};
  return launch_product<false, 1, 2, 4, 2, 1>(a, 16, epilogue, stream);
}

int launch_gated(const Product& a, void* gated, const void* later, int64_t later_bytes,
                 void* stream) {
  const Gate epilogue{static_cast<Bf16*>(gated), a.rows / 2, static_cast<const char*>(later),
                      later_bytes};
  return launch_product<true, 2, 2, 1>(a, a.width / kChunk >= 16 ? 8 : 16, epilogue, stream);
}

int launch_logits(const Product& a, void* logits, void* stream) {
  const Store epilogue{{}, static_cast<Bf16*>(logits), a.rows};
  return launch_product<true, 2, 2, 1>(a, 8, epilogue, stream);
}

}  // namespace decoder_layer
