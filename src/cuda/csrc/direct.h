// Calls from Python that leave the dispatcher out where it would do nothing but find the operator's
// function. What it does then costs more than the function's own work on the host.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/DispatchKeyExtractor.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fused_rejection {

PyMethodDef* logits_methods();  // of from_logits.cpp

namespace {

// An operator's name as a template's argument.
template <size_t n>
struct Name {
  char text[n];
  constexpr Name(const char (&literal)[n]) { std::copy_n(literal, n, text); }
};

// A Python argument as the operator's function takes it. False: left to the operator, which takes
// it or refuses it.
inline bool unpack(PyObject* object, at::Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) return false;  // a subclass may override operators
  tensor = c10::MaybeOwnedTraits<at::Tensor>::createBorrow(THPVariable_Unpack(object));
  return true;
}

inline bool unpack(PyObject* object, at::Generator& generator) {
  if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(THPGeneratorClass)) return false;
  generator = reinterpret_cast<THPGenerator*>(object)->cdata;
  return true;
}

inline bool unpack(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

inline bool unpack(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

template <typename T>
bool unpack(PyObject* object, std::optional<T>& value) {
  return object == Py_None || unpack(object, value.emplace());
}

// The same arguments for the length of a call, in which the caller holds them.
template <typename... T>
struct Unpacked {
  std::tuple<T...> values;

  ~Unpacked() {
    std::apply([](auto&... value) { (release(value), ...); }, values);
  }

 private:
  static void release(at::Tensor& borrowed) { borrowed.unsafeReleaseTensorImpl(); }
  static void release(std::optional<at::Tensor>& borrowed) {
    if (borrowed) release(*borrowed);
  }
  template <typename Other>
  static void release(Other&) {}
};

template <typename T>
bool requires_grad(const T& value) {
  if constexpr (std::is_same_v<T, at::Tensor>) return value.requires_grad();
  if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    return value && value->requires_grad();
  }
  return false;
}

// Whether the dispatcher would call the function for these arguments and nothing before it. Modes
// (but for __torch_function__'s), functorch, tracing, fake, batched and lazily negated tensors and
// what else PyTorch has or will have are dispatch keys.
template <typename... Args>
bool goes_straight_through(const Args&... args) {
  // Keys without a kernel for these operators. Autograd's warns in a backward pass through them.
  constexpr c10::DispatchKeySet fall_through = c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                               c10::autocast_dispatch_keyset |
                                               c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  const c10::DispatchKeySet keys =
      c10::impl::computeDispatchKeySet(c10::detail::multi_dispatch_key_set(args...),
                                       c10::DispatchKeySet(c10::DispatchKeySet::FULL)) -
      fall_through;
  bool on_device = keys == c10::DispatchKeySet(c10::DispatchKey::CPU);
#ifdef WITH_CUDA
  on_device |= keys == c10::DispatchKeySet(c10::DispatchKey::CUDA);
#endif
  return on_device && !at::impl::torch_function_mode_enabled() &&
         !((requires_grad(args) || ...) && at::GradMode::is_enabled());
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  WithoutGil() = default;
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

// The tensors as an instance of `type`, a NamedTuple of two: tuple.__new__(type, (first, second)).
inline PyObject* as_named_tuple(PyTypeObject* type, std::tuple<at::Tensor, at::Tensor> tensors) {
  const Object first(THPVariable_Wrap(std::move(std::get<0>(tensors))));
  const Object second(THPVariable_Wrap(std::move(std::get<1>(tensors))));
  if (!first || !second) return nullptr;
  const Object pair(PyTuple_Pack(2, first.get(), second.get()));
  const Object args(pair ? PyTuple_Pack(1, pair.get()) : nullptr);
  return args ? PyTuple_Type.tp_new(type, args.get(), nullptr) : nullptr;
}

template <typename Result, typename... Parameters>
PyObject* call_directly(const char* name, Result (*function)(Parameters...), PyObject* type,
                        PyObject* const* objects, size_t count) {
  HANDLE_TH_ERRORS
  Unpacked<std::decay_t<Parameters>...> unpacked;
  return std::apply(
      [&](auto&... args) -> PyObject* {
        if (count != sizeof...(args) || !(unpack(*objects++, args) && ...) ||
            !goes_straight_through(args...)) {
          Py_RETURN_NONE;
        }
        const auto run = [&] {
          RECORD_FUNCTION(name, std::vector<c10::IValue>({c10::IValue(args)...}));
          const WithoutGil without_gil;
          return function(args...);
        };
        if constexpr (std::is_void_v<Result>) {
          run();
          Py_RETURN_TRUE;
        } else {
          return as_named_tuple(reinterpret_cast<PyTypeObject*>(type), run());
        }
      },
      unpacked.values);
  END_HANDLE_TH_ERRORS
}

// As a method of the result's type, called with the operator's arguments, all positional. Returns
// the result (True where there is none), or None, with nothing done: then it is a call for the
// operator. Raises what the operator would raise.
template <Name name, auto function>
PyMethodDef method() {
  constexpr auto call = [](PyObject* type, PyObject* const* objects, Py_ssize_t count) {
    return call_directly(name.text, function, type, objects, static_cast<size_t>(count));
  };
  PyObject* (*const pointer)(PyObject*, PyObject* const*, Py_ssize_t) = call;
  constexpr std::string_view qualified = name.text;
  return {name.text + qualified.rfind(':') + 1,
          reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pointer)), METH_FASTCALL,
          nullptr};
}

}  // namespace
}  // namespace fused_rejection
