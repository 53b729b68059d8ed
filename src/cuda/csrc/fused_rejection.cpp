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

// The padded layout, or the flattened ragged one where draft_ends is given.
struct Arguments {
  at::Tensor ids;
  OptionalTensor draft_probs;
  at::Tensor target_probs;
  OptionalTensor num_draft_tokens, draft_ends, bonus_probs, uniforms, seeds, offsets;
  OptionalGenerator generator;
  int64_t batch_size, spec_length;

  at::Device device() const { return target_probs.device(); }
  at::ScalarType dtype() const { return target_probs.scalar_type(); }
  int64_t vocab_size() const { return target_probs.size(-1); }

  // Checks what is the same in both layouts, and makes the small tensors contiguous.
  void check_common() {
    check(ids.device() == device() &&
              (ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt),
          "draft_token_ids");
    check((dtype() == at::kFloat || dtype() == at::kBFloat16 || dtype() == at::kHalf) &&
              vocab_size() > 0 && vocab_size() <= kMaxVocabSize && is_readable(target_probs),
          "target_probs");
    for (const auto& [probs, name] :
         {std::pair(&draft_probs, "draft_probs"), std::pair(&bonus_probs, "bonus_probs")}) {
      if (!*probs) continue;
      check((*probs)->scalar_type() == dtype() && (*probs)->device() == device() &&
                is_readable(**probs),
            name);
    }
    check(seeds.has_value() == offsets.has_value(), "seeds");
    check(uniforms.has_value() + seeds.has_value() + generator.has_value() <= 1, "generator");
    ids = ids.contiguous();
    make_rows(num_draft_tokens, at::kInt, "num_draft_tokens");
    make_rows(draft_ends, at::kInt, "cu_num_draft_tokens");
    make_rows(seeds, at::kLong, "seeds");
    make_rows(offsets, at::kLong, "offsets");
    if (uniforms) {
      check(uniforms->sizes() == at::IntArrayRef({batch_size, spec_length + 1}) &&
                uniforms->scalar_type() == at::kFloat && uniforms->device() == device(),
            "uniforms");
      uniforms = uniforms->contiguous();
    }
  }

 private:
  static bool is_readable(const at::Tensor& probs) {
    return probs.size(-1) == 1 || probs.numel() == 0 || probs.stride(-1) == 1;
  }

  void make_rows(OptionalTensor& tensor, at::ScalarType wanted, const char* name) const {
    if (!tensor) return;
    check(tensor->sizes() == at::IntArrayRef({batch_size}) && tensor->scalar_type() == wanted &&
              tensor->device() == device(),
          name);
    tensor = tensor->contiguous();
  }
};

Arguments padded(const at::Tensor& ids, const OptionalTensor& draft_probs,
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
  Arguments a{ids,      draft_probs, target_probs, num_draft_tokens, {},         {},
              uniforms, seeds,       offsets,      generator,        batch_size, spec_length};
  a.check_common();
  return a;
}

Arguments flattened(const at::Tensor& ids, const at::Tensor& draft_ends,
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
  Arguments a{ids,      draft_probs, target_probs, {},        draft_ends, bonus_probs,
              uniforms, seeds,       offsets,      generator, batch_size, max_spec_length};
  a.check_common();
  return a;
}

Output allocate(const Arguments& a) {
  return {at::empty({a.batch_size, a.spec_length + 1}, a.ids.options()),
          at::empty({a.batch_size}, a.ids.options().dtype(at::kInt))};
}

void check_output(const Arguments& a, const Output& output) {
  const auto& [token_ids, num_accepted] = output;
  check(token_ids.sizes() == at::IntArrayRef({a.batch_size, a.spec_length + 1}) &&
            token_ids.scalar_type() == a.ids.scalar_type() && token_ids.device() == a.device() &&
            token_ids.is_contiguous() && num_accepted.sizes() == at::IntArrayRef({a.batch_size}) &&
            num_accepted.scalar_type() == at::kInt && num_accepted.device() == a.device() &&
            num_accepted.is_contiguous(),
        "out");
}

template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Params params_of(const Arguments& a, const Output& output) {
  Params p = {};
  p.batch_size = a.batch_size;
  p.spec_length = a.spec_length;
  p.vocab_size = a.vocab_size();
  p.dtype = a.dtype() == at::kFloat      ? Dtype::kFloat32
            : a.dtype() == at::kBFloat16 ? Dtype::kBFloat16
                                         : Dtype::kFloat16;
  p.ids_are_int64 = a.ids.scalar_type() == at::kLong;
  p.draft_token_ids = a.ids.const_data_ptr();
  p.target_probs = a.target_probs.const_data_ptr();
  p.target_position_stride = a.target_probs.stride(-2);
  if (a.draft_probs) {
    p.draft_probs = a.draft_probs->const_data_ptr();
    p.draft_position_stride = a.draft_probs->stride(-2);
  }
  if (a.draft_ends) {
    p.draft_ends = a.draft_ends->const_data_ptr<int32_t>();
    p.num_flat = a.ids.size(0);
    p.bonus_probs = a.bonus_probs->const_data_ptr();
    p.bonus_row_stride = a.bonus_probs->stride(0);
  } else {
    p.target_row_stride = a.target_probs.stride(0);
    if (a.draft_probs) p.draft_row_stride = a.draft_probs->stride(0);
  }
  p.num_draft_tokens = pointer<int32_t>(a.num_draft_tokens);
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
  if (here.q) {  // apart, so that each loop vectorizes
    for (int m = 0; m < count; ++m) {
      w[m] = here.with_draft(static_cast<float>(here.p[m]), static_cast<float>(here.q[m]));
    }
  } else {
    for (int m = 0; m < count; ++m) w[m] = here.without_draft(static_cast<float>(here.p[m]), m);
  }
  std::fill(w + count, w + kTile, 0.0f);
}

template <typename Row>
int draw(Row row, int vocab_size, float u) {
  if (row.fixed_token >= 0) return row.fixed_token;
  const int tiles = num_tiles(vocab_size);
  std::vector<float> sums(tiles);
  const auto sum_of = [&](int tile) { return sums[tile]; };
  for (int pass = 0; pass < 2; ++pass) {
    at::parallel_for(0, tiles, 16, [&](int64_t begin, int64_t end) {
      float w[kTile];
      for (int tile = static_cast<int>(begin); tile < end; ++tile) {
        fill_tile(row, vocab_size, tile, w);
        sums[tile] = tile_sum([&](int m) { return w[m]; });
      }
    });
    Spans spans;
    sum_spans(tiles, sum_of, spans);
    const Pick tile = pick_in_spans(tiles, sum_of, spans, u * spans.total());
    if (tile.item >= 0) {
      float w[kTile];
      fill_tile(row, vocab_size, tile.item, w);
      const auto weight_at = [&](int m) { return w[m]; };
      sum_spans(kTile, weight_at, spans);
      return tile.item * kTile + pick_in_spans(kTile, weight_at, spans, tile.rest).item;
    }
    row = row.target();  // no residual: draw from p
  }
  return 0;  // p has no positive mass either
}

// `request_of(b)` makes request b of the batch.
template <typename RequestOf>
void sample_batch(const Params& a, const RequestOf& request_of) {
  const auto sample_rows = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto request = request_of(b);
      int64_t drawn = 0;
      const auto decision = decide(request, [&] { return uniform(a, b, drawn++); });
      const int token =
          draw(decision.row, static_cast<int>(a.vocab_size), uniform(a, b, a.spec_length));
      request.store(decision.accepted, token);
    }
  };
  // A small batch leaves the threads to the tiles of each row.
  if (a.batch_size >= at::get_num_threads()) {
    at::parallel_for(0, a.batch_size, 1, sample_rows);
  } else {
    sample_rows(0, a.batch_size);
  }
}

void sample_on_cpu(const Arguments& arguments, const Output& output) {
  Arguments a = arguments;
  check(a.ids.is_cpu(), "draft_token_ids");
  if (!a.uniforms && !a.seeds) {
    a.uniforms =
        at::rand({a.batch_size, a.spec_length + 1}, a.generator, a.ids.options().dtype(at::kFloat));
  }
  const Params params = params_of(a, output);
  const auto sample = [&](auto element) {
    using T = decltype(element);
    sample_batch(params, [&](int64_t b) { return ProbsRequest<T>(params, b); });
  };
  switch (params.dtype) {
    case Dtype::kFloat32:
      return sample(float{});
    case Dtype::kBFloat16:
      return sample(at::BFloat16{});
    case Dtype::kFloat16:
      return sample(at::Half{});
  }
}

// ---- CUDA

#ifdef WITH_CUDA
void check_cuda(int error) {
  TORCH_CHECK(error == 0, "the CUDA kernel could not be launched: ", cuda_error_string(error),
              error == 209 || error == 98  // cudaErrorNoKernelImageForDevice, InvalidDeviceFunction
                  ? "; it was not built for this card: rebuild on a machine with it, or with "
                    "TORCH_CUDA_ARCH_LIST set to its compute capability"
                  : "");
}

void take_philox_state(const Arguments& a, Params& params) {
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
void launch_on_device(const Arguments& a, const Output& output, const Launch& launch) {
  if (a.batch_size == 0) return;
  const c10::cuda::CUDAGuard guard(a.device());
  Params params = params_of(a, output);
  if (!a.uniforms && !a.seeds) take_philox_state(a, params);
  launch(params, c10::cuda::getCurrentCUDAStream().stream());
}

void launch_planned(const Params& params, Exchange exchange, int64_t blocks_per_row,
                    const Arguments& a, void* stream) {
  Plan plan = {};
  check_cuda(plan_fused(params, exchange, static_cast<int>(blocks_per_row), &plan));
  at::Tensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = at::empty({plan.workspace_bytes}, a.ids.options().dtype(at::kByte));
  }
  void* memory = plan.workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  check_cuda(launch_fused(params, plan, memory, stream));
}

Output rejection_sample_planned(const at::Tensor& ids, const OptionalTensor& draft_probs,
                                const at::Tensor& target_probs,
                                const OptionalTensor& num_draft_tokens,
                                const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                const OptionalTensor& offsets, const OptionalGenerator& generator,
                                c10::string_view exchange, int64_t blocks_per_row) {
  TORCH_CHECK_VALUE(exchange == "auto" || exchange == "cluster" || exchange == "workspace",
                    "exchange is '", exchange, "'; wanted auto, cluster or workspace");
  const Exchange wanted = exchange == "cluster"     ? Exchange::kCluster
                          : exchange == "workspace" ? Exchange::kWorkspace
                                                    : Exchange::kAuto;
  const Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  const Output output = allocate(a);
  launch_on_device(a, output, [&](const Params& params, void* stream) {
    launch_planned(params, wanted, blocks_per_row, a, stream);
  });
  return output;
}

Output rejection_sample_thread_per_row(const at::Tensor& ids, const OptionalTensor& draft_probs,
                                       const at::Tensor& target_probs,
                                       const OptionalTensor& num_draft_tokens,
                                       const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                       const OptionalTensor& offsets,
                                       const OptionalGenerator& generator) {
  const Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  const Output output = allocate(a);
  launch_on_device(a, output, [](const Params& params, void* stream) {
    check_cuda(launch_thread_per_row(params, stream));
  });
  return output;
}

at::Tensor read_rows(const OptionalTensor& draft_probs, const at::Tensor& target_probs,
                     const at::Tensor& rows, int64_t blocks_per_row) {
  const auto aligned = [](const at::Tensor& probs) {
    bool all = reinterpret_cast<uintptr_t>(probs.const_data_ptr()) % 16 == 0;
    for (const int64_t d : {0, 1}) all &= probs.stride(d) * probs.element_size() % 16 == 0;
    return all;
  };
  check(target_probs.dim() == 3 && aligned(target_probs), "target_probs");
  check(!draft_probs || (draft_probs->dim() == 3 && aligned(*draft_probs)), "draft_probs");
  check(rows.sizes() == at::IntArrayRef({target_probs.size(0), 2}) && rows.is_contiguous() &&
            rows.scalar_type() == at::kLong,
        "rows");
  check(blocks_per_row > 0 && blocks_per_row <= 1024, "blocks_per_row");
  const c10::cuda::CUDAGuard guard(target_probs.device());
  constexpr int64_t warps_per_block = 16;
  at::Tensor sums = at::empty({target_probs.size(0) * blocks_per_row * warps_per_block},
                              rows.options().dtype(at::kFloat));
  check_cuda(launch_floor(
      target_probs.const_data_ptr(), draft_probs ? draft_probs->const_data_ptr() : nullptr,
      rows.const_data_ptr<int64_t>(), target_probs.size(0),
      target_probs.size(2) * target_probs.element_size(), static_cast<int>(blocks_per_row),
      sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream().stream()));
  return sums;
}

void sample_on_cuda(const Arguments& a, const Output& output) {
  launch_on_device(a, output, [&](const Params& params, void* stream) {
    launch_planned(params, Exchange::kAuto, 0, a, stream);
  });
}
#endif

// ---- What both devices offer. `sample(arguments, output)` is a device's.

template <auto sample>
Output rejection_sample(const at::Tensor& ids, const OptionalTensor& draft_probs,
                        const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                        const OptionalTensor& uniforms, const OptionalTensor& seeds,
                        const OptionalTensor& offsets, const OptionalGenerator& generator) {
  const Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  Output output = allocate(a);
  sample(a, output);
  return output;
}

template <auto sample>
void rejection_sample_out(const at::Tensor& ids, const OptionalTensor& draft_probs,
                          const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                          const OptionalTensor& uniforms, const OptionalTensor& seeds,
                          const OptionalTensor& offsets, const OptionalGenerator& generator,
                          at::Tensor token_ids, at::Tensor num_accepted) {
  const Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  const Output output{token_ids, num_accepted};
  check_output(a, output);
  sample(a, output);
}

template <auto sample>
Output rejection_sample_flattened(const at::Tensor& ids, const at::Tensor& cu_num_draft_tokens,
                                  const OptionalTensor& draft_probs, const at::Tensor& target_probs,
                                  const at::Tensor& bonus_probs, int64_t max_spec_length,
                                  const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                  const OptionalTensor& offsets,
                                  const OptionalGenerator& generator) {
  const Arguments a = flattened(ids, cu_num_draft_tokens, draft_probs, target_probs, bonus_probs,
                                max_spec_length, uniforms, seeds, offsets, generator);
  Output output = allocate(a);
  sample(a, output);
  return output;
}

using Sample = void (*)(const Arguments&, const Output&);

template <Sample sample>
void implement(torch::Library& m) {
  m.impl("rejection_sample", &rejection_sample<sample>);
  m.impl("rejection_sample_out", &rejection_sample_out<sample>);
  m.impl("rejection_sample_flattened", &rejection_sample_flattened<sample>);
}

}  // namespace
}  // namespace fused_rejection

#define FR_RANDOMNESS "Tensor? uniforms, Tensor? seeds, Tensor? offsets, Generator? generator"
#define FR_ARGUMENTS                                                   \
  "Tensor draft_token_ids, Tensor? draft_probs, Tensor target_probs, " \
  "Tensor? num_draft_tokens, " FR_RANDOMNESS
#define FR_RESULT " -> (Tensor token_ids, Tensor num_accepted)"

TORCH_LIBRARY(fused_rejection, m) {
  const std::vector<at::Tag> tags = {at::Tag::nondeterministic_seeded};
  m.def("rejection_sample(" FR_ARGUMENTS ")" FR_RESULT, tags);
  m.def("rejection_sample_out(" FR_ARGUMENTS
        ", Tensor(a!) token_ids, Tensor(b!) num_accepted) -> ()",
        tags);
  m.def(
      "rejection_sample_flattened(Tensor draft_token_ids, Tensor cu_num_draft_tokens, "
      "Tensor? draft_probs, Tensor target_probs, Tensor bonus_probs, int "
      "max_spec_length, " FR_RANDOMNESS ")" FR_RESULT,
      tags);
  m.def("rejection_sample_thread_per_row(" FR_ARGUMENTS ")" FR_RESULT, tags);
  // The fast kernel with its launch chosen by the caller, for tests and for docs/kernel.md's
  // ladder.
  m.def("rejection_sample_planned(" FR_ARGUMENTS ", str exchange, int blocks_per_row)" FR_RESULT,
        tags);
  m.def(
      "read_rows(Tensor? draft_probs, Tensor target_probs, Tensor rows, int blocks_per_row) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(fused_rejection, CPU, m) {
  fused_rejection::implement<&fused_rejection::sample_on_cpu>(m);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rejection, CUDA, m) {
  fused_rejection::implement<&fused_rejection::sample_on_cuda>(m);
  m.impl("rejection_sample_thread_per_row", &fused_rejection::rejection_sample_thread_per_row);
  m.impl("rejection_sample_planned", &fused_rejection::rejection_sample_planned);
  m.impl("read_rows", &fused_rejection::read_rows);
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
