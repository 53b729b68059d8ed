// Enough of CUDA to run fused_rejection_kernel.cu on a CPU: a block is an OS thread, its threads
// are fibers in random order, and blocks of a cluster run at the same time. Slow, and only for
// tests.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define FR_DYNAMIC_SHARED(type, name) type* name = ::emulation::dynamic_shared<type>()
#define threadIdx (::emulation::fiber().thread)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().size)
#define gridDim (::emulation::block().grid)

namespace emulation {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Rendezvous {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
  void wait();
};

struct Warp {
  Rendezvous meet;
  unsigned char slots[2][32][8];
};

struct Fiber {
  ucontext_t context;  // to start it; from then on jumps, which make no system call
  jmp_buf here;
  bool started = false;
  Dim thread;
  int lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  uint64_t cluster_generation = 0;
};

struct Cluster {
  int threads = 0;  // of all blocks
  std::atomic<int> arrived{0};
  std::atomic<uint64_t> generation{0};
  std::atomic<bool> failed{false};
  std::vector<std::vector<float>> shared;  // of each block
};

struct Block {
  Dim index, size, grid;
  int rank = 0;
  Cluster* cluster = nullptr;
  Rendezvous meet;
  int line = 0;  // where its threads meet
  const char* file = "";
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  Fiber* current = nullptr;
};

inline thread_local Block* current_block = nullptr;
inline Block& block() { return *current_block; }
inline Fiber& fiber() { return *block().current; }

inline void yield() {
  if (_setjmp(fiber().here) == 0) _longjmp(block().scheduler, 1);
}

// Runs a fiber until it yields or is done. A frame of its own: a jump back leaves a frame's locals
// unknown.
__attribute__((noinline)) inline void resume(Block& b, Fiber* f) {
  b.current = f;
  if (_setjmp(b.scheduler) != 0) return;
  if (f->started) _longjmp(f->here, 1);
  f->started = true;
  setcontext(&f->context);
}

inline void Rendezvous::wait() {
  const uint64_t mine = generation;
  if (++arrived == size) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) yield();
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block().cluster->shared[block().rank].data());
}

template <typename T>
T from_lane(T value, int source) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = *fiber().warp;
  // The other slots are written only once every lane has left this exchange.
  auto& slots = warp.slots[warp.meet.generation & 1];
  std::memcpy(slots[fiber().lane], &value, sizeof(T));
  warp.meet.wait();
  std::memcpy(&value, slots[source], sizeof(T));
  return value;
}

inline void run_block(Block& b, const std::function<void()>& kernel, unsigned seed) {
  static thread_local const std::function<void()>* body;
  body = &kernel;
  current_block = &b;
  constexpr size_t stack_bytes = 128 * 1024;
  std::vector<std::unique_ptr<char[]>> stacks;
  const int threads = static_cast<int>(b.size.x);
  b.meet.size = threads;
  b.warps.resize(threads / 32);
  b.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    f.thread.x = static_cast<unsigned>(t);
    f.lane = t % 32;
    f.warp = &b.warps[t / 32];
    f.warp->meet.size = 32;
    stacks.emplace_back(new char[stack_bytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.back().get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(
        &f.context,
        +[] {
          (*body)();
          fiber().done = true;
          _longjmp(block().scheduler, 1);
        },
        0);
  }
  std::vector<Fiber*> order;
  for (Fiber& f : b.fibers) order.push_back(&f);
  std::mt19937 shuffle(seed);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), shuffle);
    for (Fiber* f : order) resume(b, f);
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }),
                order.end());
    if (b.cluster->failed || std::chrono::steady_clock::now() > deadline) {
      b.cluster->failed = true;  // a deadlock: some thread left a barrier or a shuffle out
      return;
    }
    std::this_thread::yield();
  }
}

// Runs `kernel` in every thread of a grid of `rows` times `blocks` blocks, in clusters, one cluster
// after the other. `shared_floats` of dynamic shared memory a block start as NaN.
inline void launch(int blocks, int threads, int cluster_size, size_t shared_floats,
                   const std::function<void()>& kernel, unsigned seed, int rows = 1,
                   int layers = 1) {
  for (int first = 0; first < layers * rows * blocks; first += cluster_size) {
    Cluster cluster;
    cluster.threads = threads * cluster_size;
    cluster.shared.assign(
        cluster_size, std::vector<float>(shared_floats, std::numeric_limits<float>::quiet_NaN()));
    std::vector<Block> running(cluster_size);
    std::vector<std::thread> workers;
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block& b = running[rank];
      b.index.x = static_cast<unsigned>((first + rank) % blocks);
      b.index.y = static_cast<unsigned>((first + rank) / blocks % rows);
      b.index.z = static_cast<unsigned>((first + rank) / blocks / rows);
      b.size.x = static_cast<unsigned>(threads);
      b.grid.x = static_cast<unsigned>(blocks);
      b.grid.y = static_cast<unsigned>(rows);
      b.grid.z = static_cast<unsigned>(layers);
      b.rank = rank;
      b.cluster = &cluster;
      workers.emplace_back([&b, &kernel, seed] {
        run_block(b, kernel, seed + b.index.x + 977 * b.index.y + 7919 * b.index.z);
      });
    }
    for (std::thread& worker : workers) worker.join();
    if (cluster.failed) throw std::runtime_error("the emulated kernel does not end");
  }
}

}  // namespace emulation

inline void __syncwarp() { emulation::fiber().warp->meet.wait(); }
// All threads of a block have to wait at the same place.
inline void __syncthreads(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulation::Block& block = emulation::block();
  if (block.meet.arrived == 0) {
    block.line = line;
    block.file = file;
  } else if (block.line != line || std::strcmp(block.file, file) != 0) {
    std::fprintf(stderr, "threads wait at %s:%d and at %s:%d\n", block.file, block.line, file,
                 line);
    block.cluster->failed = true;
  }
  block.meet.wait();
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::from_lane(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulation::from_lane(value, emulation::fiber().lane ^ distance);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = emulation::fiber().lane;
  return emulation::from_lane(value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  // Lane 0 gathers what the others posted, and all read its word.
  emulation::Warp& warp = *emulation::fiber().warp;
  auto& slots = warp.slots[warp.meet.generation & 1];
  slots[emulation::fiber().lane][0] = predicate;
  warp.meet.wait();
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(slots[lane][0]) << lane;
  return bits;
}
inline bool __any_sync(unsigned all, bool predicate) { return __ballot_sync(all, predicate) != 0; }
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;  // the threads that share an address take turns
  return old;
}
template <typename T>
void atomicMin(T* address, T value) {
  *address = std::min(*address, value);
}
template <typename T>
void atomicMax(T* address, T value) {
  *address = std::max(*address, value);
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  for (int d = 1; d < 32; d *= 2) value = std::max(value, __shfl_xor_sync(0, value, d));
  return value;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  for (int d = 1; d < 32; d *= 2) value += __shfl_xor_sync(0, value, d);
  return value;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  for (int d = 1; d < 32; d *= 2) value = std::min(value, __shfl_xor_sync(0, value, d));
  return value;
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  for (int d = 1; d < 32; d *= 2) value |= __shfl_xor_sync(0, value, d);
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace fused_rejection {
namespace {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(fraction, -24)
                                : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

inline unsigned add_released(unsigned* counter, unsigned value) {
  return atomicAdd(counter, value);
}
inline void acquire() {}
inline unsigned cluster_rank() { return emulation::block().rank; }
inline unsigned cluster_index() {
  return emulation::block().index.x / emulation::block().cluster->shared.size();
}
inline unsigned grid_row() { return emulation::block().index.y; }
inline void cluster_arrive() {
  emulation::Cluster& cluster = *emulation::block().cluster;
  emulation::fiber().cluster_generation = cluster.generation;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.generation;
  }
}
inline void cluster_start() { cluster_arrive(); }
inline void cluster_wait() {
  emulation::Cluster& cluster = *emulation::block().cluster;
  while (cluster.generation == emulation::fiber().cluster_generation) emulation::yield();
}
template <typename V>
void store_to_block(V* shared, int rank, V value) {
  auto& all = emulation::block().cluster->shared;
  const auto offset = reinterpret_cast<float*>(shared) - all[emulation::block().rank].data();
  std::memcpy(&all[rank].at(offset), &value, sizeof value);
}

// A count of bytes, as an mbarrier has it: the announcements that a phase lacks and those that it
// is to have, its parity, and the bytes that are still to come. A value counts only once it is
// stored, which happens in the order that threads are given turns.
struct ByteCount {
  static constexpr int kBytes = 17;
  static uint64_t word(int lacking, int count) {
    return static_cast<uint64_t>(lacking) | static_cast<uint64_t>(count) << 8;
  }
  static void add(uint64_t* pending, int rank, int announcements, int bytes) {
    auto& all = emulation::block().cluster->shared;
    const auto offset = reinterpret_cast<float*>(pending) - all[emulation::block().rank].data();
    std::atomic_ref there(*reinterpret_cast<uint64_t*>(&all[rank].at(offset)));
    uint64_t old = there, next;
    do {
      const int count = old >> 8 & 0xFF, lacking = static_cast<int>(old & 0xFF) - announcements;
      const int64_t left = (static_cast<int64_t>(old) >> kBytes) + bytes;
      const uint64_t parity = old >> 16 & 1;
      next = lacking == 0 && left == 0
                 ? word(count, count) | (parity ^ 1) << 16
                 : word(lacking, count) | parity << 16 | static_cast<uint64_t>(left) << kBytes;
    } while (!there.compare_exchange_weak(old, next));
  }
};
inline void expect_announcements(uint64_t* pending, int blocks) {
  *pending = ByteCount::word(blocks, blocks);
}
inline void expect_bytes(uint64_t* pending, int bytes) {
  *pending = ByteCount::word(0, 1) | static_cast<uint64_t>(bytes) << ByteCount::kBytes;
}
inline void expect_more(uint64_t* pending, int bytes) {
  ByteCount::add(pending, emulation::block().rank, 1, bytes);
}
inline void announce(uint64_t* pending, int rank, int bytes) {
  ByteCount::add(pending, rank, 1, bytes);
}
template <typename V>
void send_to_block(V* shared, uint64_t* pending, int rank, V value) {
  store_to_block(shared, rank, value);
  ByteCount::add(pending, rank, 0, -static_cast<int>(sizeof value));
}
struct uint4 {
  uint32_t x, y, z, w;
};
inline void send_words_to_block(uint4* shared, uint64_t* pending, int rank, const uint4& words) {
  send_to_block(shared, pending, rank, words);
}
inline void send_pair_to_block(float* shared, uint64_t* pending, int rank, float first,
                               float second) {
  send_to_block(shared, pending, rank, first);
  send_to_block(shared + 1, pending, rank, second);
}
inline void wait_for_bytes(uint64_t* pending, int parity = 0) {
  while (static_cast<int>(std::atomic_ref(*pending) >> 16 & 1) == parity) emulation::yield();
}
inline void allow_next_launch() {}
inline void wait_for_launch_before() {}
inline void prefetch_line(const void*) {}

// The counter of cuRAND's Philox state; the words are this project's. That they are cuRAND's own is
// tested against its headers, and on the GPU.
struct curandStatePhilox4_32_10_t {
  uint64_t seed, subsequence, position;
};
inline void curand_init(uint64_t seed, uint64_t subsequence, uint64_t position,
                        curandStatePhilox4_32_10_t* state) {
  *state = {seed, subsequence, position};
}
inline uint32_t curand(curandStatePhilox4_32_10_t* state) {
  return philox_word(state->seed, state->subsequence, state->position++);
}

}  // namespace
}  // namespace fused_rejection
