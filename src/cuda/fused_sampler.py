"""Rejection sampling by the C++ extension under csrc/: its CUDA kernels, or its CPU kernel."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from src.contract import SamplerOutput, SamplerUnavailable, validate

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
    here = torch.__version__.partition("+")[0]
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
        _SAMPLE(
            torch.empty((1, 0), dtype=torch.int32, device="cuda"),
            *(None, probs, None, probs[0], None, None, None),
        )
        torch.cuda.synchronize()
    except RuntimeError as error:  # the card's architecture was not compiled for, out of memory …
        raise SamplerUnavailable(str(error).splitlines()[0], BUILD_COMMAND) from error


def _missing(*_arguments):
    raise SamplerUnavailable(_REASON, BUILD_COMMAND)


def _register_fakes() -> None:
    # torch.compile and torch.export trace with tensors that have no data: they need the outputs'
    # shapes, and bad arguments must fail there with the same sentences.
    def fake(ids, draft_probs, target_probs, num_draft_tokens, uniforms, seeds, offsets, generator):
        shape = validate(
            ids,
            draft_probs,
            target_probs,
            num_draft_tokens=num_draft_tokens,
            uniforms=uniforms,
            seeds=seeds,
            offsets=offsets,
            generator=generator,
        )
        token_ids = ids.new_empty((shape.batch_size, shape.spec_length + 1))
        return token_ids, ids.new_empty((shape.batch_size,), dtype=torch.int32)

    def fake_planned(*arguments):
        return fake(*arguments[:8])

    torch.library.register_fake("fused_rejection::rejection_sample", fake)
    torch.library.register_fake("fused_rejection::rejection_sample_thread_per_row", fake)
    torch.library.register_fake("fused_rejection::rejection_sample_planned", fake_planned)


if _MODULE is None:
    _SAMPLE = _THREAD_PER_ROW = _missing
else:
    _register_fakes()
    _SAMPLE = torch.ops.fused_rejection.rejection_sample.default
    _THREAD_PER_ROW = torch.ops.fused_rejection.rejection_sample_thread_per_row.default


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
) -> SamplerOutput:
    """Arguments, result, errors and source as in src.baseline.rejection_sampler.

    On CUDA tensors the fast kernel runs on the current stream, without a synchronisation; it can be
    captured in a CUDA graph, whose replays draw fresh numbers from a generator, and traced by
    torch.compile. On CPU tensors the C++ kernel runs: the same tokens, bit for bit, from the same
    uniforms or seeds. Raises SamplerUnavailable where the extension is missing.
    """
    arguments = (draft_token_ids, draft_probs, target_probs, num_draft_tokens)
    return _call(_SAMPLE, *arguments, uniforms, seeds, offsets, generator)


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
    return _call(_THREAD_PER_ROW, *arguments, uniforms, seeds, offsets, generator)


def _call(operator, *arguments) -> SamplerOutput:
    try:
        return SamplerOutput(*operator(*arguments))
    except (TypeError, ValueError, RuntimeError):
        # The operator guards itself tersely and in C++, so that a good call pays for no Python
        # checks; a bad one gets the contract's sentence.
        if operator is not _missing:
            names = ("num_draft_tokens", "uniforms", "seeds", "offsets", "generator")
            validate(*arguments[:3], **dict(zip(names, arguments[3:], strict=True)))
        raise
