"""The CUDA kernels on a CPU: compiled by the host's C++ compiler, run on fibers (emulation.h)."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from src.contract import SamplerOutput, validate, validate_flattened, validate_logits
from src.cuda.csrc.compile_check import find_nvcc, include_folders

FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER.parent.parent / "src" / "cuda" / "csrc"
KERNELS = ("thread-per-row", "cluster", "workspace")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POISON = -77


def compiler() -> str | None:
    """A compiler for Linux's ucontext, or None where the emulation cannot be built."""
    return shutil.which(os.environ.get("CXX", "c++")) if sys.platform == "linux" else None


class _Params(ctypes.Structure):
    """struct Params of fused_rejection.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch_size", "spec_length", "vocab_size")],
        ("dtype", ctypes.c_int),
        ("ids_are_int64", ctypes.c_bool),
        ("draft_token_ids", ctypes.c_void_p),
        ("draft_probs", ctypes.c_void_p),
        ("draft_row_stride", ctypes.c_int64),
        ("draft_position_stride", ctypes.c_int64),
        ("target_probs", ctypes.c_void_p),
        ("target_row_stride", ctypes.c_int64),
        ("target_position_stride", ctypes.c_int64),
        ("num_draft_tokens", ctypes.c_void_p),
        ("block_verification", ctypes.c_bool),
        ("draft_ends", ctypes.c_void_p),
        ("num_flat", ctypes.c_int64),
        ("bonus_probs", ctypes.c_void_p),
        ("bonus_row_stride", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("uniforms", "seeds", "offsets")],
        ("philox_seed", ctypes.c_uint64),
        ("philox_offset", ctypes.c_uint64),
        ("philox_seed_pointer", ctypes.c_void_p),
        ("philox_offset_pointer", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("num_accepted", ctypes.c_void_p),
    ]


@functools.cache
def library(source: str, *flags: str) -> ctypes.CDLL:
    """The shared library of a C++ file of this folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        command = [compiler(), "-O2", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC"]
        # A fortified longjmp takes a jump to another fiber for a mistake.
        command += ["-U_FORTIFY_SOURCE", "-pthread", f"-I{FOLDER}", f"-I{CSRC}", *flags]
        subprocess.run([*command, str(FOLDER / source), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def curand_flags() -> list[str] | None:
    """Where CUDA's and cuRAND's headers are, as compiler flags, or None."""
    nvcc = find_nvcc()
    folders = include_folders(nvcc) if nvcc else []
    wanted = ("curand_kernel.h", "cuda_runtime.h")
    if not all(any((folder / name).exists() for folder in folders) for name in wanted):
        return None
    return ["-D__device__=", *(f"-I{folder}" for folder in folders)]


def sampler(kernel: str, blocks_per_row: int = 1, schedule: int = 0):
    """A sampler of the contract over the emulated `kernel`, its threads in an order of its own for
    each `schedule`."""

    def rejection_sample(
        draft_token_ids, draft_probs, target_probs, *, verification="token", **options
    ):
        shape = validate(draft_token_ids, draft_probs, target_probs, **options)
        strides = {
            "block_verification": verification == "block",
            "target_row_stride": target_probs.stride(0),
            "draft_row_stride": 0 if draft_probs is None else draft_probs.stride(0),
        }
        arguments = (shape, draft_token_ids, draft_probs, target_probs)
        return _emulate((kernel, blocks_per_row, schedule), *arguments, strides, **options)

    return rejection_sample


def flattened_sampler(kernel: str, blocks_per_row: int = 1, schedule: int = 0):
    """The same for rejection_sample_flattened."""

    def rejection_sample_flattened(
        draft_token_ids,
        cu_num_draft_tokens,
        draft_probs,
        target_probs,
        bonus_probs,
        max_spec_length,
        **options,
    ):
        arguments = (draft_token_ids, cu_num_draft_tokens, draft_probs, target_probs, bonus_probs)
        shape = validate_flattened(*arguments, max_spec_length, **options)
        layout = {
            "draft_ends": cu_num_draft_tokens.data_ptr(),
            "num_flat": len(draft_token_ids),
            "bonus_probs": bonus_probs.data_ptr(),
            "bonus_row_stride": bonus_probs.stride(0),
        }
        launch = (kernel, blocks_per_row, schedule)
        arguments = (shape, draft_token_ids, draft_probs, target_probs, layout)
        return _emulate(launch, *arguments, **options)

    return rejection_sample_flattened


def _emulate(launch, shape, ids, draft_probs, target_probs, layout, **options):
    small = {name: t.contiguous() for name, t in options.items() if t is not None}
    token_ids, num_accepted = _poisoned(ids, shape)
    params = _params(shape, ids, draft_probs, target_probs, layout, small, token_ids, num_accepted)
    _run("emulate", launch, params)
    return SamplerOutput(token_ids, num_accepted)


def _poisoned(ids, shape):
    token_ids = ids.new_full((shape.batch_size, shape.spec_length + 1), POISON)
    return token_ids, torch.full((shape.batch_size,), POISON, dtype=torch.int32)


def _params(shape, ids, draft_probs, target_probs, layout, small, token_ids, num_accepted):
    assert ids.is_contiguous(), "the binding makes it so"
    params = _Params(
        *shape,
        dtype=DTYPES.index(target_probs.dtype),
        ids_are_int64=ids.dtype == torch.int64,
        draft_token_ids=ids.data_ptr(),
        target_probs=target_probs.data_ptr(),
        target_position_stride=target_probs.stride(-2),
        token_ids=token_ids.data_ptr(),
        num_accepted=num_accepted.data_ptr(),
        **layout,
        **{name: tensor.data_ptr() for name, tensor in small.items()},
    )
    if draft_probs is not None:
        params.draft_probs = draft_probs.data_ptr()
        params.draft_position_stride = draft_probs.stride(-2)
    return params


def _run(function, launch, params):
    kernel, *numbers = launch
    emulate = getattr(library("emulate.cpp"), function)
    status = emulate(ctypes.byref(params), KERNELS.index(kernel), *numbers)
    assert status == 0, f"the emulated {kernel} kernel does not end"


class _LogitsParams(ctypes.Structure):
    """struct LogitsParams of from_logits.h."""

    _fields_ = [
        ("base", _Params),
        ("draft_is_logits", ctypes.c_bool),
        *[(name, ctypes.c_void_p) for name in ("temperature", "top_k", "top_p", "min_p")],
        ("draft_logsumexp", ctypes.c_void_p),
        ("logsumexp", ctypes.c_void_p),
    ]


def from_logits(
    kernel: str, blocks: int = 1, schedule: int = 0, early_exit: bool = False, sampling=False
):
    """rejection_sample_from_logits and, beside it, the last row's logsumexp where the kernel is
    called as sample_from_logits calls it."""

    def rejection_sample_from_logits(
        draft_token_ids,
        target_logits,
        *,
        draft_logits=None,
        draft_probs=None,
        verification="token",
        **options,
    ):
        drafts = {"draft_logits": draft_logits, "draft_probs": draft_probs}
        shape = validate_logits(draft_token_ids, target_logits, **drafts, **options)
        draft = draft_probs if draft_logits is None else draft_logits
        small = {name: t.contiguous() for name, t in options.items() if t is not None}
        names = ("temperature", "top_k", "top_p", "min_p", "draft_logsumexp")
        own = {name: small.pop(name) for name in names if name in small}
        layout = {
            "block_verification": verification == "block",
            "target_row_stride": target_logits.stride(0),
            "draft_row_stride": 0 if draft is None else draft.stride(0),
        }
        token_ids, num_accepted = _poisoned(draft_token_ids, shape)
        arguments = (shape, draft_token_ids, draft, target_logits, layout, small)
        logsumexp = torch.full((shape.batch_size,), float("nan"), dtype=torch.float64)
        params = _LogitsParams(
            base=_params(*arguments, token_ids, num_accepted),
            draft_is_logits=draft_logits is not None,
            logsumexp=logsumexp.data_ptr() if sampling else None,
            **{name: tensor.data_ptr() for name, tensor in own.items()},
        )
        launch = (kernel, blocks, int(early_exit), schedule)
        _run("emulate_from_logits", launch, params)
        return SamplerOutput(token_ids, num_accepted), logsumexp

    return rejection_sample_from_logits


def tile_sums(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tiles] float32 sums of max(p - q, 0), p and q [V] float32: the serial one and a warp's."""
    serial, by_warp = torch.full((2, -(-p.numel() // 512)), float("nan"))
    status = library("emulate.cpp").emulate_tile_sums(
        *(ctypes.c_void_p(t.data_ptr()) for t in (p, q)),
        ctypes.c_int64(p.numel()),
        *(ctypes.c_void_p(t.data_ptr()) for t in (serial, by_warp)),
    )
    assert status == 0, "the emulated tile sum does not end"
    return serial, by_warp


def sum_of_leaves(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[] float32, the sum of a tile with `weights` [n] float32 at `places` [n] int32, n <= 32."""
    total = torch.full((), float("nan"))
    status = library("emulate.cpp").emulate_sum_of_leaves(
        *(ctypes.c_void_p(t.data_ptr()) for t in (weights, places)),
        ctypes.c_int(weights.numel()),
        ctypes.c_void_p(total.data_ptr()),
    )
    assert status == 0, "the emulated sum does not end"
    return total
