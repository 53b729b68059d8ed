"""The shapes that are measured, as data, and inputs for them that look like decoding."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

# draft = softmax(log target + m * randn). Acceptances of about 0.34, 0.62 and 0.80 at V = 128256;
# every row of a result carries the acceptance that was measured.
ACCEPTANCE_NOISE = {"low": 2.0, "medium": 1.0, "high": 0.5}
# The ends of the dial: draft and target equal to the bit, so that every draft is accepted; and the
# drafts' tokens impossible for the target, so that every first one is rejected.
EXTREMES = {"all": 0.0, "none": 1.0}
# target = softmax(4 * randn): peaked, as a language model's rows are.
PEAKEDNESS = 4.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The touched bytes of all copies together against the L2 cache.
L2_MARGIN = 1.25
# A batch of one costs another time where it is accepted than where it is rejected: fewer different
# requests than this in rotation would make a row's time and acceptance an accident of the seed.
MIN_REQUESTS = 16
# More calls would make a CUDA graph of some hundred thousand nodes; tiny inputs then fit the cache
# and their rows say so (`cold` is false).
MAX_COPIES = 1024


class Workload(NamedTuple):
    """B = batch_size, K = spec_length, V = vocab_size; `name` is for people."""

    batch_size: int
    spec_length: int
    vocab_size: int
    dtype: str = "float32"
    acceptance: str = "medium"
    name: str | None = None

    @property
    def row_bytes(self) -> int:
        return self.vocab_size * DTYPES[self.dtype].itemsize

    @property
    def copy_bytes(self) -> int:
        return self.batch_size * (2 * self.spec_length + 1) * self.row_bytes


SPEC_LENGTH = 8
QUICK_DEMO = Workload(4, SPEC_LENGTH, 32_000, name="Quick Demo Config")  # TinyLlama's vocabulary
BATCH_SIZES = [1, 2, 4, 8, 16]
LARGE_BATCH_SIZES = [32, 64, 128, 256]
PROFILE_BATCH_SIZES = [1, 4, 16, 64]
BATCH_SWEEP_VOCAB = 128_256  # Llama 3.2
CONFIGURATIONS = [
    Workload(1, SPEC_LENGTH, 32_000, name="Single Batch, 32K"),
    QUICK_DEMO,
    Workload(1, SPEC_LENGTH, 128_256, name="Real LLM Config"),
    Workload(4, SPEC_LENGTH, 128_256, name="Larger Batch, 128K"),
]
VOCABULARIES = {
    "Llama-2": 32_000,
    "Mistral": 32_768,
    "SmolLM2": 49_152,
    "GPT-2": 50_257,
    "Llama-3": 128_256,
    "Qwen2.5": 151_936,
    "Gemma-3": 262_144,
}
_KERNEL_BATCHES, _KERNEL_VOCABULARIES = [1, 2, 4, 8, 16, 64, 256], [32_000, 128_256, 151_936]
_SOME_BATCHES = [1, 16, 64]
_ONE = Workload(1, SPEC_LENGTH, BATCH_SWEEP_VOCAB)
KERNEL_CELLS = [
    *(Workload(b, SPEC_LENGTH, v) for v in _KERNEL_VOCABULARIES for b in _KERNEL_BATCHES),
    *(_ONE._replace(batch_size=b, dtype=d) for d in list(DTYPES)[1:] for b in _SOME_BATCHES),
    _ONE._replace(vocab_size=100, spec_length=1, name="tiny"),
    _ONE._replace(vocab_size=100, name="tiny"),
    *(
        _ONE._replace(batch_size=b, name=name, **corner)
        for name, corner in (
            ("one draft", {"spec_length": 1}),
            ("all accepted", {"acceptance": "all"}),
            ("first rejected", {"acceptance": "none"}),
        )
        for b in _SOME_BATCHES
    ),
]
# By name, what a row's logits are filtered with before sampling.
FILTERS = {"no filter": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}}
LOGITS_CELLS = [
    *(
        _ONE._replace(batch_size=b, dtype=d, name="no filter")
        for d in ("bfloat16", "float32")
        for b in _SOME_BATCHES
    ),
    *(
        _ONE._replace(batch_size=b, dtype="bfloat16", name=name)
        for name in list(FILTERS)[1:]
        for b in _SOME_BATCHES
    ),
]
# What --smoke makes of a sweep: every cell, cut to this size.
SMOKE = {"batch_size": 2, "spec_length": 3, "vocab_size": 1000}


def batch_sweep(spec_length: int, vocab_size: int, large: bool) -> list[Workload]:
    sizes = BATCH_SIZES + LARGE_BATCH_SIZES * large
    return [Workload(size, spec_length, vocab_size) for size in sizes]


def vocab_sweep(large: bool) -> list[Workload]:
    return [
        Workload(batch, SPEC_LENGTH, vocab, name=name)
        for batch in [4] + [64] * large
        for name, vocab in VOCABULARIES.items()
    ]


def smoke(cells: list[Workload]) -> list[Workload]:
    """The same cells with no dimension above SMOKE's, without repetitions."""
    smaller = [
        cell._replace(**{name: min(getattr(cell, name), most) for name, most in SMOKE.items()})
        for cell in cells
    ]
    return list(dict.fromkeys(smaller))


class TooLarge(RuntimeError):
    """One copy of the inputs does not fit the memory that a benchmark may take."""


def make_inputs(workload: Workload, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of rejection_sample on `device`, a function of workload and seed.

    draft_token_ids [B, K] int64 drawn from the draft, draft_probs [B, K, V] and
    target_probs [B, K+1, V] of the workload's dtype, uniforms [B, K+1] float32 in [0, 1).
    """
    size, length, vocab = workload.batch_size, workload.spec_length, workload.vocab_size
    g = torch.Generator(device).manual_seed(seed)
    dtype, noise = DTYPES[workload.dtype], {**ACCEPTANCE_NOISE, **EXTREMES}[workload.acceptance]
    target = torch.empty(size, length + 1, vocab, dtype=dtype, device=device)
    draft = torch.empty(size, length, vocab, dtype=dtype, device=device)
    ids = torch.empty(size, length, dtype=torch.int64, device=device)
    for b in range(size):  # by request, so that the float32 temporaries stay small
        logits = PEAKEDNESS * torch.randn(length + 1, vocab, device=device, generator=g)
        target[b] = logits.softmax(-1)
        if noise:
            logits[:length] += noise * torch.randn(length, vocab, device=device, generator=g)
        draft[b] = logits[:length].softmax(-1)
        ids[b] = torch.multinomial(draft[b].float(), 1, generator=g).squeeze(-1)
        if workload.acceptance == "none":
            target[b, :length].scatter_(-1, ids[b, :, None], 0.0)
    uniforms = torch.rand(size, length + 1, device=device, generator=g)
    return {
        "draft_token_ids": ids,
        "draft_probs": draft,
        "target_probs": target,
        "uniforms": uniforms,
    }


def make_copies(
    workload: Workload,
    device: str,
    seed: int,
    make: Callable[..., dict] = make_inputs,
    rows_touched: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Enough different inputs, each `make(workload, device, seed)`, that calls in rotation find
    none of their rows in the L2 cache.

    rows_touched: V-rows of a request that are read in each copy, at least.

    Raises TooLarge, saying how much is wanted, where not even one copy fits the memory budget.
    """
    budget = memory_budget(device)
    if workload.copy_bytes > budget:
        raise TooLarge(
            f"the inputs take {workload.copy_bytes / 2**30:.1f} GiB; "
            f"the budget here is {budget / 2**30:.1f} GiB"
        )
    wanted = max(2, math.ceil(MIN_REQUESTS / workload.batch_size))
    if device == "cuda":
        touched = rows_touched * workload.batch_size * workload.row_bytes
        wanted = max(wanted, math.ceil(L2_MARGIN * l2_bytes() / touched))
    count = min(wanted, budget // workload.copy_bytes, MAX_COPIES)
    return [make(workload, device, seed * 1_000_003 + i) for i in range(count)]


def are_cold(workload: Workload, copies: int, rows_touched: int = 1) -> bool:
    """Whether `copies` inputs in rotation exceed the current card's L2 cache."""
    return copies * rows_touched * workload.batch_size * workload.row_bytes > l2_bytes()


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def memory_budget(device: str) -> int:
    """Bytes that the inputs of one workload may take: a quarter of what is free, at most 16 GiB."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows and macOS have no such question
            free = 8 * 2**30
    return min(free // 4, 16 * 2**30)
