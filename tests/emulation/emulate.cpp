// The kernels of fused_rejection_kernel.cu as a library for ctypes.
#define FR_EMULATION
#include "../../src/cuda/csrc/from_logits_kernel.cu"
#include "../../src/cuda/csrc/fused_rejection_kernel.cu"

namespace fused_rejection {
namespace {

// TileSums in a cluster, in floats.
size_t exchange_floats(int64_t tiles) { return 2 * (tiles + sizeof(uint64_t) / sizeof(float)); }

template <typename T>
void run(const Params& a, int kernel, int blocks_per_row, unsigned seed) {
  const int64_t tiles = num_tiles(a.vocab_size);
  const int threads = static_cast<int>(std::clamp<int64_t>(tiles, 2, kMaxWarps)) * kWarp;
  const int rows = static_cast<int>(a.batch_size), blocks = rows * blocks_per_row;
  const size_t reach = (a.spec_length + 1) * sizeof(double) / sizeof(float);
  if (a.block_verification && kernel == 1) {
    const auto body = [&] { block_kernel<T, Step::kInCluster>(a, blocks_per_row, nullptr); };
    emulation::launch(blocks, threads, blocks_per_row, reach + exchange_floats(tiles), body, seed);
  } else if (a.block_verification) {
    std::vector<float> workspace(rows * tiles, NAN);
    const auto body = [&] { block_kernel<T, Step::kSelect>(a, 1, workspace.data()); };
    emulation::launch(rows, threads, 1, reach, body, seed);
  } else if (kernel == 0) {
    emulation::launch((rows + 31) / 32, 32, 1, 0, [&] { thread_per_row_kernel<T>(a); }, seed);
  } else if (blocks_per_row == 1) {  // as launch_fused chooses
    const auto body = [&] { fused_kernel<T, Step::kAlone>(a, 1, nullptr); };
    emulation::launch(rows, threads, 1, exchange_floats(tiles), body, seed);
  } else if (kernel == 1) {
    const auto body = [&] { fused_kernel<T, Step::kInCluster>(a, blocks_per_row, nullptr); };
    emulation::launch(blocks, threads, blocks_per_row, exchange_floats(tiles), body, seed);
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
      by_warp[tile] =
          warp_weigh_tile(row, static_cast<int>(tile), static_cast<int>(vocab_size), lane, nullptr);
    }
  };
  try {
    emulation::launch(1, kWarp, 1, 0, sum, 0);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

namespace fused_rejection {
namespace {

template <typename T>
void run_logits(const LogitsParams& a, int kernel, int n, bool early_exit, unsigned seed) {
  const int64_t targets = num_target_rows(a.base), rows = targets + num_draft_rows(a);
  const int64_t batch_size = a.base.batch_size;
  const int tiles = num_tiles(a.base.vocab_size), warps = std::clamp(tiles, 2, kMaxWarps);
  const int threads = warps * kWarp;
  const bool block = a.base.block_verification;
  // As launch_from_logits chooses.
  if (kernel == 1 && !block) {
    std::vector<int32_t> tokens(targets, 0);  // a token, where nothing is left
    std::vector<LogitsRow<T>> drawn_from(targets);
    std::vector<TileStats> kept_stats(rows * tiles, TileStats{NAN, NAN});
    std::vector<uint8_t> verdicts(targets, kGoesOn);
    std::vector<unsigned> arrived(targets);
    const bool keeps = seed % 2 == 0;
    Findings<T> findings = {};
    if (a.base.spec_length > 0) {
      if (early_exit) findings.verdicts = verdicts.data();
      if (early_exit && !a.filters()) {
        findings.rows = drawn_from.data();
        findings.stats = kept_stats.data();
        findings.arrived = arrived.data();
      } else {
        findings.tokens = tokens.data();
      }
    }
    const int kept = keeps && !a.filters() ? (tiles + warps * n - 1) / (warps * n) * warps : 0;
    const auto decide = [&] {
      a.filters() ? positions_kernel<T, true>(a, n, early_exit, keeps, findings)
                  : positions_kernel<T, false>(a, n, early_exit, keeps, findings);
    };
    const size_t shared = PositionShared::bytes(tiles, a.filters(), kept) / sizeof(float);
    const int positions = static_cast<int>(a.base.spec_length) + 1;
    if (early_exit && n != 2 && may_walk(a)) {
      const auto walk = [&] { walk_kernel<T>(a, n); };
      emulation::launch(static_cast<int>(batch_size) * n, threads, n, shared, walk, seed);
      return;
    }
    // n stands for how many tiles a warp of decide_kernel has too. Both kernels leave the same.
    if (early_exit && n != 2 && !a.filters() && a.base.spec_length > 0) {
      const int of_block = kDecidingWarps * n, shares = (tiles + of_block - 1) / of_block;
      const int kinds = num_draft_rows(a) > 0 ? 2 : 1;
      const auto body = [&] { decide_kernel<T>(a, shares, n, findings); };
      emulation::launch(kinds * shares, kDecidingWarps * kWarp, 1, 0, body, seed,
                        static_cast<int>(batch_size), positions);
    } else {
      emulation::launch(static_cast<int>(batch_size) * n, threads, n, shared, decide, seed,
                        positions);
    }
    if (a.base.spec_length == 0) return;
    if (early_exit && !a.filters()) {
      const auto draw = [&] { draw_kernel<T>(a, n, findings); };
      emulation::launch(static_cast<int>(batch_size) * n, threads, n, exchange_floats(tiles), draw,
                        seed);
      return;
    }
    const int blocks = static_cast<int>(batch_size + 1) / 2;
    const auto finish = [&] { finish_kernel(a, tokens.data()); };
    emulation::launch(blocks, 2 * kWarp, 1, 0, finish, seed);
    return;
  }
  std::vector<TileStats> stats(rows * tiles, TileStats{NAN, NAN});
  std::vector<Kept> kept(rows, Kept{NAN, NAN, NAN});
  std::vector<float> sums(batch_size * tiles, NAN);
  const Kept* found = nullptr;
  const auto pass = [&] { tile_stats_kernel<T>(a, rows, found, stats.data()); };
  const int pass_blocks = static_cast<int>(rows) * ((tiles + warps - 1) / warps);
  emulation::launch(pass_blocks, threads, 1, 0, pass, seed);
  if (a.filters()) {
    const auto search = [&] { threshold_kernel<T>(a, stats.data(), kept.data()); };
    emulation::launch(static_cast<int>(rows), threads, 1, sizeof(Search) / sizeof(float), search,
                      seed);
    found = kept.data();
    emulation::launch(pass_blocks, threads, 1, 0, pass, seed);
  }
  const int blocks = static_cast<int>(batch_size) * n;
  size_t table = (2 * a.base.spec_length + 1) * sizeof(RowSummary) / sizeof(float);
  if (block) table += (a.base.spec_length + 1) * sizeof(double) / sizeof(float);
  const TileStats* known = stats.data();
  if (kernel == 1) {
    const auto body = [&] {
      logits_kernel<T, Step::kInCluster, true>(a, n, known, found, nullptr);
    };
    emulation::launch(blocks, threads, n, exchange_floats(tiles) + table, body, seed);
    return;
  }
  const auto sum = [&] { logits_kernel<T, Step::kSum, false>(a, n, known, found, sums.data()); };
  if (!block) emulation::launch(blocks, threads, 1, table, sum, seed);
  const auto select = [&] {
    block ? logits_kernel<T, Step::kSelect, true>(a, 1, known, found, sums.data())
          : logits_kernel<T, Step::kSelect, false>(a, 1, known, found, sums.data());
  };
  emulation::launch(static_cast<int>(batch_size), threads, 1, table, select, seed);
}

}  // namespace
}  // namespace fused_rejection

// The sum of a tile of which `count` places have weights, and the others 0.
extern "C" int emulate_sum_of_leaves(const float* weights, const int* places, int count,
                                     float* sum) {
  using namespace fused_rejection;
  std::vector<float> tile(kTile, 0.0f);
  const auto body = [&] {
    const int lane = static_cast<int>(threadIdx.x), own = lane < count ? lane : 0;
    const float found = warp_sum_of_leaves(tile.data(), lane < count, places[own], weights[own]);
    if (lane == 0) *sum = found;
  };
  try {
    emulation::launch(1, kWarp, 1, 0, body, 0);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// `early_exit`: of positions_kernel.
extern "C" int emulate_from_logits(const fused_rejection::LogitsParams* params, int kernel,
                                   int blocks, int early_exit, unsigned seed) {
  using namespace fused_rejection;
  try {
    switch (params->base.dtype) {
      case Dtype::kFloat32:
        run_logits<float>(*params, kernel, blocks, early_exit != 0, seed);
        break;
      case Dtype::kBFloat16:
        run_logits<BFloat16>(*params, kernel, blocks, early_exit != 0, seed);
        break;
      case Dtype::kFloat16:
        run_logits<Float16>(*params, kernel, blocks, early_exit != 0, seed);
        break;
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
