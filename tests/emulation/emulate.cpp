// The kernels of fused_rejection_kernel.cu as a library for ctypes.
#define FR_EMULATION
#include "../../src/cuda/csrc/fused_rejection_kernel.cu"

namespace fused_rejection {
namespace {

template <typename T>
void run(const Params& a, int kernel, int blocks_per_row, unsigned seed) {
  const int64_t tiles = num_tiles(a.vocab_size);
  const int threads = static_cast<int>(std::min<int64_t>(tiles, kMaxWarps)) * kWarp;
  const int rows = static_cast<int>(a.batch_size), blocks = rows * blocks_per_row;
  if (kernel == 0) {
    emulation::launch((rows + 31) / 32, 32, 1, 0, [&] { thread_per_row_kernel<T>(a); }, seed);
  } else if (kernel == 1) {
    const auto body = [&] { fused_kernel<T, Step::kInCluster>(a, blocks_per_row, nullptr); };
    emulation::launch(blocks, threads, blocks_per_row, 2 * tiles, body, seed);
  } else {
    std::vector<float> workspace(rows * tiles, NAN);
    const auto sum = [&] { fused_kernel<T, Step::kSum>(a, blocks_per_row, workspace.data()); };
    emulation::launch(blocks, threads, 1, 0, sum, seed);
    const auto select = [&] { fused_kernel<T, Step::kSelect>(a, 1, workspace.data()); };
    emulation::launch(rows, threads, 1, 0, select, seed);
  }
}

}  // namespace
}  // namespace fused_rejection

// kernel: 0 thread per row, 1 clusters, 2 workspace. Returns 0, or 1 where the kernel does not end.
extern "C" int emulate(const fused_rejection::Params* params, int kernel, int blocks_per_row,
                       unsigned seed) {
  using namespace fused_rejection;
  try {
    switch (params->dtype) {
      case Dtype::kFloat32:
        run<float>(*params, kernel, blocks_per_row, seed);
        break;
      case Dtype::kBFloat16:
        run<BFloat16>(*params, kernel, blocks_per_row, seed);
        break;
      case Dtype::kFloat16:
        run<Float16>(*params, kernel, blocks_per_row, seed);
        break;
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// Tile sums of one float32 row of p less q: [tiles] by the serial sum, [tiles] by a warp's.
extern "C" int emulate_tile_sums(const float* p, const float* q, int64_t vocab_size, float* serial,
                                 float* by_warp) {
  using namespace fused_rejection;
  const ProbsRow<float> row{p, q, -1};
  const int64_t tiles = num_tiles(vocab_size);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    serial[tile] = tile_sum([&](int m) {
      const int64_t i = tile * kTile + m;
      return i < vocab_size ? weight_at(row, i) : 0.0f;
    });
  }
  const auto sum = [&] {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int lane = static_cast<int>(threadIdx.x);
      by_warp[tile] = warp_tile_sum(row, tile, vocab_size, aligned(row.p, row.q), lane);
    }
  };
  try {
    emulation::launch(1, kWarp, 1, 0, sum, 0);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
