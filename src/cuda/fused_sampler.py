"""Rejection sampling by the C++ extension under csrc/: its CUDA kernels, or its CPU kernel."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import torch
from torch.compiler import is_dynamo_compiling

from src.contract import (
    SamplerOutput,
    SamplerUnavailable,
    validate,
    validate_flattened,
    validate_verification,
)

BUILD_COMMAND = "cd src/cuda/csrc && python setup.py build_ext --inplace"
_EXTENSION = "src.cuda.csrc.fused_rejection_C"


def _load():
    """The extension's module and, where it cannot be had, the reason."""
    if sys.platform == "win32" and (Path(os.environ.get("CUDA_PATH", "")) / "bin").is_dir():
        # Since Python 3.8 the folders on PATH are not searched for an extension's libraries.
        os.add_dll_directory(str(Path(os.environ["CUDA_PATH"]) / "bin"))
    try:
        module = importlib.import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
        return None, "the C++ extension is not built for this Python"
    except ImportError as error:
        reason = str(error).splitlines()[0].rpartition("/")[2]
        return None, f"the C++ extension does not load with torch {torch.__version__} ({reason})"
    # The extension knows its release alone, not what follows in 2.8.0a0+git or 2.8.0.dev2026.
    here = re.match(r"[\d.]*\d", torch.__version__)[0]
    if module.torch_version != here:
        return None, f"the C++ extension was built for torch {module.torch_version}, this is {here}"
    return module, None


_MODULE, _REASON = _load()


def require(device: str) -> None:
    """Raises SamplerUnavailable where the extension cannot sample on `device` ("cpu" or "cuda")."""
    if device == "cuda" and torch.version.cuda is None:
        raise SamplerUnavailable(
            f"torch {torch.__version__} is a build without CUDA",
            "pip install torch (a CUDA build: https://pytorch.org/get-started), then "
            + BUILD_COMMAND,
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise SamplerUnavailable("torch finds no CUDA device", "nvidia-smi")
    if _MODULE is None:
        raise SamplerUnavailable(_REASON, BUILD_COMMAND)
    if device == "cpu":
        return
    if not _MODULE.with_cuda:
        raise SamplerUnavailable(
            "the C++ extension was built without CUDA (no nvcc was found): install the CUDA "
            f"toolkit {torch.version.cuda}, set CUDA_HOME to it",
            BUILD_COMMAND,
        )
    try:
        probs = torch.ones((1, 1, 1), device="cuda")
        rejection_sample(
            torch.empty((1, 0), dtype=torch.int32, device="cuda"), None, probs, uniforms=probs[0]
        )
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        raise SamplerUnavailable(str(error).splitlines()[0], "nvidia-smi") from error
    except RuntimeError as error:  # the card's architecture was not compiled for …
        raise SamplerUnavailable(str(error).splitlines()[0], BUILD_COMMAND) from error


def _missing(*_arguments):
    raise SamplerUnavailable(_REASON, BUILD_COMMAND)


def operator(name: str):
    """The extension's operator, or one that raises SamplerUnavailable where there is none."""
    if _MODULE is None:
        return _missing
    return getattr(torch.ops.fused_rejection, name).default


def register_fake(name: str, function) -> None:
    """What torch.compile and torch.export trace an operator with: tensors without data. It gives
    the outputs' shapes, and refuses bad arguments with the sentences that eager calls get."""
    if _MODULE is not None:
        torch.library.register_fake(f"fused_rejection::{name}", function)


def caller(name: str, check, result=None):
    """The operator as a function of its arguments, all positional: the `result` made of what it
    returns (True where it returns nothing). `check` raises the contract's sentence for arguments
    that it refuses."""
    if _MODULE is None:
        return _missing
    dispatched = operator(name)
    # The same without the dispatcher, which takes longer than all else that a call does on the
    # host. None: here the dispatcher does more than to find the kernel, as in a mode or for a
    # subclass of torch.Tensor.
    direct = _MODULE.direct(name, result) or (lambda *_arguments: None)

    def call(*arguments):
        try:
            output = None if is_dynamo_compiling() else direct(*arguments)
            if output is None:
                output = dispatched(*arguments)
                output = result(*output) if result else True
            return output
        except (TypeError, ValueError, RuntimeError):
            # The operator guards itself tersely and in C++, so that a good call pays for no Python
            # checks; a bad one gets the sentence.
            check(*arguments)
            raise

    return call


def is_block(verification: str) -> bool:
    """Whether it is "block"; raises ValueError for what is neither that nor "token"."""
    if verification == "token":
        return False
    validate_verification(verification)
    return True


_RANDOMNESS = ("uniforms", "seeds", "offsets", "generator")


def _validate(ids, draft_probs, target_probs, num_draft_tokens, *rest):
    options = dict(zip(_RANDOMNESS, rest[:4], strict=True))
    return validate(ids, draft_probs, target_probs, num_draft_tokens=num_draft_tokens, **options)


def _validate_flattened(*arguments):
    options = dict(zip(_RANDOMNESS, arguments[6:10], strict=True))
    return validate_flattened(*arguments[:6], **options)


def _outputs(ids, shape):
    token_ids = ids.new_empty((shape.batch_size, shape.spec_length + 1))
    return token_ids, ids.new_empty((shape.batch_size,), dtype=torch.int32)


def _fake(*arguments):
    return _outputs(arguments[0], _validate(*arguments[:8]))


def _fake_out(*arguments):
    _validate(*arguments[:8])


def _fake_flattened(*arguments):
    return _outputs(arguments[0], _validate_flattened(*arguments))


_SAMPLE = caller("rejection_sample", _validate, SamplerOutput)
_SAMPLE_OUT = caller("rejection_sample_out", _validate)
_THREAD_PER_ROW = caller("rejection_sample_thread_per_row", _validate, SamplerOutput)
_FLATTENED = caller("rejection_sample_flattened", _validate_flattened, SamplerOutput)
register_fake("rejection_sample", _fake)
register_fake("rejection_sample_out", _fake_out)
register_fake("rejection_sample_thread_per_row", _fake)
register_fake("rejection_sample_planned", _fake)
register_fake("rejection_sample_flattened", _fake_flattened)


def rejection_sample(
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
    out: SamplerOutput | None = None,
) -> SamplerOutput:
    """Arguments, result, errors and source as in src.baseline.rejection_sampler.

    verification: "token", or "block" (Sun et al. 2024, arXiv:2403.10444, algorithm 2).
    out: contiguous token_ids [B, K+1] and num_accepted [B], written in place of new tensors.

    On CUDA tensors the fast kernel runs on the current stream, without a synchronisation; it can be
    captured in a CUDA graph, whose replays draw fresh numbers from a generator, and traced by
    torch.compile. On CPU tensors the C++ kernel runs: the same tokens, bit for bit, from the same
    uniforms or seeds. Raises SamplerUnavailable where the extension is missing.
    """
    arguments = (
        draft_token_ids,
        draft_probs,
        target_probs,
        num_draft_tokens,
        uniforms,
        seeds,
        offsets,
        generator,
        is_block(verification),
    )
    if out is None:
        return _SAMPLE(*arguments)
    try:
        _SAMPLE_OUT(*arguments, *out)
    except ValueError as error:
        if str(error).startswith("out "):
            shape = _validate(*arguments)
            raise ValueError(
                f"out has token_ids {list(out[0].shape)} {out[0].dtype} and num_accepted "
                f"{list(out[1].shape)} {out[1].dtype}; wanted contiguous tensors on "
                f"{target_probs.device}: [{shape.batch_size}, {shape.spec_length + 1}] "
                f"{draft_token_ids.dtype} and [{shape.batch_size}] torch.int32"
            ) from error
        raise
    return out if type(out) is SamplerOutput else SamplerOutput(*out)


def rejection_sample_flattened(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_probs: torch.Tensor,
    max_spec_length: int,
    *,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    verification: str = "token",
) -> SamplerOutput:
    """rejection_sample on vLLM's flattened ragged layout, without padding or copying it.

    Request b's drafts are cu_num_draft_tokens[b - 1] to cu_num_draft_tokens[b] of N; of more than
    max_spec_length (K) the first K count, and target row K is in place of the bonus row.

    draft_token_ids: [N] int32 or int64.
    cu_num_draft_tokens: [B] int32, the running sum of the requests' numbers of drafts.
    draft_probs: [N, V] float32, bfloat16 or float16, or None for one-hot drafts.
    target_probs: [N, V], the dtype of draft_probs.
    bonus_probs: [B, V], the target's distribution after each request's last draft.
    uniforms, seeds, offsets, generator, verification, errors: as in rejection_sample, B and K as
        above.
    Returns token_ids [B, K+1] and num_accepted [B] int32.
    """
    arguments = (draft_token_ids, cu_num_draft_tokens, draft_probs, target_probs, bonus_probs)
    arguments += (max_spec_length, uniforms, seeds, offsets, generator, is_block(verification))
    return _FLATTENED(*arguments)


def rejection_sample_thread_per_row(
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    num_draft_tokens: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SamplerOutput:
    """rejection_sample by the teaching kernel, one GPU thread a batch row. CUDA tensors only."""
    arguments = (draft_token_ids, draft_probs, target_probs, num_draft_tokens)
    arguments += (uniforms, seeds, offsets, generator)
    return _THREAD_PER_ROW(*arguments)
