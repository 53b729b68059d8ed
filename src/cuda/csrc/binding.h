// What the operators' bindings share: checked arguments, the CPU kernel, the way to a CUDA launch.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <forward_list>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "fused_rejection.h"

#ifdef WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_rejection {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using Output = std::tuple<at::Tensor, at::Tensor>;
using OutputReference = std::tuple<const at::Tensor&, const at::Tensor&>;

// src/contract.py has the sentences; these guard the memory when it is not called first.
inline void check(bool ok, const char* argument) {
  TORCH_CHECK_VALUE(ok, argument, " does not fit the other arguments; see src/contract.py");
}

inline const at::Tensor* address(const OptionalTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Tensors at addresses that a move keeps. It cannot be copied: the copy's addresses would differ.
struct Tensors : std::forward_list<at::Tensor> {
  Tensors() = default;
  Tensors(Tensors&&) = default;
};

// The padded layout, or the flattened ragged one where draft_ends is given. The caller's tensors
// are borrowed, null where there is none: a reference of our own would be an atomic operation and,
// where Python has the only other one, with newer PyTorch a wait for the GIL.
struct Arguments {
  const at::Tensor* ids;
  const at::Tensor* draft_probs = nullptr;
  const at::Tensor* target_probs;
  const at::Tensor* num_draft_tokens = nullptr;
  const at::Tensor* draft_ends = nullptr;
  const at::Tensor* bonus_probs = nullptr;
  const at::Tensor* uniforms;
  const at::Tensor* seeds;
  const at::Tensor* offsets;
  const OptionalGenerator& generator;
  int64_t batch_size, spec_length;
  bool block_verification = false;
  Tensors made = {};  // what the pointers point at where it is not the caller's

  at::Device device() const { return target_probs->device(); }
  at::ScalarType dtype() const { return target_probs->scalar_type(); }
  int64_t vocab_size() const { return target_probs->size(-1); }

  // Checks what is the same in every layout, and makes the small tensors contiguous.
  void check_common(at::IntArrayRef uniforms_shape) {
    check(ids->device() == device() &&
              (ids->scalar_type() == at::kLong || ids->scalar_type() == at::kInt),
          "draft_token_ids");
    check((dtype() == at::kFloat || dtype() == at::kBFloat16 || dtype() == at::kHalf) &&
              vocab_size() > 0 && vocab_size() <= kMaxVocabSize && is_readable(*target_probs),
          "target_probs");
    for (const auto& [probs, name] :
         {std::pair(draft_probs, "draft_probs"), std::pair(bonus_probs, "bonus_probs")}) {
      check(!probs || (probs->scalar_type() == dtype() && probs->device() == device() &&
                       is_readable(*probs)),
            name);
    }
    check((seeds != nullptr) == (offsets != nullptr), "seeds");
    check((uniforms != nullptr) + (seeds != nullptr) + generator.has_value() <= 1, "generator");
    make_contiguous(ids);
    make_rows(num_draft_tokens, at::kInt, "num_draft_tokens");
    make_rows(draft_ends, at::kInt, "cu_num_draft_tokens");
    make_rows(seeds, at::kLong, "seeds");
    make_rows(offsets, at::kLong, "offsets");
    make_shape(uniforms, uniforms_shape, at::kFloat, "uniforms");
  }

  // Checks a [B] argument and makes it contiguous.
  void make_rows(const at::Tensor*& tensor, at::ScalarType wanted, const char* name) {
    make_shape(tensor, {batch_size}, wanted, name);
  }

  // The same for another shape.
  void make_shape(const at::Tensor*& tensor, at::IntArrayRef shape, at::ScalarType wanted,
                  const char* name) {
    if (!tensor) return;
    check(
        tensor->sizes() == shape && tensor->scalar_type() == wanted && tensor->device() == device(),
        name);
    make_contiguous(tensor);
  }

 private:
  void make_contiguous(const at::Tensor*& tensor) {
    if (!tensor->is_contiguous()) tensor = &made.emplace_front(tensor->contiguous());
  }

  static bool is_readable(const at::Tensor& probs) {
    return probs.size(-1) == 1 || probs.numel() == 0 || probs.stride(-1) == 1;
  }
};

inline Arguments padded(const at::Tensor& ids, const OptionalTensor& draft_probs,
                        const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                        const OptionalTensor& uniforms, const OptionalTensor& seeds,
                        const OptionalTensor& offsets, const OptionalGenerator& generator) {
  check(ids.dim() == 2, "draft_token_ids");
  const int64_t batch_size = ids.size(0), spec_length = ids.size(1);
  check(target_probs.dim() == 3 && target_probs.size(0) == batch_size &&
            target_probs.size(1) == spec_length + 1,
        "target_probs");
  check(!draft_probs || draft_probs->sizes() ==
                            at::IntArrayRef({batch_size, spec_length, target_probs.size(2)}),
        "draft_probs");
  Arguments a{.ids = &ids,
              .draft_probs = address(draft_probs),
              .target_probs = &target_probs,
              .num_draft_tokens = address(num_draft_tokens),
              .uniforms = address(uniforms),
              .seeds = address(seeds),
              .offsets = address(offsets),
              .generator = generator,
              .batch_size = batch_size,
              .spec_length = spec_length};
  a.check_common({a.batch_size, a.spec_length + 1});
  return a;
}

inline Arguments flattened(const at::Tensor& ids, const at::Tensor& draft_ends,
                           const OptionalTensor& draft_probs, const at::Tensor& target_probs,
                           const at::Tensor& bonus_probs, int64_t max_spec_length,
                           const OptionalTensor& uniforms, const OptionalTensor& seeds,
                           const OptionalTensor& offsets, const OptionalGenerator& generator) {
  check(ids.dim() == 1, "draft_token_ids");
  check(draft_ends.dim() == 1, "cu_num_draft_tokens");
  check(max_spec_length >= 0, "max_spec_length");
  const int64_t batch_size = draft_ends.size(0), total = ids.size(0);
  check(target_probs.dim() == 2 && target_probs.size(0) == total, "target_probs");
  check(!draft_probs || draft_probs->sizes() == target_probs.sizes(), "draft_probs");
  check(bonus_probs.sizes() == at::IntArrayRef({batch_size, target_probs.size(1)}), "bonus_probs");
  Arguments a{.ids = &ids,
              .draft_probs = address(draft_probs),
              .target_probs = &target_probs,
              .draft_ends = &draft_ends,
              .bonus_probs = &bonus_probs,
              .uniforms = address(uniforms),
              .seeds = address(seeds),
              .offsets = address(offsets),
              .generator = generator,
              .batch_size = batch_size,
              .spec_length = max_spec_length};
  a.check_common({a.batch_size, a.spec_length + 1});
  return a;
}

// Makes a CUDA device the current one.
struct OnDevice {
#ifdef WITH_CUDA
  c10::cuda::OptionalCUDAGuard guard;
  explicit OnDevice(at::Device device) {
    if (device.is_cuda()) guard.set_device(device);
  }
#else
  explicit OnDevice(at::Device) {}
#endif
};

// What at::empty reaches through the dispatcher, which costs up to a microsecond a tensor. A CUDA
// device is the current one already.
inline at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, at::Device device) {
#ifdef WITH_CUDA
  if (device.is_cuda()) {
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
    return at::Tensor(at::detail::empty_generic(size, c10::cuda::CUDACachingAllocator::get(), keys,
                                                dtype, std::nullopt));
  }
#endif
  check(device.is_cpu(), "target_probs");
  return at::Tensor(at::detail::empty_cpu(size, dtype));
}

inline Output allocate(const Arguments& a) {
  const OnDevice on_device(a.device());
  return {empty({a.batch_size, a.spec_length + 1}, a.ids->scalar_type(), a.device()),
          empty({a.batch_size}, at::kInt, a.device())};
}

inline void check_output(const Arguments& a, const OutputReference& output) {
  const auto& [token_ids, num_accepted] = output;
  check(token_ids.sizes() == at::IntArrayRef({a.batch_size, a.spec_length + 1}) &&
            token_ids.scalar_type() == a.ids->scalar_type() && token_ids.device() == a.device() &&
            token_ids.is_contiguous() && num_accepted.sizes() == at::IntArrayRef({a.batch_size}) &&
            num_accepted.scalar_type() == at::kInt && num_accepted.device() == a.device() &&
            num_accepted.is_contiguous(),
        "out");
}

template <typename T>
const T* pointer(const at::Tensor* tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline Params params_of(const Arguments& a, const OutputReference& output) {
  Params p = {};
  p.batch_size = a.batch_size;
  p.spec_length = a.spec_length;
  p.vocab_size = a.vocab_size();
  p.dtype = a.dtype() == at::kFloat      ? Dtype::kFloat32
            : a.dtype() == at::kBFloat16 ? Dtype::kBFloat16
                                         : Dtype::kFloat16;
  p.ids_are_int64 = a.ids->scalar_type() == at::kLong;
  p.draft_token_ids = a.ids->const_data_ptr();
  p.target_probs = a.target_probs->const_data_ptr();
  p.target_position_stride = a.target_probs->stride(-2);
  if (a.draft_probs) {
    p.draft_probs = a.draft_probs->const_data_ptr();
    p.draft_position_stride = a.draft_probs->stride(-2);
  }
  if (a.draft_ends) {
    p.draft_ends = a.draft_ends->const_data_ptr<int32_t>();
    p.num_flat = a.ids->size(0);
    p.bonus_probs = a.bonus_probs->const_data_ptr();
    p.bonus_row_stride = a.bonus_probs->stride(0);
  } else {
    p.target_row_stride = a.target_probs->stride(0);
    if (a.draft_probs) p.draft_row_stride = a.draft_probs->stride(0);
  }
  p.num_draft_tokens = pointer<int32_t>(a.num_draft_tokens);
  p.block_verification = a.block_verification;
  p.uniforms = pointer<float>(a.uniforms);
  p.seeds = pointer<int64_t>(a.seeds);
  p.offsets = pointer<int64_t>(a.offsets);
  p.token_ids = std::get<0>(output).mutable_data_ptr();
  p.num_accepted = std::get<1>(output).mutable_data_ptr<int32_t>();
  return p;
}

// ---- CPU

// The weights of a tile, 0 beyond the vocabulary.
template <typename Row>
void fill_tile(const Row& row, int vocab_size, int tile, float* w) {
  const int begin = tile * kTile, count = std::min(kTile, vocab_size - begin);
  const Row here = row.from(begin);
  if (here.q && here.is_plain()) {  // apart, so that each loop vectorizes
    for (int m = 0; m < count; ++m) {
      w[m] = here.with_plain_draft(static_cast<float>(here.p[m]), static_cast<float>(here.q[m]));
    }
  } else if (here.q) {
    for (int m = 0; m < count; ++m) {
      w[m] = here.with_draft(static_cast<float>(here.p[m]), static_cast<float>(here.q[m]));
    }
  } else {
    for (int m = 0; m < count; ++m) w[m] = here.without_draft(static_cast<float>(here.p[m]), m);
  }
  std::fill(w + count, w + kTile, 0.0f);
}

template <typename Row>
void sum_tiles(const Row& row, int vocab_size, std::vector<float>& sums) {
  float w[kTile];
  for (int tile = 0; tile < static_cast<int>(sums.size()); ++tile) {
    fill_tile(row, vocab_size, tile, w);
    sums[tile] = tile_sum([&](int m) { return w[m]; });
  }
}

template <typename Row>
double total_of(const Row& row, int vocab_size) {
  std::vector<float> sums(num_tiles(vocab_size));
  sum_tiles(row, vocab_size, sums);
  Spans<double> spans;
  sum_spans(static_cast<int>(sums.size()), [&](int tile) { return sums[tile]; }, spans);
  return spans.total();
}

// Draws a token from a row, given the weights of its tiles. -1 where they have none.
template <typename Row, typename TileWeight>
int draw_from_tiles(const Row& row, int vocab_size, const TileWeight& weight_of_tile, float u) {
  const int tiles = num_tiles(vocab_size);
  Spans<double> spans;
  sum_spans(tiles, weight_of_tile, spans);
  const Pick tile = pick_in_spans(tiles, weight_of_tile, spans, u * spans.total());
  if (tile.item < 0) return -1;
  float w[kTile];
  fill_tile(row, vocab_size, tile.item, w);
  const auto weight_of = [&](int m) { return w[m]; };
  Spans<float> in_tile;
  sum_spans(kTile, weight_of, in_tile);
  const float rest = static_cast<float>(tile.rest);
  return tile.item * kTile + pick_in_spans(kTile, weight_of, in_tile, rest).item;
}

template <typename Row>
int draw(Row row, int vocab_size, float u) {
  if (row.fixed_token >= 0) return row.fixed_token;
  for (int pass = 0; pass < 2; ++pass) {
    int token = -1;
    if constexpr (requires { row.tile_mass(0); }) {
      if (row.from_stats()) {
        const auto mass = [&](int tile) { return row.tile_mass(tile); };
        token = draw_from_tiles(row, vocab_size, mass, u);
        return token < 0 ? 0 : token;
      }
    }
    std::vector<float> sums(num_tiles(vocab_size));
    sum_tiles(row, vocab_size, sums);
    token = draw_from_tiles(row, vocab_size, [&](int tile) { return sums[tile]; }, u);
    if (token >= 0) return token;
    row = row.target();  // no residual: draw from p
  }
  return 0;  // p has no positive mass either
}

// `request_of(b)` makes request b of the batch. On one thread: at::parallel_for is parallel under
// -fopenmp only, and with GNU OpenMP a child that is forked after a call hangs in its first one.
template <typename RequestOf>
void sample_batch(const Params& a, const RequestOf& request_of) {
  const int vocab_size = static_cast<int>(a.vocab_size);
  for (int64_t b = 0; b < a.batch_size; ++b) {
    const auto request = request_of(b);
    const float u = uniform(a, b, a.spec_length);
    if (a.block_verification) {
      std::vector<double> reach(a.spec_length + 1);
      const auto decision = decide_block(
          request, reach.data(), [&](const auto& row) { return total_of(row, vocab_size); });
      request.store(decision.accepted, draw(decision.row, vocab_size, u));
    } else {
      const auto decision = decide(request, [&](int64_t k) { return uniform(a, b, k); });
      request.store(decision.accepted, draw(decision.row, vocab_size, u));
    }
  }
}

// Draws uniforms from the generator where nothing else was given.
inline void draw_uniforms(Arguments& a) {
  check(a.ids->is_cpu(), "draft_token_ids");
  if (a.uniforms || a.seeds) return;
  a.uniforms = &a.made.emplace_front(
      at::rand({a.batch_size, a.spec_length + 1}, a.generator, a.ids->options().dtype(at::kFloat)));
}

// Calls f with a value of the element type of `dtype`.
template <typename F>
void for_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(at::BFloat16{});
    case Dtype::kFloat16:
      return f(at::Half{});
  }
}

// ---- CUDA

#ifdef WITH_CUDA
inline void check_cuda(int error) {
  TORCH_CHECK(error == 0, "the CUDA kernel could not be launched: ", cuda_error_string(error),
              error == 209 || error == 98  // cudaErrorNoKernelImageForDevice, InvalidDeviceFunction
                  ? "; it was not built for this card: rebuild on a machine with it, or with "
                    "TORCH_CUDA_ARCH_LIST set to its compute capability"
                  : "");
}

inline void take_philox_state(const Arguments& a, Params& params) {
  auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      a.generator, at::cuda::detail::getDefaultCUDAGenerator(a.device().index()));
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  // Every row has a subsequence of its own; PyTorch wants increments in fours.
  const uint64_t increment = (static_cast<uint64_t>(a.spec_length) + 4) / 4 * 4;
  const at::PhiloxCudaState state = generator->philox_cuda_state(increment);
  if (state.captured_) {
    params.philox_seed_pointer = state.seed_.ptr;
    params.philox_offset_pointer = state.offset_.ptr;
    params.philox_offset = state.offset_intragraph_;
  } else {
    params.philox_seed = state.seed_.val;
    params.philox_offset = state.offset_.val;
  }
}

// launch(params, stream) enqueues the kernel on the arguments' device.
template <typename Launch>
void launch_on_device(const Arguments& a, const OutputReference& output, const Launch& launch) {
  if (a.batch_size == 0) return;
  const OnDevice on_device(a.device());
  Params params = params_of(a, output);
  if (!a.uniforms && !a.seeds) take_philox_state(a, params);
  launch(params, c10::cuda::getCurrentCUDAStream().stream());
}
#endif

}  // namespace
}  // namespace fused_rejection
