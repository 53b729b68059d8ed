// The operators on probabilities.
#include <torch/version.h>

#include <string>

#include "binding.h"
#include "direct.h"

namespace fused_rejection {
namespace {

void sample_on_cpu(Arguments& a, const OutputReference& output) {
  draw_uniforms(a);
  const Params params = params_of(a, output);
  for_element(params.dtype, [&](auto element) {
    using T = decltype(element);
    sample_batch(params, [&](int64_t b) { return ProbsRequest<T>(params, b); });
  });
}

#ifdef WITH_CUDA
void launch_planned(const Params& params, Exchange exchange, int64_t blocks_per_row,
                    const Arguments& a, void* stream) {
  Plan plan = {};
  check_cuda(plan_fused(params, exchange, static_cast<int>(blocks_per_row), &plan));
  at::Tensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty({plan.workspace_bytes}, at::kByte, a.device());
  }
  void* memory = plan.workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  check_cuda(launch_fused(params, plan, memory, stream));
}

Output rejection_sample_planned(const at::Tensor& ids, const OptionalTensor& draft_probs,
                                const at::Tensor& target_probs,
                                const OptionalTensor& num_draft_tokens,
                                const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                const OptionalTensor& offsets, const OptionalGenerator& generator,
                                c10::string_view exchange, int64_t blocks_per_row, bool block) {
  TORCH_CHECK_VALUE(exchange == "auto" || exchange == "cluster" || exchange == "workspace",
                    "exchange is '", exchange, "'; wanted auto, cluster or workspace");
  const Exchange wanted = exchange == "cluster"     ? Exchange::kCluster
                          : exchange == "workspace" ? Exchange::kWorkspace
                                                    : Exchange::kAuto;
  Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  a.block_verification = block;
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

void sample_on_cuda(const Arguments& a, const OutputReference& output) {
  launch_on_device(a, output, [&](const Params& params, void* stream) {
    launch_planned(params, Exchange::kAuto, 0, a, stream);
  });
}
#endif

// ---- What both devices offer

void sample(Arguments& a, const OutputReference& output) {
#ifdef WITH_CUDA
  if (a.device().is_cuda()) return sample_on_cuda(a, output);
#endif
  sample_on_cpu(a, output);
}

Output rejection_sample(const at::Tensor& ids, const OptionalTensor& draft_probs,
                        const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                        const OptionalTensor& uniforms, const OptionalTensor& seeds,
                        const OptionalTensor& offsets, const OptionalGenerator& generator,
                        bool block) {
  Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  a.block_verification = block;
  Output output = allocate(a);
  sample(a, output);
  return output;
}

void rejection_sample_out(const at::Tensor& ids, const OptionalTensor& draft_probs,
                          const at::Tensor& target_probs, const OptionalTensor& num_draft_tokens,
                          const OptionalTensor& uniforms, const OptionalTensor& seeds,
                          const OptionalTensor& offsets, const OptionalGenerator& generator,
                          bool block, const at::Tensor& token_ids, const at::Tensor& num_accepted) {
  Arguments a =
      padded(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator);
  a.block_verification = block;
  const OutputReference output{token_ids, num_accepted};
  check_output(a, output);
  sample(a, output);
}

Output rejection_sample_flattened(const at::Tensor& ids, const at::Tensor& cu_num_draft_tokens,
                                  const OptionalTensor& draft_probs, const at::Tensor& target_probs,
                                  const at::Tensor& bonus_probs, int64_t max_spec_length,
                                  const OptionalTensor& uniforms, const OptionalTensor& seeds,
                                  const OptionalTensor& offsets, const OptionalGenerator& generator,
                                  bool block) {
  Arguments a = flattened(ids, cu_num_draft_tokens, draft_probs, target_probs, bonus_probs,
                          max_spec_length, uniforms, seeds, offsets, generator);
  a.block_verification = block;
  Output output = allocate(a);
  sample(a, output);
  return output;
}

void implement(torch::Library& m) {
  m.impl("rejection_sample", &rejection_sample);
  m.impl("rejection_sample_out", &rejection_sample_out);
  m.impl("rejection_sample_flattened", &rejection_sample_flattened);
}

PyMethodDef methods[] = {
    method<"fused_rejection::rejection_sample", &rejection_sample>(),
    method<"fused_rejection::rejection_sample_out", &rejection_sample_out>(),
    method<"fused_rejection::rejection_sample_flattened", &rejection_sample_flattened>(),
    {}};

}  // namespace
}  // namespace fused_rejection

#define FR_RANDOMNESS "Tensor? uniforms, Tensor? seeds, Tensor? offsets, Generator? generator"
#define FR_ARGUMENTS                                                   \
  "Tensor draft_token_ids, Tensor? draft_probs, Tensor target_probs, " \
  "Tensor? num_draft_tokens, " FR_RANDOMNESS
#define FR_RESULT " -> (Tensor token_ids, Tensor num_accepted)"

TORCH_LIBRARY(fused_rejection, m) {
  const std::vector<at::Tag> tags = {at::Tag::nondeterministic_seeded};
  m.def("rejection_sample(" FR_ARGUMENTS ", bool block=False)" FR_RESULT, tags);
  m.def("rejection_sample_out(" FR_ARGUMENTS
        ", bool block, Tensor(a!) token_ids, Tensor(b!) num_accepted) -> ()",
        tags);
  m.def(
      "rejection_sample_flattened(Tensor draft_token_ids, Tensor cu_num_draft_tokens, "
      "Tensor? draft_probs, Tensor target_probs, Tensor bonus_probs, int "
      "max_spec_length, " FR_RANDOMNESS ", bool block=False)" FR_RESULT,
      tags);
  m.def("rejection_sample_thread_per_row(" FR_ARGUMENTS ")" FR_RESULT, tags);
  // The fast kernel with its launch chosen by the caller, for tests and for docs/kernel.md's
  // ladder.
  m.def("rejection_sample_planned(" FR_ARGUMENTS
        ", str exchange, int blocks_per_row, bool block=False)" FR_RESULT,
        tags);
  m.def(
      "read_rows(Tensor? draft_probs, Tensor target_probs, Tensor rows, int blocks_per_row) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(fused_rejection, CPU, m) { fused_rejection::implement(m); }

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rejection, CUDA, m) {
  fused_rejection::implement(m);
  m.impl("rejection_sample_thread_per_row", &fused_rejection::rejection_sample_thread_per_row);
  m.impl("rejection_sample_planned", &fused_rejection::rejection_sample_planned);
  m.impl("read_rows", &fused_rejection::read_rows);
}
#endif

// direct(name, type): the operator's method (direct.h) that returns instances of `type`, or None.
static PyObject* direct(PyObject*, PyObject* args) {
  const char* name;
  PyObject* type;
  if (!PyArg_ParseTuple(args, "sO", &name, &type)) return nullptr;
  for (PyMethodDef* methods : {fused_rejection::methods, fused_rejection::logits_methods()}) {
    for (; methods->ml_name; ++methods) {
      if (std::string_view(methods->ml_name) == name) return PyCFunction_New(methods, type);
    }
  }
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"direct", direct, METH_VARARGS, nullptr}, {}};

// Importing the module registers the operators.
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
                                   functions};
  PyObject* module = PyModule_Create(&definition);
  if (module && add_constants(module) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
