// The arithmetic of rejection sampling, shared by the C++ and the CUDA kernels, and the CUDA
// launchers' interface. No torch headers. docs/kernel.md states the order of summation.
#pragma once

#include <cstdint>
#include <cstring>

// A function of the host where a C++ compiler reads this, and of the device under nvcc.
#if defined(__CUDACC__)
#define FR_FUNCTION __device__ __forceinline__
#define FR_RARE_FUNCTION inline __device__ __noinline__  // it would take registers and instructions
#define FR_HOST_DEVICE __host__ __device__
#else
#define FR_FUNCTION inline
#define FR_RARE_FUNCTION inline
#define FR_HOST_DEVICE
#endif

namespace fused_rejection {

constexpr int64_t kPlaceholderTokenId = -1;
constexpr int kTile = 512;  // indices a float32 sum runs over
constexpr int kSpans = 32;  // a search goes by spans of tiles, then of the tile's indices
constexpr float kMaxWeight = 0x1p100f;
constexpr int64_t kMaxVocabSize = (int64_t{1} << 31) - kTile;

FR_FUNCTION float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FR_FUNCTION uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FR_FUNCTION uint64_t bits_of(double value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(value));
#else
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FR_FUNCTION double double_from_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Philox4x32-10 (Salmon et al. 2011), keyed and counted as cuRAND's curand_init does.
FR_FUNCTION uint32_t philox_word(uint64_t seed, uint64_t subsequence, uint64_t position) {
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
FR_FUNCTION float to_uniform(uint32_t word) { return (word >> 8) * 0x1p-24f; }

// Exact: the product of two float32 fits float64. NaN on either side rejects.
FR_FUNCTION bool accepts(float u, float q, float p) {
  return static_cast<double>(u) * static_cast<double>(q) < static_cast<double>(p);
}

FR_FUNCTION float weight(float p, float q) {
  const float difference = p - q;
  if (!(difference > 0.0f)) return 0.0f;
  return difference < kMaxWeight ? difference : kMaxWeight;
}

// What a call samples from: pointers, and strides in elements. Ids, uniforms, [B] arguments and
// outputs are contiguous, and the vocabulary has stride 1.
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
  bool block_verification;          // else token by token
  // The flattened ragged layout, or null: request b's drafts are ends[b - 1] to ends[b] of
  // draft_token_ids [N], draft_probs [N, V] and target_probs [N, V]; its bonus row is bonus_probs
  // [B, V]. Of a request's drafts the first K count; of more, row K is in place of the bonus row.
  const int32_t* draft_ends;  // [B]
  int64_t num_flat;           // N
  const void* bonus_probs;
  int64_t bonus_row_stride;
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

// The V weights that a request's last token is drawn from, as every Row offers them: `p` and `q`
// point at raw values (q null where there is none), with_draft and without_draft turn them into a
// weight. with_plain_draft is the same in fewer instructions, for rows that are plain. A
// fixed_token of 0 or more is emitted without a draw.
template <typename T>
struct ProbsRow {
  const T* p;
  const T* q;   // null where the draft is one-hot or nothing was rejected
  int one_hot;  // the index where q is 1, or -1
  static constexpr int fixed_token = -1;
  static constexpr bool kTargetIsLogits = false;

  FR_FUNCTION bool draft_is_logits() const { return false; }
  FR_FUNCTION bool from_stats() const { return false; }
  FR_FUNCTION float p_value(float p_i) const { return p_i; }
  FR_FUNCTION float q_value(float q_i) const { return q_i; }
  FR_FUNCTION float with_draft(float p_i, float q_i) const { return weight(p_i, q_i); }
  FR_FUNCTION bool is_plain() const { return true; }
  FR_FUNCTION float with_plain_draft(float p_i, float q_i) const { return with_draft(p_i, q_i); }
  FR_FUNCTION float without_draft(float p_i, int i) const {
    return weight(p_i, i == one_hot ? 1.0f : 0.0f);
  }

  // The row from an index on: the loads that follow then have constant offsets.
  FR_FUNCTION ProbsRow from(int i) const { return {p + i, q ? q + i : nullptr, one_hot - i}; }

  // The same row without its draft, to draw from where the residual has no weight.
  FR_FUNCTION ProbsRow target() const { return {p, nullptr, -1}; }
};

// Reads an argument. Pointers that went through shared memory are generic to the compiler; global
// loads are shorter.
template <typename T>
FR_FUNCTION T read_argument(const T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return *pointer;
}

// A residual of block verification, max(reach * p - q, 0).
template <typename Base>
struct ReachRow : Base {
  double reach;

  FR_FUNCTION float scaled(float p, float q) const {
    const double difference = reach * static_cast<double>(p) - static_cast<double>(q);
    if (!(difference > 0.0)) return 0.0f;
    return difference < kMaxWeight ? static_cast<float>(difference) : kMaxWeight;
  }
  FR_FUNCTION float with_draft(float p_i, float q_i) const {
    if (reach == 1.0) return Base::with_draft(p_i, q_i);
    return scaled(this->p_value(p_i), this->q_value(q_i));
  }
  FR_FUNCTION bool is_plain() const { return false; }
  FR_FUNCTION float without_draft(float p_i, int i) const {
    if (reach == 1.0) return Base::without_draft(p_i, i);
    return scaled(this->p_value(p_i), i == this->one_hot ? 1.0f : 0.0f);
  }
  FR_FUNCTION ReachRow from(int i) const { return {Base::from(i), reach}; }
  FR_FUNCTION ReachRow target() const { return {Base::target(), 1.0}; }
};

template <typename Row>
FR_FUNCTION float weight_at(const Row& row, int i) {
  const float p_i = static_cast<float>(read_argument(row.p + i));
  if (!row.q) return row.without_draft(p_i, i);
  const float q_i = static_cast<float>(read_argument(row.q + i));
  return row.is_plain() ? row.with_plain_draft(p_i, q_i) : row.with_draft(p_i, q_i);
}

// One request's part of the arguments: its drafts, its rows, its outputs.
template <typename T>
struct Request {
  const Params* params;
  int64_t b, drafts, first_id;
  const T *p, *q, *bonus;

  FR_FUNCTION Request(const Params& a, int64_t request)
      : params(&a), b(request), drafts(a.spec_length), first_id(request * a.spec_length) {
    p = static_cast<const T*>(a.target_probs);
    q = static_cast<const T*>(a.draft_probs);
    bonus = nullptr;
    if (a.draft_ends) {
      // Ends that are out of order or out of range address nothing outside [0, N).
      const int64_t begin = b ? a.draft_ends[b - 1] : 0, end = a.draft_ends[b];
      first_id = begin < 0 ? 0 : begin < a.num_flat ? begin : a.num_flat;
      const int64_t count = (end < a.num_flat ? end : a.num_flat) - first_id;
      drafts = count < 0 ? 0 : count < drafts ? count : drafts;
      p += first_id * a.target_position_stride;
      if (q) q += first_id * a.draft_position_stride;
      if (count <= a.spec_length) {
        bonus = static_cast<const T*>(a.bonus_probs) + b * a.bonus_row_stride;
      }
    } else {
      p += b * a.target_row_stride;
      if (q) q += b * a.draft_row_stride;
      if (a.num_draft_tokens && a.num_draft_tokens[b] < drafts) drafts = a.num_draft_tokens[b];
    }
  }

  FR_FUNCTION int64_t id(int64_t k) const {
    const int64_t i = first_id + k;
    return params->ids_are_int64 ? static_cast<const int64_t*>(params->draft_token_ids)[i]
                                 : static_cast<const int32_t*>(params->draft_token_ids)[i];
  }

  FR_FUNCTION bool in_vocab(int64_t id) const { return id >= 0 && id < params->vocab_size; }

  FR_FUNCTION const T* target_row(int64_t k) const {
    return bonus && k == drafts ? bonus : p + k * params->target_position_stride;
  }
  FR_FUNCTION const T* draft_row(int64_t k) const {
    return q ? q + k * params->draft_position_stride : nullptr;
  }

  FR_FUNCTION void store(int64_t k, int64_t id) const {
    const int64_t i = b * (params->spec_length + 1) + k;
    if (params->ids_are_int64) {
      static_cast<int64_t*>(params->token_ids)[i] = id;
    } else {
      static_cast<int32_t*>(params->token_ids)[i] = static_cast<int32_t>(id);
    }
  }
};

// A draft token's p and q, up to a common factor.
struct Odds {
  double p, q;

  // The reach of the prefix that ends with this token, from that of the one before it.
  FR_FUNCTION double step(double reach) const {
    const double product = reach * p;
    if (!(product > 0.0)) return 0.0;
    if (!(q > 0.0)) return 1.0;
    const double quotient = product / q;
    return quotient < 1.0 ? quotient : 1.0;
  }
};

template <typename T>
struct ProbsRequest : Request<T> {
  using Row = ProbsRow<T>;
  using Request<T>::Request;

  // Whether draft k, the token `id`, is accepted with the uniform that `u()` draws.
  template <typename Uniform>
  FR_FUNCTION bool accepts_draft(int64_t k, int64_t id, const Uniform& u) const {
    if (!this->in_vocab(id)) return false;
    const T* draft = this->draft_row(k);
    const float q = draft ? static_cast<float>(draft[id]) : 1.0f;
    const float p = static_cast<float>(this->target_row(k)[id]);
    return accepts(u(), q, p);
  }

  // p and q of draft k, the token `id`.
  FR_FUNCTION Odds odds(int64_t k, int64_t id) const {
    if (!this->in_vocab(id)) return {0.0, 1.0};
    const T* draft = this->draft_row(k);
    return {static_cast<double>(static_cast<float>(read_argument(this->target_row(k) + id))),
            draft ? static_cast<double>(static_cast<float>(read_argument(draft + id))) : 1.0};
  }

  // The row to draw from after k accepted drafts, `id` being the rejected one, or the placeholder
  // where the drafts ended.
  FR_FUNCTION Row row(int64_t k, int64_t id) const {
    Row row{this->target_row(k), nullptr, -1};
    if (id == kPlaceholderTokenId) return row;
    row.q = this->draft_row(k);
    if (!row.q && this->in_vocab(id)) row.one_hot = static_cast<int>(id);
    return row;
  }
};

// Where a request's uniforms are in Philox's streams; `position` is uniform 0's.
struct Stream {
  uint64_t seed, subsequence, position;
};

FR_FUNCTION Stream stream_of(const Params& a, int64_t b) {
  if (a.seeds) {
    return {static_cast<uint64_t>(a.seeds[b]), 0, static_cast<uint64_t>(a.offsets[b])};
  }
  Stream stream{a.philox_seed, static_cast<uint64_t>(b), a.philox_offset};
  if (a.philox_seed_pointer) {
    stream.seed = static_cast<uint64_t>(*a.philox_seed_pointer);
    stream.position += static_cast<uint64_t>(*a.philox_offset_pointer);
  }
  return stream;
}

FR_FUNCTION float uniform(const Params& a, int64_t b, int64_t k) {
  if (a.uniforms) return a.uniforms[b * (a.spec_length + 1) + k];
  const Stream stream = stream_of(a, b);
  return to_uniform(philox_word(stream.seed, stream.subsequence, stream.position + k));
}

template <typename Row>
struct Decision {
  int64_t accepted;
  Row row;
};

// One thread decides a request, with early exit: nothing after the first rejection is looked at. It
// stores all but the last token. `uniform_at(k)` is uniform k, asked for in order of k.
template <typename Request, typename UniformAt>
FR_FUNCTION Decision<typename Request::Row> decide(const Request& request,
                                                   const UniformAt& uniform_at) {
  int64_t accepted = 0, rejected_id = kPlaceholderTokenId;
  for (; accepted < request.drafts; ++accepted) {
    const int64_t id = request.id(accepted);
    if (id == kPlaceholderTokenId) break;
    if (!request.accepts_draft(accepted, id, [&] { return uniform_at(accepted); })) {
      rejected_id = id;
      break;
    }
    request.store(accepted, id);
  }
  for (int64_t k = accepted + 1; k <= request.params->spec_length; ++k) {
    request.store(k, kPlaceholderTokenId);
  }
  request.params->num_accepted[request.b] = static_cast<int32_t>(accepted);
  return {accepted, request.row(accepted, rejected_id)};
}

// The share of a prefix's test, given the total of its residual.
FR_FUNCTION double share_of(double total, double reach) {
  return reach < 1.0 ? total / (total + (1.0 - reach)) : 1.0;
}

// Block verification (Sun et al. 2024, arXiv:2403.10444, algorithm 2) of one request by one thread:
// the longest prefix whose test passes, tried from the longest on. `reach` is room for K + 1
// numbers; `total_of(row)` sums a residual.
template <typename Request, typename TotalOf>
FR_FUNCTION Decision<ReachRow<typename Request::Row>> decide_block(const Request& request,
                                                                   double* reach,
                                                                   const TotalOf& total_of) {
  using Row = ReachRow<typename Request::Row>;
  const Params& a = *request.params;
  int64_t drafts = 0;
  reach[0] = 1.0;
  for (; drafts < request.drafts && request.id(drafts) != kPlaceholderTokenId; ++drafts) {
    reach[drafts + 1] = request.odds(drafts, request.id(drafts)).step(reach[drafts]);
  }
  Row row{request.row(drafts, kPlaceholderTokenId), 1.0};
  int64_t accepted = drafts;
  if (drafts > 0 && !(uniform(a, request.b, drafts - 1) < reach[drafts])) {
    for (--accepted;; --accepted) {
      if (!(reach[accepted] > 0.0)) continue;  // never the empty prefix, whose reach is 1
      row = {request.row(accepted, request.id(accepted)), reach[accepted]};
      if (accepted == 0) break;
      const double total = reach[accepted] < 1.0 ? total_of(row) : 0.0;
      if (uniform(a, request.b, accepted - 1) < share_of(total, reach[accepted])) break;
    }
  }
  for (int64_t k = 0; k <= a.spec_length; ++k) {
    if (k != accepted) request.store(k, k < accepted ? request.id(k) : kPlaceholderTokenId);
  }
  a.num_accepted[request.b] = static_cast<int32_t>(accepted);
  return {accepted, row};
}

// Indices into a vocabulary are int: kMaxVocabSize leaves room for the last tile.
FR_HOST_DEVICE constexpr int num_tiles(int64_t vocab_size) {
  return static_cast<int>((vocab_size + kTile - 1) / kTile);
}

// The float32 sum of a tile's weights, w(m) for m in 0..511: w(m) + w(m + 256), then adjacent
// pairs.
template <typename Weight>
FR_FUNCTION float tile_sum(const Weight& w) {
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

// The inclusive scan of 32 values in the order that a warp's shuffles give.
template <typename Number>
FR_FUNCTION void inclusive_scan(Number (&scan)[kSpans]) {
  for (int d = 1; d < kSpans; d *= 2) {
    for (int s = kSpans - 1; s >= d; --s) scan[s] += scan[s - d];
  }
}

// The sums of 32 consecutive spans of items, and their inclusive scan: in float64 over a row's
// tiles, in float32 inside a tile.
template <typename Number>
struct Spans {
  Number sum[kSpans];
  Number scan[kSpans];

  FR_FUNCTION Number total() const { return scan[kSpans - 1]; }
};

struct Pick {
  int item;     // -1 where no item has weight
  double rest;  // the threshold less the weight before the item
};

constexpr int kGroup = 8;  // items of a span that are added one after the other, then groups are

template <typename Number, typename Item>
FR_FUNCTION Number span_sum(int begin, int end, const Item& item) {
  Number sum = 0;
  for (int first = begin; first < end; first += kGroup) {
    Number group = 0;
    for (int i = first; i < end && i < first + kGroup; ++i) group += item(i);
    sum += group;
  }
  return sum;
}

template <typename Number, typename Item>
FR_FUNCTION void sum_spans(int count, const Item& item, Spans<Number>& spans) {
  const int length = (count + kSpans - 1) / kSpans;
  for (int s = 0; s < kSpans; ++s) {
    const int end = (s + 1) * length < count ? (s + 1) * length : count;
    spans.sum[s] = spans.scan[s] = span_sum<Number>(s * length, end, item);
  }
  inclusive_scan(spans.scan);
}

// The first item in [begin, end) whose cumulative weight exceeds `rest`; where rounding leaves
// none, the last one that adds to it.
template <typename Number, typename Item>
FR_FUNCTION Pick pick_in_span(int begin, int end, const Item& item, Number rest) {
  Pick pick{-1, rest};
  Number carry = 0, before = 0;
  for (int first = begin; first < end; first += kGroup) {
    Number group = 0;
    for (int i = first; i < end && i < first + kGroup; ++i) {
      group += item(i);
      const Number cumulated = carry + group;
      if (cumulated > before) pick = {i, rest - before};
      if (cumulated > rest) return pick;
      before = cumulated;
    }
    carry = before;
  }
  return pick;
}

template <typename Number, typename Item>
FR_FUNCTION Pick pick_in_spans(int count, const Item& item, const Spans<Number>& spans,
                               Number threshold) {
  const int length = (count + kSpans - 1) / kSpans;
  int chosen = -1;
  for (int s = 0; s < kSpans; ++s) {
    // A span without weight is never chosen, whatever the scan rounds to.
    if (!(spans.sum[s] > 0)) continue;
    chosen = s;
    if (spans.scan[s] > threshold) break;
  }
  if (chosen < 0) return {-1, threshold};
  const Number rest = threshold - (chosen ? spans.scan[chosen - 1] : 0);
  const int begin = chosen * length;
  const int end = begin + length < count ? begin + length : count;
  return pick_in_span<Number>(begin, end, item, rest > 0 ? rest : 0);
}

enum class Exchange { kAuto, kCluster, kWorkspace };  // how the blocks of a row share tile sums

struct Plan {
  Exchange exchange;   // kCluster or kWorkspace
  int blocks_per_row;  // a cluster's size, or any number with a workspace
  int warps_per_block;
  int64_t workspace_bytes;  // uninitialised device memory that launch_fused wants
};

// Chooses for the current device. `exchange` other than kAuto and `blocks_per_row` above 0 are
// kept. Returns a CUDA error code, 0 for success.
int plan_fused(const Params& params, Exchange exchange, int blocks_per_row, Plan* plan);

// Enqueue on `stream` (a cudaStream_t) of the current device. Return a CUDA error code.
int launch_fused(const Params& params, const Plan& plan, void* workspace, void* stream);
int launch_thread_per_row(const Params& params, void* stream);

// Only reads rows: `rows` [B, 2] are byte offsets into target and draft, -1 for no draft row.
// `sums` gets blocks_per_row * 16 floats a request. For measuring; see floor_kernel.cu.
int launch_floor(const void* target, const void* draft, const int64_t* rows, int64_t batch_size,
                 int64_t row_bytes, int blocks_per_row, float* sums, void* stream);

const char* cuda_error_string(int error);

}  // namespace fused_rejection
