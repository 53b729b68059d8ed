"""No time for a wrong answer: each sampler against the oracle, on the inputs that are timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src import oracle

# A fair sampler fails the chi-square of `distribution` once in 1 / ALPHA runs for each of 2 tokens.
ALPHA = 1e-5
# NumPy lets go of the interpreter while it works on a row.
_THREADS = min(16, os.cpu_count() or 1)
# Cycles of a GPU's clock, about 1 ms, for which the stream waits before a call's inputs are there.
# The first calls are enough to tell whether a sampler works on the current stream.
_STALLED_CALLS = 16


def expected_outputs(inputs: dict, rows: Callable | None = None) -> oracle.OracleOutput:
    """The oracle's output for the keyword arguments of rejection_sample, tensors without padding.

    The oracle is asked about one draft of one request at a time, up to the rejection: at a batch of
    256 x 151,936 tokens the float64 of all the rows, which it never reads, would take a minute.

    rows: `rows(inputs, b, k)` gives q [V] (None at k = K) and p [V], float64 NumPy; by default the
        rows of draft_probs and target_probs.
    """
    ids = inputs["draft_token_ids"].cpu().numpy()
    uniforms = inputs["uniforms"].cpu().double().numpy()
    rows = rows or _probability_rows

    def request(b: int):
        length = ids.shape[1]
        tokens, margin = np.full(length + 1, -1, dtype=np.int64), np.inf
        for k in range(length + 1):
            q, p = rows(inputs, b, k)
            # Position K has no draft: the oracle then draws the bonus token.
            draft = ids[b, k] if k < length else -1
            one = oracle.rejection_sample(
                [[draft]],
                None if q is None else q[None, None],
                np.broadcast_to(p, (1, 2, len(p))),
                uniforms=[[uniforms[b, k], uniforms[b, length]]],
            )
            margin = min(margin, one.accept_margins[0])
            tokens[k] = one.token_ids[0, 0]
            if one.num_accepted[0] == 0:
                break
        return tokens, k, one.weights[0], one.recovery_uniforms[0], margin

    with ThreadPoolExecutor(_THREADS) as pool:
        tokens, accepted, *rest = zip(*pool.map(request, range(len(ids))), strict=True)
    counts = np.array(accepted, dtype=np.int32)
    return oracle.OracleOutput(np.stack(tokens), counts, *map(list, rest))


def _probability_rows(inputs: dict, b: int, k: int):
    q, p = inputs["draft_probs"], inputs["target_probs"]
    row = None if k == q.shape[1] else q[b, k].cpu().double().numpy()
    return row, p[b, k].cpu().double().numpy()


def check(
    function: Callable,
    copies: list[dict],
    judge: Callable[[list], str | None],
    stall: Callable[[], None],
) -> str | None:
    """None where `judge` finds nothing wrong with the outputs for the copies, else what is wrong.

    Three traps: inputs hold poison until, behind `stall`, the current stream writes them (a
    sampler that works on another stream reads poison); freed memory of the outputs' sizes holds
    poison; outputs are compared only after the last call (one that is overwritten is wrong).
    """
    late = {name: torch.empty_like(value) for name, value in copies[0].items()}
    outputs = []
    try:
        for i, inputs in enumerate(copies):
            for tensor in late.values():
                poison(tensor)
            _poison_free_memory(inputs)
            if i < _STALLED_CALLS:
                stall()
            for name, tensor in late.items():
                tensor.copy_(inputs[name])
            outputs.append(function(**late))
            for name, tensor in late.items():
                if not torch.equal(tensor, inputs[name]):
                    return f"it changed its input {name}"
    except Exception as error:  # a sampler that raises is a row that says so, not the end of a run
        return one_line(error)
    return judge(outputs)


def disagreement(outputs: list, expected: list, epsilon: float | None = None) -> str | None:
    """The first difference between outputs and the oracle's for the same copies, or None.
    epsilon: as in oracle.disagreements."""
    for i, (output, want) in enumerate(zip(outputs, expected, strict=True)):
        try:
            problem = _wrong_shapes(output, want.token_ids.shape)
            if problem:
                return problem
            problems = oracle.disagreements(*output, want, epsilon)
        except Exception as error:
            return one_line(error)
        if problems:
            return f"wrong tokens: input {i}, {problems[0]}"
    return None


def invalid(outputs: list, copies: list[dict]) -> str | None:
    """What no right sampler could have returned for the same copies, whatever its random numbers;
    None where there is no such thing. For peers, which draw their own."""
    for i, (output, inputs) in enumerate(zip(outputs, copies, strict=True)):
        try:
            problem = _wrong_shapes(output, inputs["uniforms"].shape) or _impossible(output, inputs)
        except Exception as error:
            return one_line(error)
        if problem:
            return f"input {i}, {problem}"
    return None


def _impossible(output, inputs: dict) -> str | None:
    tokens, accepted = (tensor.cpu().long() for tensor in output)
    ids = inputs["draft_token_ids"].cpu()
    # Of logits, -inf alone is impossible.
    p, least = inputs.get("target_probs"), 0.0
    if p is None:
        p, least = inputs["target_logits"], float("-inf")
    (size, length), vocab = ids.shape, p.shape[2]
    if ((accepted < 0) | (accepted > length)).any():
        return f"num_accepted outside 0 to {length}"
    position = torch.arange(length + 1)
    last = tokens.gather(1, accepted[:, None])[:, 0]
    if ((last < 0) | (last >= vocab)).any():
        return f"a last token outside 0 to {vocab - 1}"
    if (tokens != -1)[position > accepted[:, None]].any():
        return "no padding of -1 after the last token"
    if (tokens[:, :-1] != ids)[position[:-1] < accepted[:, None]].any():
        return "an accepted token that is not the draft's"
    at = (torch.arange(size), accepted, last)
    if not (p[tuple(index.to(p.device) for index in at)] > least).all():
        return "a last token to which the target gives probability 0"
    return None


def _wrong_shapes(output, wanted: tuple) -> str | None:
    token_ids, num_accepted = output
    shapes = tuple(token_ids.shape), tuple(num_accepted.shape)
    if shapes == (tuple(wanted), (wanted[0],)):
        return None
    return f"outputs of shapes {shapes}; wanted {(tuple(wanted), (wanted[0],))}"


def distribution(function: Callable, device: str, *, seconds: float = 3.0) -> str | None:
    """None where the first two emitted tokens follow the target by chi-square, else what was found.

    Batches of 2,048 requests with 2 drafts of 8 tokens, until 60,000 requests or `seconds`: enough
    for a fault of a few hundredths of probability to show.
    """
    p = torch.tensor([0.30, 0.05, 0.20, 0.02, 0.18, 0.10, 0.12, 0.03])
    q = torch.tensor([0.10, 0.25, 0.05, 0.20, 0.10, 0.10, 0.05, 0.15])
    target, draft = torch.stack([p, p.flip(0), p]), torch.stack([q, q])
    counts = torch.zeros(2, len(p), dtype=torch.float64)
    try:
        cards = [torch.cuda.current_device()] if device == "cuda" else []
        with torch.random.fork_rng(cards):
            torch.manual_seed(1)
            for output in _draws(function, target, draft, device, seconds):
                for column in range(2):
                    emitted = output.token_ids[:, column].cpu().long()
                    emitted = emitted[emitted >= 0]
                    counts[column] += torch.bincount(emitted, minlength=len(p)).double()
    except Exception as error:
        return one_line(error)
    for column, wanted in enumerate(target[:2].double()):
        wanted = wanted * counts[column].sum()
        statistic = ((counts[column] - wanted) ** 2 / wanted).sum()
        freedom = torch.tensor((len(p) - 1) / 2, dtype=torch.float64)
        p_value = float(torch.special.gammaincc(freedom, statistic / 2))
        if not p_value > ALPHA:
            return (
                f"wrong distribution: token {column + 1} of {int(counts[column].sum())} "
                f"differs from the target's (chi-square, p = {p_value:.1e})"
            )
    return None


def _draws(function, target, draft, device, seconds, size=2048, requests=60_000) -> Iterator:
    stop = time.perf_counter() + seconds
    for _ in range(-(-requests // size)):
        ids = torch.stack([row.multinomial(size, replacement=True) for row in draft], dim=1)
        yield function(
            draft_token_ids=ids.to(device),
            draft_probs=draft.repeat(size, 1, 1).to(device),
            target_probs=target.repeat(size, 1, 1).to(device),
            uniforms=torch.rand(size, 3).to(device),
        )
        if time.perf_counter() > stop:
            return


def poison(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _poison_free_memory(inputs: dict[str, torch.Tensor]) -> None:
    # Allocators hand out recently freed blocks first: an output that is never written shows.
    ids = inputs["draft_token_ids"]
    device, (size, length) = ids.device, ids.shape
    blocks = [
        torch.full(shape, -77, dtype=dtype, device=device)
        for dtype in (ids.dtype, torch.int32)
        for shape in ((size, length + 1), (size,))
        for _ in range(4)
    ]
    del blocks
