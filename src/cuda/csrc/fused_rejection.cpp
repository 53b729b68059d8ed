// The operators: schemas, checks, allocation, the C++ CPU kernel, and the call into the CUDA ones.
#include "fused_rejection.h"

#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>
#include <torch/types.h>
#include <torch/version.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#ifdef WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_rejection {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using Output = std::tuple<at::Tensor, at::Tensor>;

// src/contract.py has the sentences; these guard the memory when it is not called first.
void check(bool ok, const char* argument) {
  TORCH_CHECK_VALUE(ok, argument, " does not fit the other arguments; see src/contract.py");
}

struct Arguments {
  at::Tensor ids;
  OptionalTensor draft_probs;
  at::Tensor target_probs;
  OptionalTensor num_draft_tokens, uniforms, seeds, offsets;

  int64_t batch_size() const { return ids.size(0); }
  int64_t spec_length() const { return ids.size(1); }
  int64_t vocab_size() const { return target_probs.size(2); }
};

OptionalTensor checked(const OptionalTensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype,
                       at::Device device, const char* argument) {
  if (!tensor) return tensor;
  check(tensor->sizes() == sizes && tensor->scalar_type() == dtype && tensor->device() == device,
        argument);
  return tensor->contiguous();
}

Arguments checked_arguments(const at::Tensor& ids, const OptionalTensor& draft_probs,
                            const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                            const OptionalTensor& uniforms, const OptionalTensor& seeds,
                            const OptionalTensor& offsets, const OptionalGenerator& generator) {
  const at::Device device = target_probs.device();
  const at::ScalarType dtype = target_probs.scalar_type();
  check(ids.dim() == 2 && (ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt) &&
            ids.device() == device,
        "draft_token_ids");
  const int64_t batch_size = ids.size(0), spec_length = ids.size(1);
  check(target_probs.dim() == 3 && target_probs.size(0) == batch_size &&
            target_probs.size(1) == spec_length + 1 && target_probs.size(2) > 0 &&
            target_probs.size(2) <= kMaxVocabSize &&
            (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf),
        "target_probs");
  const int64_t vocab_size = target_probs.size(2);
  const auto readable = [&](const at::Tensor& probs) {
    return vocab_size == 1 || probs.numel() == 0 || probs.stride(2) == 1;
  };
  check(readable(target_probs), "target_probs");
  if (draft_probs) {
    check(draft_probs->sizes() == at::IntArrayRef({batch_size, spec_length, vocab_size}) &&
              draft_probs->scalar_type() == dtype && draft_probs->device() == device &&
              readable(*draft_probs),
          "draft_probs");
  }
  check(seeds.has_value() == offsets.has_value(), "seeds");
  check(uniforms.has_value() + seeds.has_value() + generator.has_value() <= 1, "generator");
  return {ids.contiguous(),
          draft_probs,
          target_probs,
          checked(num_draft_tokens, {batch_size}, at::kInt, device, "num_draft_tokens"),
          checked(uniforms, {batch_size, spec_length + 1}, at::kFloat, device, "uniforms"),
          checked(seeds, {batch_size}, at::kLong, device, "seeds"),
          checked(offsets, {batch_size}, at::kLong, device, "offsets")};
}

Output allocate(const Arguments& a) {
  return {at::empty({a.batch_size(), a.spec_length() + 1}, a.ids.options()),
          at::empty({a.batch_size()}, a.ids.options().dtype(at::kInt))};
}

// ---- CPU

template <typename T>
struct Row {  // the V weights that a row's last token is drawn from
  const T* p;
  const T* q;       // null where the draft is one-hot or nothing was rejected
  int64_t one_hot;  // the index where q is 1, or -1
  int64_t vocab_size;

  // The weights of a tile, 0 beyond the vocabulary.
  void fill(int64_t tile, float* w) const {
    const int64_t begin = tile * kTile;
    const int64_t count = std::min<int64_t>(kTile, vocab_size - begin);
    for (int64_t m = 0; m < count; ++m) {
      w[m] = weight(static_cast<float>(p[begin + m]), q ? static_cast<float>(q[begin + m]) : 0.0f);
    }
    if (one_hot >= begin && one_hot < begin + count) {
      w[one_hot - begin] = weight(static_cast<float>(p[one_hot]), 1.0f);
    }
    std::fill(w + count, w + kTile, 0.0f);
  }
};

template <typename T>
int64_t draw(Row<T> row, float u) {
  const int tiles = num_tiles(row.vocab_size);
  std::vector<float> sums(tiles);
  const auto sum_of = [&](int tile) { return sums[tile]; };
  for (int pass = 0; pass < 2; ++pass) {
    at::parallel_for(0, tiles, 16, [&](int64_t begin, int64_t end) {
      float w[kTile];
      for (int64_t tile = begin; tile < end; ++tile) {
        row.fill(tile, w);
        sums[tile] = tile_sum([&](int m) { return w[m]; });
      }
    });
    Spans spans;
    sum_spans(tiles, sum_of, spans);
    const Pick tile = pick_in_spans(tiles, sum_of, spans, u * spans.total());
    if (tile.item >= 0) {
      float w[kTile];
      row.fill(tile.item, w);
      const auto weight_at = [&](int m) { return w[m]; };
      sum_spans(kTile, weight_at, spans);
      return int64_t{tile.item} * kTile + pick_in_spans(kTile, weight_at, spans, tile.rest).item;
    }
    row.q = nullptr;  // no residual: draw from p
    row.one_hot = -1;
  }
  return 0;  // p has no positive mass either
}

template <typename T, typename Id>
void sample_row(const Arguments& a, int64_t b, Id* token_ids, int32_t* num_accepted) {
  const int64_t spec_length = a.spec_length(), vocab_size = a.vocab_size();
  const Id* ids = a.ids.const_data_ptr<Id>() + b * spec_length;
  const auto uniform = [&](int64_t k) {
    if (a.uniforms) return a.uniforms->const_data_ptr<float>()[b * (spec_length + 1) + k];
    return to_uniform(philox_word(a.seeds->const_data_ptr<int64_t>()[b], 0,
                                  a.offsets->const_data_ptr<int64_t>()[b] + k));
  };
  const auto probs_at = [&](const at::Tensor& probs, int64_t k) {
    return probs.const_data_ptr<T>() + b * probs.stride(0) + k * probs.stride(1);
  };
  int64_t drafts = spec_length;
  if (a.num_draft_tokens) {
    drafts = std::min<int64_t>(a.num_draft_tokens->const_data_ptr<int32_t>()[b], drafts);
  }
  std::fill(token_ids, token_ids + spec_length + 1, static_cast<Id>(kPlaceholderTokenId));
  Row<T> row{nullptr, nullptr, -1, vocab_size};
  int64_t k = 0;
  for (; k < drafts && ids[k] != kPlaceholderTokenId; ++k) {
    const int64_t id = ids[k];
    const bool in_vocab = id >= 0 && id < vocab_size;
    const T* q = a.draft_probs ? probs_at(*a.draft_probs, k) : nullptr;
    if (!in_vocab || !accepts(uniform(k), q ? static_cast<float>(q[id]) : 1.0f,
                              static_cast<float>(probs_at(a.target_probs, k)[id]))) {
      row.q = q;
      row.one_hot = !q && in_vocab ? id : -1;
      break;
    }
    token_ids[k] = ids[k];
  }
  row.p = probs_at(a.target_probs, k);
  token_ids[k] = static_cast<Id>(draw(row, uniform(spec_length)));
  *num_accepted = static_cast<int32_t>(k);
}

template <typename T, typename Id>
void sample_batch(const Arguments& a, Output& output) {
  Id* token_ids = std::get<0>(output).template mutable_data_ptr<Id>();
  int32_t* num_accepted = std::get<1>(output).template mutable_data_ptr<int32_t>();
  const auto sample_rows = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      sample_row<T, Id>(a, b, token_ids + b * (a.spec_length() + 1), num_accepted + b);
    }
  };
  // A small batch leaves the threads to the tiles of each row.
  if (a.batch_size() >= at::get_num_threads()) {
    at::parallel_for(0, a.batch_size(), 1, sample_rows);
  } else {
    sample_rows(0, a.batch_size());
  }
}

template <typename T>
void sample_ids(const Arguments& a, Output& output) {
  if (a.ids.scalar_type() == at::kLong) {
    sample_batch<T, int64_t>(a, output);
  } else {
    sample_batch<T, int32_t>(a, output);
  }
}

Output rejection_sample_cpu(const at::Tensor& ids, const OptionalTensor& draft_probs,
                            const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                            const OptionalTensor& uniforms, const OptionalTensor& seeds,
                            const OptionalTensor& offsets, const OptionalGenerator& generator) {
  Arguments a = checked_arguments(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds,
                                  offsets, generator);
  check(ids.is_cpu(), "draft_token_ids");
  if (!uniforms && !seeds) {
    a.uniforms =
        at::rand({a.batch_size(), a.spec_length() + 1}, generator, ids.options().dtype(at::kFloat));
  }
  Output output = allocate(a);
  switch (target_probs.scalar_type()) {
    case at::kFloat:
      sample_ids<float>(a, output);
      break;
    case at::kBFloat16:
      sample_ids<at::BFloat16>(a, output);
      break;
    default:
      sample_ids<at::Half>(a, output);
  }
  return output;
}

// ---- CUDA

#ifdef WITH_CUDA
template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

void check_cuda(int error) {
  TORCH_CHECK(error == 0, "the CUDA kernel could not be launched: ", cuda_error_string(error),
              error == 209 || error == 98  // cudaErrorNoKernelImageForDevice, InvalidDeviceFunction
                  ? "; it was not built for this card: rebuild on a machine with it, or with "
                    "TORCH_CUDA_ARCH_LIST set to its compute capability"
                  : "");
}

Params params_of(const Arguments& a, const OptionalGenerator& generator, Output& output) {
  Params p = {};
  p.batch_size = a.batch_size();
  p.spec_length = a.spec_length();
  p.vocab_size = a.vocab_size();
  const at::ScalarType dtype = a.target_probs.scalar_type();
  p.dtype = dtype == at::kFloat      ? Dtype::kFloat32
            : dtype == at::kBFloat16 ? Dtype::kBFloat16
                                     : Dtype::kFloat16;
  p.ids_are_int64 = a.ids.scalar_type() == at::kLong;
  p.draft_token_ids = a.ids.const_data_ptr();
  if (a.draft_probs) {
    p.draft_probs = a.draft_probs->const_data_ptr();
    p.draft_row_stride = a.draft_probs->stride(0);
    p.draft_position_stride = a.draft_probs->stride(1);
  }
  p.target_probs = a.target_probs.const_data_ptr();
  p.target_row_stride = a.target_probs.stride(0);
  p.target_position_stride = a.target_probs.stride(1);
  p.num_draft_tokens = pointer<int32_t>(a.num_draft_tokens);
  p.uniforms = pointer<float>(a.uniforms);
  p.seeds = pointer<int64_t>(a.seeds);
  p.offsets = pointer<int64_t>(a.offsets);
  if (!a.uniforms && !a.seeds) {
    auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        generator, at::cuda::detail::getDefaultCUDAGenerator(a.target_probs.device().index()));
    const std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
    // Every row has a subsequence of its own; PyTorch wants increments in fours.
    const uint64_t increment = (static_cast<uint64_t>(p.spec_length) + 4) / 4 * 4;
    const at::PhiloxCudaState state = cuda_generator->philox_cuda_state(increment);
    if (state.captured_) {
      p.philox_seed_pointer = state.seed_.ptr;
      p.philox_offset_pointer = state.offset_.ptr;
      p.philox_offset = state.offset_intragraph_;
    } else {
      p.philox_seed = state.seed_.val;
      p.philox_offset = state.offset_.val;
    }
  }
  p.token_ids = std::get<0>(output).mutable_data_ptr();
  p.num_accepted = std::get<1>(output).mutable_data_ptr<int32_t>();
  return p;
}

template <typename Launch>
Output sample_on_cuda(const Arguments& a, const OptionalGenerator& generator,
                      const Launch& launch) {
  const c10::cuda::CUDAGuard guard(a.target_probs.device());
  Output output = allocate(a);
  if (a.batch_size() == 0) return output;
  launch(params_of(a, generator, output), c10::cuda::getCurrentCUDAStream().stream());
  return output;
}

Output rejection_sample_planned_cuda(const at::Tensor& ids, const OptionalTensor& draft_probs,
                                     const at::Tensor& target_probs,
                                     const OptionalTensor& num_draft_tokens,
                                     const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                     const OptionalTensor& offsets,
                                     const OptionalGenerator& generator, c10::string_view exchange,
                                     int64_t blocks_per_row) {
  const Arguments a = checked_arguments(ids, draft_probs, target_probs, num_draft_tokens, uniforms,
                                        seeds, offsets, generator);
  TORCH_CHECK_VALUE(exchange == "auto" || exchange == "cluster" || exchange == "workspace",
                    "exchange is '", exchange, "'; wanted auto, cluster or workspace");
  const Exchange wanted = exchange == "cluster"     ? Exchange::kCluster
                          : exchange == "workspace" ? Exchange::kWorkspace
                                                    : Exchange::kAuto;
  return sample_on_cuda(a, generator, [&](const Params& params, void* stream) {
    Plan plan = {};
    check_cuda(plan_fused(params, wanted, static_cast<int>(blocks_per_row), &plan));
    at::Tensor workspace;
    if (plan.workspace_bytes > 0) {
      workspace = at::empty({plan.workspace_bytes}, a.ids.options().dtype(at::kByte));
    }
    check_cuda(launch_fused(params, plan,
                            workspace.defined() ? workspace.mutable_data_ptr() : nullptr, stream));
  });
}

Output rejection_sample_cuda(const at::Tensor& ids, const OptionalTensor& draft_probs,
                             const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                             const OptionalTensor& uniforms, const OptionalTensor& seeds,
                             const OptionalTensor& offsets, const OptionalGenerator& generator) {
  return rejection_sample_planned_cuda(ids, draft_probs, target_probs, num_draft_tokens, uniforms,
                                       seeds, offsets, generator, "auto", 0);
}

Output rejection_sample_thread_per_row_cuda(
    const at::Tensor& ids, const OptionalTensor& draft_probs, const at::Tensor& target_probs,
    const OptionalTensor& num_draft_tokens, const OptionalTensor& uniforms,
    const OptionalTensor& seeds, const OptionalTensor& offsets,
    const OptionalGenerator& generator) {
  const Arguments a = checked_arguments(ids, draft_probs, target_probs, num_draft_tokens, uniforms,
                                        seeds, offsets, generator);
  return sample_on_cuda(a, generator, [](const Params& params, void* stream) {
    check_cuda(launch_thread_per_row(params, stream));
  });
}
#endif

}  // namespace
}  // namespace fused_rejection

#define FR_ARGUMENTS                                                             \
  "Tensor draft_token_ids, Tensor? draft_probs, Tensor target_probs, "           \
  "Tensor? num_draft_tokens, Tensor? uniforms, Tensor? seeds, Tensor? offsets, " \
  "Generator? generator"
#define FR_RESULT " -> (Tensor token_ids, Tensor num_accepted)"

TORCH_LIBRARY(fused_rejection, m) {
  const std::vector<at::Tag> tags = {at::Tag::nondeterministic_seeded};
  m.def("rejection_sample(" FR_ARGUMENTS ")" FR_RESULT, tags);
  m.def("rejection_sample_thread_per_row(" FR_ARGUMENTS ")" FR_RESULT, tags);
  // The fast kernel with its launch chosen by the caller, for tests and for docs/kernel.md's
  // ladder.
  m.def("rejection_sample_planned(" FR_ARGUMENTS ", str exchange, int blocks_per_row)" FR_RESULT,
        tags);
}

TORCH_LIBRARY_IMPL(fused_rejection, CPU, m) {
  m.impl("rejection_sample", &fused_rejection::rejection_sample_cpu);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rejection, CUDA, m) {
  m.impl("rejection_sample", &fused_rejection::rejection_sample_cuda);
  m.impl("rejection_sample_thread_per_row", &fused_rejection::rejection_sample_thread_per_row_cuda);
  m.impl("rejection_sample_planned", &fused_rejection::rejection_sample_planned_cuda);
}
#endif

// setuptools wants a module to import; importing it registers the operators.
static int add_constants(PyObject* module) {
#ifdef WITH_CUDA
  const int with_cuda = 1;
#else
  const int with_cuda = 0;
#endif
  const std::string version = std::to_string(TORCH_VERSION_MAJOR) + "." +
                              std::to_string(TORCH_VERSION_MINOR) + "." +
                              std::to_string(TORCH_VERSION_PATCH);
  if (PyModule_AddStringConstant(module, "torch_version", version.c_str()) < 0) return -1;
  return PyModule_AddIntConstant(module, "with_cuda", with_cuda);
}

PyMODINIT_FUNC PyInit_fused_rejection_C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fused_rejection_C", nullptr, -1,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && add_constants(module) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
