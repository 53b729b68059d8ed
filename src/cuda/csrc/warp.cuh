// The fast kernels' building blocks: a warp sums a tile, a warp searches, the blocks of a row
// exchange tile sums. Included by kernels, for the device, or by tests/emulation for the CPU.
#pragma once

#include <type_traits>

#include "fused_rejection.h"

// Below sm_90 the two kernels that take longest to compile, and run in clusters only, have no code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FR_HAS_CLUSTERS 0
#else
#define FR_HAS_CLUSTERS 1
#endif

#ifdef FR_EMULATION
#include "emulation.h"  // tests/emulation: the kernels on CPU fibers
#else
#include <cuda_runtime.h>

#include "overlap.cuh"

#define FR_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)

namespace fused_rejection {
namespace {

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// atomicAdd that publishes what this thread has stored or seen before.
__device__ __forceinline__ unsigned add_released(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}
// After it this thread sees what was published to what it has read.
__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Clusters exist from sm_90 on. Below it these are never reached: plan_fused chooses a workspace.

// This block's place in its cluster, and its cluster's in the grid.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ unsigned cluster_index() {
  unsigned index = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}

// The same in the second dimension of the grid.
__device__ __forceinline__ unsigned grid_row() { return blockIdx.y; }

// Says that this block has started, before any cluster_wait(); publishes nothing but expect_bytes.
__device__ __forceinline__ void cluster_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// Where a shared variable is in block `rank` of this cluster.
__device__ __forceinline__ uint32_t address_in_block(const void* shared, int rank) {
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}
#endif

// Stores a value into the same shared variable of block `rank` of this cluster.
__device__ __forceinline__ void store_to_block(float* shared, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = address_in_block(shared, rank);
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

// A count of the bytes that send_to_block is still to bring, in shared memory. One thread sets it,
// once, before its cluster_start.
__device__ __forceinline__ void expect_bytes(uint64_t* pending, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One thread of the block: so many more, in the next phase of either kind of word.
__device__ __forceinline__ void expect_more(uint64_t* pending, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
               : "memory");
#endif
}

// The same where `blocks` are to announce() how many bytes they bring, and when these are there so
// many once more: phases.
__device__ __forceinline__ void expect_announcements(uint64_t* pending, int blocks) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(here), "r"(blocks) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One thread of a block: what it sends to block `rank` in this phase. It publishes nothing else,
// and so needs no fence.
__device__ __forceinline__ void announce(uint64_t* pending, int rank, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = address_in_block(pending, rank);
  asm volatile(
      "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(there),
      "r"(bytes)
      : "memory");
#endif
}

// store_to_block, counted by that block's `pending`: its threads need no barrier to see the value.
template <typename V>
__device__ __forceinline__ void send_to_block(V* shared, uint64_t* pending, int rank, V value) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(V) == 4 || sizeof(V) == 8);
  const uint32_t there = address_in_block(shared, rank);
  const uint32_t count_there = address_in_block(pending, rank);
  if constexpr (std::is_same_v<V, double>) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(there),
        "d"(value), "r"(count_there)
        : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(there),
        "l"(static_cast<uint64_t>(value)), "r"(count_there)
        : "memory");
  } else if constexpr (std::is_same_v<V, float>) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there),
        "f"(value), "r"(count_there)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(there),
        "r"(static_cast<uint32_t>(value)), "r"(count_there)
        : "memory");
  }
#endif
}

// 16 bytes at once.
__device__ __forceinline__ void send_words_to_block(uint4* shared, uint64_t* pending, int rank,
                                                    const uint4& words) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = address_in_block(shared, rank);
  const uint32_t count_there = address_in_block(pending, rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(count_there)
      : "memory");
#endif
}

// Two adjacent values at once, `shared` being aligned to 8 bytes.
__device__ __forceinline__ void send_pair_to_block(float* shared, uint64_t* pending, int rank,
                                                   float first, float second) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = address_in_block(shared, rank);
  const uint32_t count_there = address_in_block(pending, rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          there),
      "f"(first), "f"(second), "r"(count_there)
      : "memory");
#endif
}

// Waits until every byte of a phase is there, the first of which has parity 0. Not
// .acquire.cluster, which would also empty the L1 cache: what arrives is this block's own shared
// memory.
__device__ __forceinline__ void wait_for_bytes(uint64_t* pending, int parity = 0) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(here), "r"(parity)
        : "memory");
  }
#endif
}

}  // namespace
}  // namespace fused_rejection
#endif

namespace fused_rejection {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;
// What a block of the fused kernel may have, which caps the registers of a thread at 64: two blocks
// of 16 warps then fit a multiprocessor. ptxas spills for sm_120 at 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMaxFusedWarps = 16;
constexpr int kResidentBlocks = 1, kResidentDecisions = 4;
#else
constexpr int kMaxFusedWarps = 32;
constexpr int kResidentBlocks = 2, kResidentDecisions = 8;
#endif
constexpr unsigned kIdleGrid = 64;  // blocks
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct BFloat16 {
  uint16_t bits;
  __device__ explicit operator float() const {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};
struct Float16 {
  uint16_t bits;
  __device__ explicit operator float() const { return half_to_float(bits); }
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte load
template <typename T>
constexpr int kVectors = kTile / (kWarp * kVector<T>);  // loads a lane makes for a tile

template <typename Row>
using ElementOf = std::remove_cv_t<std::remove_pointer_t<decltype(Row::p)>>;

// Whether rows can be read 16 bytes at a time, the last one's end too.
template <typename T>
__device__ __forceinline__ bool by_vectors(const T* p, const T* q, int vocab_size) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(q);
  return (bits & 15) == 0 && vocab_size % kVector<T> == 0;
}

// 16 bytes as they are loaded: unpacked, two 16-bit values would take two registers.
struct alignas(16) Words {
  uint32_t word[4];
};

// A lane's share of a tile as it was loaded: vectors l, l + 32, ... for lane l, so that the step
// w[m] + w[m + 256] and the first adjacent pairs are local to it. It is worked on in two halves by
// the same instructions, eight elements at a time: a warp waits longer for new instructions than
// for most else.
template <typename T>
struct RawTile {
  Words words[kVectors<T>];

  static constexpr int kElements = 8, kPairs = 4;  // of a half; those 256 apart are a pair
  static constexpr int kHalfStep = sizeof(T) == 4 ? kTile / 4 : 4;

  // Where element i of a half is, from the lane's first index.
  static __device__ constexpr int index(int half, int i) {
    return i / kPairs * (kTile / 2) + half * kHalfStep + i % kPairs;
  }

  // Element i of the first half.
  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i / kPairs * 2].word[i % kPairs]);
    } else {
      return element(words[i / kPairs].word[i % kPairs / 2], i % 2);
    }
  }

  // The elements are numbered by bits, that of element i % kElements of half i / kElements.
  static constexpr int kBits = 2 * kElements;
  static __device__ constexpr int bit(int i) {
    const int half = i / kElements, pair = i % kElements / kPairs, in_pair = i % kPairs;
    if (sizeof(T) == 4) return (pair * 2 + half) * 4 + in_pair;
    return pair * 4 + half * 2 + in_pair / 2 + in_pair % 2 * 16;
  }

  // By its bit: of words of two, the second element's is 16 above the first's.
  __device__ __forceinline__ float of_bit(int bit) const {
    const int word = bit % 16;
    return element(words[word / 4].word[word % 4], bit / 16);
  }

  // The same where the bit is known only when it runs: halves of what is left, since what is picked
  // by its number the compiler keeps in memory.
  __device__ __forceinline__ float of_any_bit(int bit) const {
    constexpr int count = 4 * kVectors<T>;
    uint32_t left[count];
#pragma unroll
    for (int w = 0; w < count; ++w) left[w] = words[w / 4].word[w % 4];
#pragma unroll
    for (int step = 1; step < count; step *= 2) {
#pragma unroll
      for (int w = 0; w < count; w += 2 * step) left[w] = bit & step ? left[w + step] : left[w];
    }
    return element(left[0], bit >> 4);
  }

  // Where that element is in the tile.
  static __device__ __forceinline__ int place(int bit, int lane) {
    const int word = bit & 15, vector = (word >> 2) * kWarp + lane;
    return vector * kVector<T> + (word & 3) * (4 / static_cast<int>(sizeof(T))) + (bit >> 4);
  }

  // The second half becomes the first.
  __device__ __forceinline__ void next_half() {
    if constexpr (sizeof(T) == 4) {
      words[0] = words[1];
      words[2] = words[3];
    } else {
#pragma unroll
      for (Words& w : words) {
        w.word[0] = w.word[2];
        w.word[1] = w.word[3];
      }
    }
  }

  // Element e of a word.
  static __device__ __forceinline__ float element(uint32_t word, int e) {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word);
    } else {
      return static_cast<float>(T{static_cast<uint16_t>(word >> (e * 16))});
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const float& x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <typename T>
__device__ __forceinline__ uint32_t word_of(const T& x) {
  return x.bits;
}

// 16 bytes one element at a time; the first `left` of them exist. Packed only once all are there.
template <typename T>
__device__ __forceinline__ Words load_elements(const T* from, int left, uint32_t pad) {
  constexpr int per_word = 4 / sizeof(T), bits = 8 * sizeof(T);
  uint32_t element[kVector<T>];
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    element[e] = pad >> (32 - bits);
    if (e < left) element[e] = word_of(read_argument(from + e));
  }
  Words words = {};
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    words.word[e / per_word] |= element[e] << (e % per_word * bits);
  }
  return words;
}

// One lane: reads its share of a whole tile, from its first element on, 16 bytes at a time.
template <typename T>
__device__ __forceinline__ void load_vectors(const T* from, RawTile<T>& raw) {
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
    raw.words[j] = read_argument(reinterpret_cast<const Words*>(from + j * kWarp * kVector<T>));
  }
}

// One warp: reads a tile. No load waits for another. Beyond the vocabulary it has words of `pad`.
template <typename T>
__device__ __forceinline__ void load_tile(const T* x, int tile, int vocab_size, uint32_t pad,
                                          int lane, RawTile<T>& raw) {
  constexpr int step = kWarp * kVector<T>;
  const int begin = tile * kTile + lane * kVector<T>, left = vocab_size - begin;
  const bool vectors = by_vectors<T>(x, nullptr, vocab_size);
  if (vectors && (tile + 1) * kTile <= vocab_size) {
    load_vectors(x + begin, raw);
  } else if (vectors) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
#pragma unroll
      for (uint32_t& word : raw.words[j].word) word = pad;
      if (j * step < left) {
        raw.words[j] = read_argument(reinterpret_cast<const Words*>(x + begin + j * step));
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
      raw.words[j] = load_elements(x + begin + j * step, left - j * step, pad);
    }
  }
}

template <typename T>
constexpr uint32_t kNegativeInfinityWord = 0xFF800000u;
template <>
constexpr uint32_t kNegativeInfinityWord<BFloat16> = 0xFF80FF80u;
template <>
constexpr uint32_t kNegativeInfinityWord<Float16> = 0xFC00FC00u;

// The larger of two words, of their one float or of each of their two 16-bit ones; of a NaN and a
// number the number.
template <typename T>
__device__ __forceinline__ uint32_t max_of(uint32_t a, uint32_t b) {
  uint32_t most = 0;
  if constexpr (sizeof(T) == 4) {
    most = bits_of(fmaxf(float_from_bits(a), float_from_bits(b)));
  } else {
#ifdef FR_EMULATION
    for (int half = 0; half < 32; half += 16) {
      const T x{static_cast<uint16_t>(a >> half)}, y{static_cast<uint16_t>(b >> half)};
      const float x_f = static_cast<float>(x), y_f = static_cast<float>(y);
      most |= static_cast<uint32_t>((x_f >= y_f || y_f != y_f ? x : y).bits) << half;
    }
#else
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    }
#endif
  }
  return most;
}

// One lane: at least `floor`, a bfloat16, in place of what is less and of NaN.
template <typename T>
__device__ __forceinline__ void raise_to(RawTile<T>& raw, float floor) {
  uint32_t word = bits_of(floor);
  if (sizeof(T) < 4) word |= word >> 16;
#pragma unroll
  for (Words& words : raw.words) {
#pragma unroll
    for (uint32_t& own : words.word) own = max_of<T>(own, word);
  }
}

// What stands for a token beyond the vocabulary: one without probability.
template <typename T>
__device__ __forceinline__ uint32_t pad_of(bool is_logits) {
  return is_logits ? kNegativeInfinityWord<T> : 0u;
}

// One lane: a half's part of tile_sum.
__device__ __forceinline__ float half_sum(const float (&w)[8]) {
  return ((w[0] + w[4]) + (w[1] + w[5])) + ((w[2] + w[6]) + (w[3] + w[7]));
}

// One warp: tile_sum, from the lanes' sums of the two halves, in every lane.
template <typename T>
__device__ __forceinline__ float warp_sum(float first, float second) {
  if (sizeof(T) < 4) first += second;  // they are adjacent
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    first += __shfl_xor_sync(kAllLanes, first, d);
    if (sizeof(T) == 4) second += __shfl_xor_sync(kAllLanes, second, d);
  }
  return sizeof(T) == 4 ? first + second : first;
}

// Where a search by spans has what it looks through: spans of up to kKeptSpan items are kSpanStride
// apart, so that the lanes' items are in different banks.
constexpr int kKeptSpan = kTile / kSpans, kSpanStride = kKeptSpan + 1;
constexpr int kPaddedTile = kSpans * kSpanStride;  // the weights of a tile

FR_HOST_DEVICE constexpr int64_t kept_bytes(int tiles) {
  return tiles * kPaddedTile * static_cast<int64_t>(sizeof(float));
}

// One warp: false where no lane's element has a weight, as filters leave most places of a tile.
template <typename Row>
__device__ __forceinline__ bool warp_may_weigh(const Row& row, float p_i) {
  if constexpr (Row::kTargetIsLogits) return __any_sync(kAllLanes, row.keeps(p_i));
  return true;
}

// One warp: reads a tile's p, and its q where the row has one.
template <typename Row>
__device__ __forceinline__ void load_tiles(const Row& row, int tile, int vocab_size, int lane,
                                           RawTile<ElementOf<Row>>& p, RawTile<ElementOf<Row>>& q) {
  using T = ElementOf<Row>;
  load_tile(row.p, tile, vocab_size, pad_of<T>(Row::kTargetIsLogits), lane, p);
  if (row.q) load_tile(row.q, tile, vocab_size, pad_of<T>(row.draft_is_logits()), lane, q);
}

// One lane: the weights of half of its share of a tile, to where warp_weigh_raw keeps them.
template <typename T>
__device__ __forceinline__ void store_weights(const float (&w)[RawTile<T>::kElements], int half,
                                              int lane, float* weights) {
  const int at = lane * kVector<T> + RawTile<T>::index(half, 0);
  float* first_of = weights + at + at / kKeptSpan;
#pragma unroll
  for (int i = 0; i < 8; ++i) first_of[i % 4 + i / 4 * (kPaddedTile / 2)] = w[i];
}

// One warp: warp_weigh_raw of a residual of plain rows of logits. Its parameters stay in registers:
// from shared memory they would be read for each half.
template <typename Row>
__device__ __forceinline__ float warp_weigh_plain(const Row& row, RawTile<ElementOf<Row>>& p,
                                                  RawTile<ElementOf<Row>>& q, int lane,
                                                  float* weights) {
  using T = ElementOf<Row>;
  const auto residual = row.plain_residual;
  // Float16 has no numbers as low as the floors.
  constexpr bool raises = !std::is_same_v<T, Float16>;
  if constexpr (raises) {
    raise_to(p, residual.floor);
    raise_to(q, residual.draft_floor);
  }
  float first = 0, second = 0;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float w[RawTile<T>::kElements];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (raises) {
        w[i] = residual.template weight<T>(p.at(i), q.at(i));
      } else {
        w[i] = residual.template raised_weight<T>(p.at(i), q.at(i));
      }
    }
    if (weights) store_weights<T>(w, half, lane, weights);
    first = second;
    second = half_sum(w);
    p.next_half();
    q.next_half();
  }
  return warp_sum<T>(first, second);
}

// One warp: the sum of the weights of a tile whose p and q it has read, in every lane; unless
// `weights` is null, they go there, every span followed by a gap. `filtered`: whether it pays to
// look for places without weight.
template <bool filtered = false, typename Row>
__device__ __forceinline__ float warp_weigh_raw(const Row& row, RawTile<ElementOf<Row>>& p,
                                                RawTile<ElementOf<Row>>& q, int tile, int lane,
                                                float* weights) {
  using T = ElementOf<Row>;
  if constexpr (Row::kTargetIsLogits && sizeof(T) < 4) {  // float32 leaves no registers for it
    if (row.q && row.is_plain()) return warp_weigh_plain(row, p, q, lane, weights);
  }
  const int begin = tile * kTile + lane * kVector<T>;
  constexpr int unroll = Row::kTargetIsLogits ? 1 : 2;
  float first = 0, second = 0;
#pragma unroll unroll
  for (int half = 0; half < 2; ++half) {
    float w[RawTile<T>::kElements];
    if (!row.q) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        w[i] = row.without_draft(p.at(i), begin + RawTile<T>::index(half, i));
      }
    } else if (row.is_plain()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = row.with_plain_draft(p.at(i), q.at(i));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        w[i] = 0.0f;
        if (!filtered || warp_may_weigh(row, p.at(i))) w[i] = row.with_draft(p.at(i), q.at(i));
      }
    }
    if (weights) store_weights<T>(w, half, lane, weights);
    first = second;
    second = half_sum(w);
    p.next_half();
    q.next_half();
  }
  return warp_sum<T>(first, second);
}

// One warp: the same of a tile that it reads.
template <bool filtered = false, typename Row>
__device__ __forceinline__ float warp_weigh_tile(const Row& row, int tile, int vocab_size, int lane,
                                                 float* weights) {
  using T = ElementOf<Row>;
  RawTile<T> p, q;
  load_tiles(row, tile, vocab_size, lane, p, q);
  return warp_weigh_raw<filtered>(row, p, q, tile, lane, weights);
}

// All threads of a block: the weights of a tile, as warp_weigh_tile stores them.
template <typename Row>
__device__ __forceinline__ void block_store_weights(const Row& row, int tile, int vocab_size,
                                                    float* weights) {
  const int begin = tile * kTile;
#pragma unroll 4
  for (int m = static_cast<int>(threadIdx.x); m < kTile; m += static_cast<int>(blockDim.x)) {
    weights[m + m / kKeptSpan] = begin + m < vocab_size ? weight_at(row, begin + m) : 0.0f;
  }
}

// One warp: brings a tile's lines of two rows, either of them null, into the L2 cache.
template <typename T>
__device__ __forceinline__ void prefetch_tile(const T* p, const T* q, int tile, int vocab_size,
                                              int lane) {
  constexpr int line = 128 / sizeof(T), lines = kTile / line, half = kWarp / 2;
  static_assert(lines <= half);
  const T* from = lane < half ? p : q;
  const int i = tile * kTile + lane % half * line;
  if (from && lane % half < lines && i < vocab_size) prefetch_line(from + i);
}

// One warp: inclusive_scan with a value a lane.
template <typename Number>
__device__ __forceinline__ Number warp_scan(Number sum, int lane) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const Number other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  return sum;
}

// One lane: the sum of a span's next items.
template <typename Number>
__device__ __forceinline__ Number group_sum(const float (&weights)[kGroup]) {
  Number sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += static_cast<Number>(weights[i]);
  return sum;
}

// The lanes' spans of `count` weights, with their sums and scan.
template <typename Number>
struct LaneSpans {
  int length, count;
  Number sum = 0, scan;

  // Spans of `weights` are `stride` apart, or one after the other where that is 0. Unless
  // `cumulated` is null, what a span, of at most kKeptSpan items, cumulates to goes there; it may
  // be `weights`.
  __device__ __forceinline__ LaneSpans(const float* weights, int all, int stride, int lane,
                                       Number* cumulated)
      : length((all + kSpans - 1) / kSpans), count(all) {
    const int left = items(lane);
    const float* own = weights + lane * (stride ? stride : length);
    if (cumulated) {
      Number* to = cumulated + lane * kSpanStride;
      length <= kGroup ? cumulate<1>(own, left, to, lane) : cumulate<2>(own, left, to, lane);
      return;
    }
#pragma unroll 1
    for (int first = 0; first < left; first += kGroup) {
      float w[1][kGroup];
      fetch(own + first, left - first, w);
      sum += group_sum<Number>(w[0]);
    }
    scan = warp_scan(sum, lane);
  }

  // How many items a span has, none where it is 0 or less.
  __device__ __forceinline__ int items(int span) const {
    const int left = count - span * length;
    return left < length ? left : length;
  }

  __device__ __forceinline__ Number total() const {
    return __shfl_sync(kAllLanes, scan, kSpans - 1);
  }

 private:
  // All items are fetched before the first is added.
  template <int groups>
  static __device__ __forceinline__ void fetch(const float* own, int left,
                                               float (&w)[groups][kGroup]) {
#pragma unroll
    for (int i = 0; i < groups * kGroup; ++i) {
      w[i / kGroup][i % kGroup] = i < left ? own[i] : 0.0f;
    }
  }

  // No loop and no branch.
  template <int groups>
  __device__ __forceinline__ void cumulate(const float* own, int left, Number* to, int lane) {
    static_assert(2 * kGroup == kKeptSpan);
    float w[groups][kGroup];
    fetch(own, left, w);
#pragma unroll
    for (int first = 0; first < groups * kGroup; first += kGroup) {
      Number group = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        group += static_cast<Number>(w[first / kGroup][i]);
        if (first + i < left) to[first + i] = sum + group;
      }
      sum += group;
    }
    scan = warp_scan(sum, lane);
  }
};

// One warp: pick_in_span of a span that was cumulated.
template <typename Number>
__device__ __forceinline__ Pick warp_pick_cumulated(const Number* cumulated, int count, Number rest,
                                                    int lane) {
  const Number last = cumulated[count - 1], own = cumulated[lane < count ? lane : count - 1];
  const unsigned crossing = __ballot_sync(kAllLanes, own > rest);
  const unsigned ends = __ballot_sync(kAllLanes, own == last);
  const int item = __ffs(crossing ? crossing : ends) - 1;
  const Number before = __shfl_sync(kAllLanes, own, item ? item - 1 : 0);
  return {item, rest - (item ? before : 0)};
}

// One warp: pick_in_span of a longer span.
__device__ __forceinline__ Pick warp_pick_in_span(const float* weights, int count, double rest,
                                                  int lane) {
  Pick pick{-1, rest};
  double carry = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kGroup) {
    const float w = lane < kGroup && first + lane < count ? weights[first + lane] : 0.0f;
    double sum = 0, own = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sum += static_cast<double>(__shfl_sync(kAllLanes, w, i));
      if (lane >= i) own = carry + sum;
    }
    const double previous = __shfl_up_sync(kAllLanes, own, 1), before = lane ? previous : carry;
    const unsigned adding = __ballot_sync(kAllLanes, own > before);
    const unsigned crossing = __ballot_sync(kAllLanes, own > rest);
    if (adding) {
      const int chosen = crossing ? __ffs(crossing) - 1 : kWarp - 1 - __clz(adding);
      pick = {first + chosen, rest - __shfl_sync(kAllLanes, before, chosen)};
    }
    if (crossing) break;
    carry = __shfl_sync(kAllLanes, own, kWarp - 1);
  }
  return pick;
}

// One warp: pick_in_spans. `weights` is null where the spans were cumulated. Inline: as a call it
// takes 0.3 us more on an H100.
template <typename Number>
__device__ __forceinline__ Pick warp_pick(const LaneSpans<Number>& spans, const Number* cumulated,
                                          const float* weights, Number threshold, int lane) {
  const unsigned weighted = __ballot_sync(kAllLanes, spans.sum > 0);
  const unsigned crossing = __ballot_sync(kAllLanes, spans.sum > 0 && spans.scan > threshold);
  if (!weighted) return {-1, threshold};
  const int chosen = crossing ? __ffs(crossing) - 1 : kWarp - 1 - __clz(weighted);
  const Number previous = __shfl_sync(kAllLanes, spans.scan, chosen ? chosen - 1 : 0);
  const Number left = threshold - (chosen ? previous : 0), rest = left > 0 ? left : 0;
  const int begin = chosen * spans.length, count = spans.items(chosen);
  __syncwarp();  // what the lanes have cumulated is there
  Pick pick = weights ? warp_pick_in_span(weights + begin, count, rest, lane)
                      : warp_pick_cumulated(cumulated + chosen * kSpanStride, count, rest, lane);
  pick.item += begin;
  return pick;
}

// One warp: the tile to draw from.
__device__ __forceinline__ Pick warp_pick_tile(const float* sums, int tiles, float u, int lane) {
  __shared__ double cumulated[kSpans * kSpanStride];
  const bool keeps = tiles <= kSpans * kKeptSpan;
  const LaneSpans<double> spans(sums, tiles, 0, lane, keeps ? cumulated : nullptr);
  return warp_pick(spans, cumulated, keeps ? nullptr : sums, u * spans.total(), lane);
}

// One warp: the token to draw from a tile whose padded weights are there; they are cumulated in
// their place.
__device__ __forceinline__ int warp_pick_token(float* weights, const Pick& tile, int lane) {
  __syncwarp();
  const LaneSpans<float> spans(weights, kTile, kSpanStride, lane, weights);
  const float rest = static_cast<float>(tile.rest);
  return tile.item * kTile + warp_pick<float>(spans, weights, nullptr, rest, lane).item;
}

// One warp: the same from a row. A call, since it would take registers that a large kernel has not
// left.
template <typename Row>
__device__ __noinline__ int warp_draw_from_tile(const Row& row, const Pick& tile, int vocab_size,
                                                int lane) {
  __shared__ float weights[kPaddedTile];
  warp_weigh_tile(row, tile.item, vocab_size, lane, weights);
  return warp_pick_token(weights, tile, lane);
}

// One warp: the sum of weights by spans, in every lane.
__device__ __forceinline__ double warp_total(const float* weights, int count, int lane) {
  return LaneSpans<double>(weights, count, 0, lane, nullptr).total();
}

// Whether the weights of a row's tiles may be known beforehand: of logits they may.
template <typename Row>
constexpr bool kHasStats = requires(const Row& row) { row.tile_mass(0); };

// One warp: those weights.
template <typename Row>
__device__ __forceinline__ void warp_store_masses(const Row& row, int tiles, int lane,
                                                  float* masses) {
  if constexpr (kHasStats<Row>) {
    for (int tile = lane; tile < tiles; tile += kWarp) masses[tile] = row.tile_mass(tile);
  }
  __syncwarp();
}

// One warp: the first draft that is not accepted, or the end of the drafts.
template <typename Request>
__device__ __forceinline__ Decision<typename Request::Row> warp_decide(const Request& request,
                                                                       int lane) {
  const Params& a = *request.params;
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const bool is_draft = k < request.drafts;
    const int64_t id = is_draft ? request.id(k) : kPlaceholderTokenId;
    // A given uniform is read while the id is on its way, others are drawn while p and q are.
    const float given = is_draft && a.uniforms ? uniform(a, request.b, k) : 0.0f;
    const auto u = [&] { return a.uniforms ? given : uniform(a, request.b, k); };
    const bool accepted = request.accepts_draft(k, id, u);
    const unsigned stops = __ballot_sync(kAllLanes, !accepted);
    if (stops) {
      const int stop = __ffs(stops) - 1;
      return {first + stop, request.row(first + stop, __shfl_sync(kAllLanes, id, stop))};
    }
  }
}

// kInCluster does everything in one launch, and so does kAlone, one block a row. Without clusters
// kSum and kSelect are two launches with the tile sums in `workspace` [B, tiles] between them; the
// stream orders them.
enum class Step { kInCluster, kAlone, kSum, kSelect };

// Which request a block works on, and which of its blocks it is.
struct Place {
  int64_t b;
  int rank;
};

template <Step step>
__device__ __forceinline__ Place place_of(int blocks_per_row) {
  if (step == Step::kInCluster) return {cluster_index(), static_cast<int>(cluster_rank())};
  const int block = static_cast<int>(blockIdx.x);
  if (step == Step::kSum) return {block / blocks_per_row, block % blocks_per_row};
  return {blockIdx.x, 0};
}

// Where tile sums meet.
struct TileSums {
  float* sums;  // in a cluster [2][tiles] of this block's shared memory, a half for each of two
                // passes; alone [tiles] of it; else the request's [tiles] of the workspace
  uint64_t* pending;  // [2] in a cluster: what each half still waits for
};

// One thread of a cluster's block, before its cluster_start().
__device__ __forceinline__ void expect_sums(const TileSums& all, int tiles) {
  for (int pass = 0; pass < 2; ++pass) {
    expect_bytes(all.pending + pass, tiles * static_cast<int>(sizeof(float)));
  }
}

// The tiles of a row that one of its blocks goes through, a warp a tile.
struct OwnTiles {
  int first, step;  // of this warp

  __device__ __forceinline__ OwnTiles(int rank, int blocks) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    first = rank * warps + static_cast<int>(threadIdx.x) / kWarp;
    step = warps * blocks;
  }

  // Which of the block's tiles a tile is that its first warp asks for, -1 where it is another's.
  __device__ __forceinline__ int slot(int tile) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    int place = tile - first, slot = 0;
    for (; place >= step; place -= step) slot += warps;  // shorter than a division
    return place >= 0 && place < warps ? slot + place : -1;
  }
};

// What a request's outputs are, once `accepted` drafts are.
template <typename Request>
struct RequestOutput {
  const Request& request;
  int64_t accepted;

  // One warp: all but the drawn token.
  __device__ __forceinline__ void store_decision(int lane) const {
    const Params& a = *request.params;
    for (int64_t k = lane; k <= a.spec_length; k += kWarp) {
      if (k != accepted) request.store(k, k < accepted ? request.id(k) : kPlaceholderTokenId);
    }
    if (lane == 0) a.num_accepted[request.b] = static_cast<int32_t>(accepted);
  }
  __device__ __forceinline__ void store_token(int id) const { request.store(accepted, id); }
};

// Draws from a row and stores into `output`, for all threads of the blocks that share it, of which
// this one is `rank`. `row` is in shared memory. `kept`: shared memory for the padded weights of
// all tiles that this block sums, or null: then those of the tile drawn from are taken again.
template <Step step, typename Row, typename Output>
__device__ __forceinline__ void draw_token(Row& row, int vocab_size, const float& u, int rank,
                                           int blocks_per_row, const TileSums& all,
                                           const Output& output, float* kept) {
  __shared__ bool picked;
  __shared__ float weights[kPaddedTile];

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tiles = num_tiles(vocab_size);
  const OwnTiles own(rank, blocks_per_row);
  // By one warp, once it has swept: what waits for memory comes first.
  const bool stores =
      step != Step::kSum && rank == 0 && threadIdx.x / kWarp == blockDim.x / kWarp - 1;
  if (row.fixed_token >= 0) {
    if (stores) output.store_decision(lane);
    if (step != Step::kSum && rank == 0 && threadIdx.x == 0) output.store_token(row.fixed_token);
    return;
  }
  // Where the card is mostly idle a second tile need not wait for the first; else it would get in
  // the way of other warps' loads.
  const bool ahead = gridDim.x * gridDim.y <= kIdleGrid;

#pragma unroll 1  // the second pass is rare
  for (int pass = 0; pass < 2; ++pass) {
    // A row of logits is read for each tile, where it is: it would take too many registers.
    const std::conditional_t<Row::kTargetIsLogits, const Row&, const Row> here = row;
    const bool known = here.from_stats();
    float* sums = step == Step::kInCluster ? all.sums + pass * tiles : all.sums;
    const bool summed = known || (step == Step::kSelect && pass == 0);
    int tile = summed ? tiles : own.first;
    float* slot = summed ? nullptr : kept;
    if (slot) slot += warp * kPaddedTile;
    bool drawing = false;
    double rest = 0;  // the threshold in the tile to draw from
    for (;;) {
      if (tile >= tiles) {  // all sums are under way: one warp looks for the tile to draw from
        if (step == Step::kSum) return;
        if (pass == 0 && stores) output.store_decision(lane);
        if ((step != Step::kInCluster && !known) || slot) __syncthreads();
        if (warp != 0) break;
        if (known) {
          warp_store_masses(here, tiles, lane, sums);
        } else if (step == Step::kInCluster) {
          wait_for_bytes(all.pending + pass);
        }
        const Pick pick = warp_pick_tile(sums, tiles, u, lane);
        if (lane == 0) picked = known || pick.item >= 0;
        if (pick.item < 0 && (known || pass == 1) && rank == 0 && lane == 0) {
          output.store_token(0);  // p has no mass either
        }
        // The block that summed the tile still has its weights, or finds it in its own L1.
        const int mine = pick.item < 0 ? -1 : own.slot(pick.item);
        if (mine < 0) break;
        if (slot) {
          const int token = warp_pick_token(kept + mine * kPaddedTile, pick, lane);
          if (lane == 0) output.store_token(token);
          break;
        }
        drawing = true;
        rest = pick.rest;
        tile = pick.item;
      }
      if (ahead && !drawing && tile + own.step < tiles) {
        prefetch_tile(here.p, here.q, tile + own.step, vocab_size, lane);
      }
      // In one place, so that the tile drawn from finds its instructions there.
      const float sum = warp_weigh_tile(here, tile, vocab_size, lane, drawing ? weights : slot);
      if (drawing) {
        const int token = warp_pick_token(weights, {tile, rest}, lane);
        if (lane == 0) output.store_token(token);
        break;
      }
      if (step == Step::kInCluster) {
        if (lane < blocks_per_row) send_to_block(sums + tile, all.pending + pass, lane, sum);
      } else if (lane == 0) {
        sums[tile] = sum;
      }
      tile += own.step;
      if (slot) slot += blockDim.x / kWarp * kPaddedTile;
    }
    __syncthreads();
    if (picked) return;
    if (threadIdx.x == 0) row = row.target();  // the residual has no weight: draw from p
    __syncthreads();
  }
}

// The body of a kernel whose grid has blocks_per_row blocks a request, of which this one is `rank`.
// In a cluster expect_sums() and, by every thread, cluster_start() have been called before.
template <Step step, typename Request>
__device__ __forceinline__ void sample_request(const Request& request, int rank, int blocks_per_row,
                                               const TileSums& all) {
  using Row = typename Request::Row;
  __shared__ Decision<Row> decision;
  __shared__ float recovery_uniform;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (warp == warps - 1) {
    const float u = uniform(a, request.b, a.spec_length);
    if (lane == 0) recovery_uniform = u;
  }
  if (warp == 0) {
    const Decision<Row> decided = warp_decide(request, lane);
    if (lane == 0) decision = decided;
  }
  __syncthreads();
  // No block writes into another's shared memory before that block has started. Not later than
  // this: the wait empties the L1 cache, where the tile drawn from is to be found.
  if (step == Step::kInCluster) cluster_wait();
  draw_token<step>(decision.row, static_cast<int>(a.vocab_size), recovery_uniform, rank,
                   blocks_per_row, all, RequestOutput<Request>{request, decision.accepted},
                   nullptr);
}

// One warp: the reach of every prefix, and the number of drafts. Lanes gather, all walk.
template <typename Request>
__device__ __forceinline__ int64_t warp_reach(const Request& request, double* reach, int lane) {
  double last = 1.0;
  if (lane == 0) reach[0] = last;
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const int64_t id = k < request.drafts ? request.id(k) : kPlaceholderTokenId;
    const Odds odds = request.odds(k, id);
    const unsigned ends = __ballot_sync(kAllLanes, id == kPlaceholderTokenId);
    const int count = ends ? __ffs(ends) - 1 : kWarp;
    for (int i = 0; i < count; ++i) {
      const Odds here{__shfl_sync(kAllLanes, odds.p, i), __shfl_sync(kAllLanes, odds.q, i)};
      last = here.step(last);
      if (lane == 0) reach[first + i + 1] = last;
    }
    if (ends) return first + count;
  }
}

// sample_request for block verification, decide_block's tests: the rows of ever shorter prefixes
// are swept until a test passes; the token is drawn from the sums that passed it. `reach` is room
// for K + 1 numbers. Not split over launches: without clusters it runs as kSelect, one block a
// request.
template <Step step, typename Request>
__device__ __forceinline__ void sample_block(const Request& request, int rank, int blocks_per_row,
                                             float* all_sums, double* reach) {
  using Row = ReachRow<typename Request::Row>;
  __shared__ Row shared_row;
  __shared__ int64_t prefix;
  __shared__ bool tested;  // the row's prefix is accepted whatever the sums are
  __shared__ bool done, from_target;
  __shared__ float recovery_uniform;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = request.b;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  const OwnTiles own(rank, blocks_per_row);

  // The longest prefix not longer than `k` that can be accepted, and its residual.
  const auto attempt = [&](int64_t k) {
    while (!(reach[k] > 0.0)) --k;  // the empty prefix has reach 1
    prefix = k;
    tested = k == 0 || !(reach[k] < 1.0);
    shared_row = {request.row(k, request.id(k)), reach[k]};
  };
  if (warp == 0) {
    const int64_t drafts = warp_reach(request, reach, lane);
    __syncwarp();
    if (lane == 0) {
      recovery_uniform = uniform(a, b, a.spec_length);
      from_target = false;
      if (drafts == 0 || uniform(a, b, drafts - 1) < reach[drafts]) {
        prefix = drafts;
        tested = true;
        shared_row = {request.row(drafts, kPlaceholderTokenId), 1.0};
      } else {
        attempt(drafts - 1);
      }
    }
  }
  __syncthreads();
  if (step == Step::kInCluster) cluster_wait();

  for (int pass = 0;; ++pass) {
    // `shared_row` is read anew where it is used: kept over the sweep it would take registers that
    // the sweep wants.
    float* sums = step == Step::kInCluster ? all_sums + (pass & 1) * tiles : all_sums;
    const bool swept = shared_row.fixed_token < 0 && !shared_row.from_stats();
    if (swept) {
      const Row row = shared_row;
      for (int tile = own.first; tile < tiles; tile += own.step) {
        const float sum = warp_weigh_tile(row, tile, vocab_size, lane, nullptr);
        if (step == Step::kInCluster) {
          if (lane < blocks_per_row) store_to_block(sums + tile, lane, sum);
        } else if (lane == 0) {
          sums[tile] = sum;
        }
      }
    }
    if (step == Step::kInCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if (warp == 0) {
      const Row row = shared_row;
      const bool at_target = from_target, known = row.from_stats();
      const double total = swept ? warp_total(sums, tiles, lane) : 0.0;
      const int64_t k = prefix;
      const bool passes = tested || uniform(a, b, k - 1) < share_of(total, reach[k]);
      __syncwarp();
      int token = row.fixed_token;
      bool mine = rank == 0 && passes;
      if (token < 0 && passes) {
        if (known) warp_store_masses(row, tiles, lane, sums);
        const Pick tile = warp_pick_tile(sums, tiles, recovery_uniform, lane);
        if (tile.item >= 0) {
          mine = own.slot(tile.item) >= 0;
          if (mine) token = warp_draw_from_tile(shared_row, tile, vocab_size, lane);
        } else if (known || at_target) {
          token = 0;  // p has no mass either
        } else {
          mine = false;
        }
      }
      __syncwarp();
      if (lane == 0) {
        const bool has_weight = !swept || total > 0.0 || at_target;
        done = passes && has_weight;
        if (mine && done) request.store(k, token);
        if (!passes) {
          attempt(k - 1);
        } else if (!done) {  // accepted, but the residual has no weight: draw from p
          shared_row = shared_row.target();
        }
        from_target = passes;
      }
    }
    __syncthreads();
    if (done) break;
  }
  if (rank == 0) {
    for (int64_t k = threadIdx.x; k <= a.spec_length; k += blockDim.x) {
      if (k != prefix) request.store(k, k < prefix ? request.id(k) : kPlaceholderTokenId);
    }
    if (threadIdx.x == 0) a.num_accepted[b] = static_cast<int32_t>(prefix);
  }
}

}  // namespace
}  // namespace fused_rejection
