"""No time for a wrong answer: each sampler against the oracle, on the inputs that are timed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from src import oracle

# The oracle copies rows to float64 on the host: this much at once.
_HOST_BYTES = 2**28


def expected_outputs(inputs: dict[str, torch.Tensor]) -> oracle.OracleOutput:
    """The oracle's output for the keyword arguments of rejection_sample, some rows at a time."""
    size, rows, vocab = inputs["target_probs"].shape
    step = max(1, _HOST_BYTES // (2 * rows * vocab * 8))
    parts = [
        oracle.rejection_sample(**{name: value[b : b + step] for name, value in inputs.items()})
        for b in range(0, size, step)
    ]
    return oracle.OracleOutput(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.num_accepted for part in parts]),
        [weights for part in parts for weights in part.weights],
        [u for part in parts for u in part.recovery_uniforms],
        [margin for part in parts for margin in part.accept_margins],
    )


def check(
    function: Callable, copies: list[dict], expected: list, backlog: Callable[[], None]
) -> str | None:
    """None where the sampler gives the oracle's tokens for every copy, else what it did instead.

    Three traps: inputs hold poison until, behind `backlog`, the current stream writes them (a
    sampler that works on another stream reads poison); freed memory of the outputs' sizes holds
    poison; outputs are compared only after the last call (one that is overwritten is wrong).
    """
    late = {name: torch.empty_like(value) for name, value in copies[0].items()}
    outputs = []
    try:
        for inputs in copies:
            for tensor in late.values():
                poison(tensor)
            _poison_free_memory(inputs)
            backlog()
            for name, tensor in late.items():
                tensor.copy_(inputs[name])
            outputs.append(function(**late))
            for name, tensor in late.items():
                if not torch.equal(tensor, inputs[name]):
                    return f"it changed its input {name}"
    except Exception as error:  # a sampler that raises is a row that says so, not the end of a run
        return one_line(error)
    return disagreement(outputs, expected)


def disagreement(outputs: list, expected: list) -> str | None:
    """The first difference between outputs and the oracle's for the same copies, or None."""
    for i, (output, want) in enumerate(zip(outputs, expected, strict=True)):
        try:
            token_ids, num_accepted = output
            shapes = tuple(token_ids.shape), tuple(num_accepted.shape)
            wanted = want.token_ids.shape, want.num_accepted.shape
            if shapes != wanted:
                return f"outputs of shapes {shapes}; wanted {wanted}"
            problems = oracle.disagreements(token_ids, num_accepted, want)
        except Exception as error:
            return one_line(error)
        if problems:
            return f"wrong tokens: input {i}, {problems[0]}"
    return None


def poison(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _poison_free_memory(inputs: dict[str, torch.Tensor]) -> None:
    # Allocators hand out recently freed blocks first: an output that is never written shows.
    ids, device = inputs["draft_token_ids"], inputs["target_probs"].device
    size, length = ids.shape
    blocks = [
        torch.full(shape, -77, dtype=dtype, device=device)
        for dtype in (ids.dtype, torch.int32)
        for shape in ((size, length + 1), (size,))
        for _ in range(4)
    ]
    del blocks
