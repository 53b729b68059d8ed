// The arithmetic of rejection sampling, shared by the C++ and the CUDA kernels, and the CUDA
// launchers' interface. No torch headers. docs/kernel.md states the order of summation.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FR_HOST_DEVICE inline
#endif

namespace fused_rejection {

constexpr int64_t kPlaceholderTokenId = -1;
constexpr int kTile = 512;  // indices a float32 sum runs over
constexpr int kSpans = 32;  // a float64 sum runs over a span of tiles, or of a tile's indices
constexpr float kMaxWeight = 0x1p100f;
constexpr int64_t kMaxVocabSize = (int64_t{1} << 31) - kTile;

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Philox4x32-10 (Salmon et al. 2011), keyed and counted as cuRAND's curand_init does.
FR_HOST_DEVICE uint32_t philox_word(uint64_t seed, uint64_t subsequence, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position >> 2), c1 = static_cast<uint32_t>(position >> 34);
  uint32_t c2 = static_cast<uint32_t>(subsequence), c3 = static_cast<uint32_t>(subsequence >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int lane = static_cast<int>(position & 3);
  return lane == 0 ? c0 : lane == 1 ? c1 : lane == 2 ? c2 : c3;
}

// [0, 1) on the 24-bit grid: curand_uniform's (0, 1] would reject where p == q.
FR_HOST_DEVICE float to_uniform(uint32_t word) { return (word >> 8) * 0x1p-24f; }

// Exact: the product of two float32 fits float64. NaN on either side rejects.
FR_HOST_DEVICE bool accepts(float u, float q, float p) {
  return static_cast<double>(u) * static_cast<double>(q) < static_cast<double>(p);
}

FR_HOST_DEVICE float weight(float p, float q) {
  const float difference = p - q;
  if (!(difference > 0.0f)) return 0.0f;
  return difference < kMaxWeight ? difference : kMaxWeight;
}

// Indices into a vocabulary are int: kMaxVocabSize leaves room for the last tile.
FR_HOST_DEVICE int num_tiles(int64_t vocab_size) {
  return static_cast<int>((vocab_size + kTile - 1) / kTile);
}

// The float32 sum of a tile's weights, w(m) for m in 0..511: w(m) + w(m + 256), then adjacent
// pairs.
template <typename Weight>
FR_HOST_DEVICE float tile_sum(const Weight& w) {
  constexpr int n = 16;
  static_assert(2 * n * n == kTile);
  float outer[n];
  for (int i = 0; i < n; ++i) {
    float inner[n];
    for (int j = 0; j < n; ++j) inner[j] = w(i * n + j) + w(i * n + j + kTile / 2);
    for (int size = n / 2; size >= 1; size /= 2) {
      for (int j = 0; j < size; ++j) inner[j] = inner[2 * j] + inner[2 * j + 1];
    }
    outer[i] = inner[0];
  }
  for (int size = n / 2; size >= 1; size /= 2) {
    for (int j = 0; j < size; ++j) outer[j] = outer[2 * j] + outer[2 * j + 1];
  }
  return outer[0];
}

// The sums of 32 consecutive spans of items, and their inclusive scan in the order that a warp's
// shuffles give: scan[s] += scan[s - d] for d = 1, 2, 4, 8, 16.
struct Spans {
  double sum[kSpans];
  double scan[kSpans];

  FR_HOST_DEVICE double total() const { return scan[kSpans - 1]; }
};

struct Pick {
  int item;     // -1 where no item has weight
  double rest;  // the threshold less the weight before the item
};

template <typename Item>
FR_HOST_DEVICE void sum_spans(int count, const Item& item, Spans& spans) {
  const int length = (count + kSpans - 1) / kSpans;
  for (int s = 0; s < kSpans; ++s) {
    double sum = 0;
    for (int i = s * length; i < (s + 1) * length && i < count; ++i) sum += item(i);
    spans.sum[s] = spans.scan[s] = sum;
  }
  for (int d = 1; d < kSpans; d *= 2) {
    for (int s = kSpans - 1; s >= d; --s) spans.scan[s] += spans.scan[s - d];
  }
}

// The first item in [begin, end) whose cumulative weight exceeds `rest`; where rounding leaves
// none, the last one with weight.
template <int unroll = 1, typename Item>
FR_HOST_DEVICE Pick pick_in_span(int begin, int end, const Item& item, double rest) {
  Pick pick{-1, rest};
  double before = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll unroll
#endif
  for (int i = begin; i < end; ++i) {
    const double w = item(i);
    if (!(w > 0)) continue;
    pick = {i, rest - before};
    before += w;
    if (before > rest) break;
  }
  return pick;
}

template <typename Item>
FR_HOST_DEVICE Pick pick_in_spans(int count, const Item& item, const Spans& spans,
                                  double threshold) {
  const int length = (count + kSpans - 1) / kSpans;
  int chosen = -1;
  for (int s = 0; s < kSpans; ++s) {
    // A span without weight is never chosen, whatever the scan rounds to.
    if (!(spans.sum[s] > 0)) continue;
    chosen = s;
    if (spans.scan[s] > threshold) break;
  }
  if (chosen < 0) return {-1, threshold};
  const double before = chosen ? spans.scan[chosen - 1] : 0;
  const int begin = chosen * length;
  const int end = begin + length < count ? begin + length : count;
  return pick_in_span(begin, end, item, threshold - before);
}

// The arguments of a CUDA launch: device pointers and strides in elements. Ids, uniforms, [B]
// arguments and outputs are contiguous; the vocabulary has stride 1.
struct Params {
  int64_t batch_size, spec_length, vocab_size;
  Dtype dtype;
  bool ids_are_int64;
  const void* draft_token_ids;  // [B, K]
  const void* draft_probs;      // [B, K, V], or null: a one-hot draft
  int64_t draft_row_stride, draft_position_stride;
  const void* target_probs;  // [B, K+1, V]
  int64_t target_row_stride, target_position_stride;
  const int32_t* num_draft_tokens;  // [B] or null
  // Randomness: `uniforms` [B, K+1], else `seeds` and `offsets` [B], else one Philox state, whose
  // seed and offset a CUDA graph's replays read through pointers.
  const float* uniforms;
  const int64_t* seeds;
  const int64_t* offsets;
  uint64_t philox_seed, philox_offset;
  const int64_t* philox_seed_pointer;    // null outside a capture
  const int64_t* philox_offset_pointer;  // null outside a capture; philox_offset is added
  void* token_ids;                       // [B, K+1], dtype of draft_token_ids
  int32_t* num_accepted;                 // [B]
};

enum class Exchange { kAuto, kCluster, kWorkspace };  // how the blocks of a row share tile sums

struct Plan {
  Exchange exchange;        // kCluster or kWorkspace
  int blocks_per_row;       // a cluster's size, or any number with a workspace
  int64_t workspace_bytes;  // uninitialised device memory that launch_fused wants
};

// Chooses for the current device. `exchange` other than kAuto and `blocks_per_row` above 0 are
// kept. Returns a CUDA error code, 0 for success.
int plan_fused(const Params& params, Exchange exchange, int blocks_per_row, Plan* plan);

// Enqueue on `stream` (a cudaStream_t) of the current device. Return a CUDA error code.
int launch_fused(const Params& params, const Plan& plan, void* workspace, void* stream);
int launch_thread_per_row(const Params& params, void* stream);

const char* cuda_error_string(int error);

}  // namespace fused_rejection
