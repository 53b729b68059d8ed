"""A workload at a time: inputs, checks, times; a row for every sampler, whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from src import samplers
from src.benchmarking import checks, environment, timing, workloads
from src.benchmarking.workloads import Workload
from src.contract import SamplerUnavailable
from src.cuda import floor

BASELINE = "baseline"
# They read values back while they work, so no CUDA graph can hold them: latency only.
SYNCHRONISING = {BASELINE}
GRAPH_REPLAYS = 30
FLOOR_BLOCKS = (1, 2, 4, 8, 16, 32, 64)


class Contestant(NamedTuple):
    """A sampler in a run: `function` is None where it cannot run, with the reason and, where there
    is one, the command that mends it."""

    name: str
    label: str
    function: Callable | None
    capturable: bool = True
    reason: str | None = None
    command: str | None = None


def contestants(names: Iterable[str], device: str) -> list[Contestant]:
    """The samplers of these names for `device`. Raises ValueError for a name that is not known."""
    return [_contestant(samplers.get(name), device) for name in names]


def _contestant(sampler: samplers.Sampler, device: str) -> Contestant:
    capturable = sampler.name not in SYNCHRONISING
    try:
        return Contestant(sampler.name, sampler.label, sampler.load(device), capturable)
    except SamplerUnavailable as error:
        reason, command = error.reason, error.command
    return Contestant(sampler.name, sampler.label, None, capturable, reason, command)


def floors(copies: list[dict], expected: list) -> dict[str, Callable]:
    """Functions with a sampler's arguments that only read the rows that matter, by name: one for
    each number of blocks a row, the best of which is the floor. `copies` and their oracle outputs,
    on CUDA. Empty where the extension has no such kernel for them."""
    try:
        rows = {
            inputs["target_probs"].data_ptr(): floor.rows_of(inputs, want)
            for inputs, want in zip(copies, expected, strict=True)
        }
        floor.read_rows(
            copies[0]["draft_probs"], copies[0]["target_probs"], *[*rows.values()][:1], 1
        )
    except (AttributeError, RuntimeError, ValueError):  # not built, or rows are not aligned
        return {}

    def reader(blocks: int) -> Callable:
        def read(draft_probs, target_probs, **_others):
            needed = rows[target_probs.data_ptr()]
            return floor.read_rows(draft_probs, target_probs, needed, blocks)

        return read

    return {f"floor {blocks}": reader(blocks) for blocks in FLOOR_BLOCKS}


def run(
    cells: Iterable[Workload],
    entrants: list[Contestant],
    device: str,
    *,
    runs: int,
    seed: int,
) -> list[dict]:
    """Rows of a result file (schema 1), by workload and then in the order of `entrants`.

    A row has status "ok", "failed" (wrong answer or an error) or "skipped" (cannot run here); the
    latter two have a reason, a command where one mends it, and null for every figure.
    """
    rows = []
    for workload in cells:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # each shape compiled for itself, and no recompilation limit
        rows += _measure(workload, entrants, device, runs, seed)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _measure(
    workload: Workload, entrants: list[Contestant], device: str, runs: int, seed: int
) -> list[dict]:
    rows = {entrant.name: _empty_row(workload, entrant) for entrant in entrants}
    runnable = {e.name: e for e in entrants if e.function is not None}
    try:
        copies = workloads.make_copies(workload, device, seed)
        backlog = timing.make_backlog(device)
        expected = [checks.expected_outputs(inputs) for inputs in copies]
    except (workloads.TooLarge, torch.OutOfMemoryError, MemoryError) as error:
        for name in runnable:
            _stop(rows[name], "skipped", checks.one_line(error))
        return list(rows.values())
    facts = measured_facts(workload, expected)
    facts["copies"] = len(copies)
    facts["cold"] = workloads.are_cold(workload, len(copies)) if device == "cuda" else None
    for name, entrant in runnable.items():
        rows[name].update(facts)
        problem = checks.check(entrant.function, copies, expected, backlog)
        if problem:
            _stop(rows[name], "failed", problem)

    def passing():
        return {n: e.function for n, e in runnable.items() if rows[n]["status"] == "ok"}

    try:
        latencies, last = timing.latencies(passing(), copies, device, runs=runs)
    except Exception as error:
        # Turns are shared, so who raised is not known; every row says what happened.
        for name in passing():
            _stop(rows[name], "failed", f"while timed: {checks.one_line(error)}")
        return list(rows.values())
    for name, (copy, output) in last.items():
        problem = checks.disagreement([output], [expected[copy]])
        if problem:
            _stop(rows[name], "failed", f"in the last timed call: {problem}")
        else:
            rows[name]["latency_us"] = timing.summary(latencies[name])

    if device == "cuda":
        _add_gpu_times(rows, passing(), runnable, copies, expected, backlog)
    _add_speedups(rows)
    return list(rows.values())


def _add_gpu_times(rows, functions, entrants, copies, expected, backlog) -> None:
    captured = {}
    readers = floors(copies, expected)
    candidates = {n: f for n, f in functions.items() if entrants[n].capturable}
    for name, function in {**candidates, **readers}.items():
        try:
            calls = timing.CapturedCalls(function, copies)
            problem = None if name in readers else _check_replay(calls, expected)
        except Exception as error:
            # Latency stands: the calls that it timed gave the right tokens.
            if name in rows:
                rows[name]["reason"] = f"no GPU time: {checks.one_line(error)}"
            continue
        if problem:
            _stop(rows[name], "failed", f"in a CUDA graph: {problem}")
        else:
            captured[name] = calls
    times = timing.gpu_times(captured, backlog, runs=GRAPH_REPLAYS)
    state = environment.gpu_state()
    medians = [timing.summary(times.pop(name))["median"] for name in readers if name in times]
    floor_us = min(medians, default=None)
    for row in rows.values():
        if row["status"] == "ok":
            row["floor_us"], row["gpu_state"] = floor_us, state
            if state and state["throttled"]:
                row["warning"] = f"the card was throttled ({state['celsius']} C)"
    for name, samples in times.items():
        rows[name]["gpu_us"] = timing.summary(samples)
        # The replayed outputs stay checked: nothing may have been overwritten meanwhile.
        problem = checks.disagreement(captured[name].outputs, _cycled(expected, captured[name]))
        if problem:
            _stop(rows[name], "failed", f"after timed replays: {problem}")


def _check_replay(calls: timing.CapturedCalls, expected: list) -> str | None:
    for output in calls.outputs:
        for tensor in output:
            checks.poison(tensor)
    calls.replay()
    torch.cuda.synchronize()
    return checks.disagreement(calls.outputs, _cycled(expected, calls))


def _cycled(expected: list, calls: timing.CapturedCalls) -> list:
    return [expected[i % len(expected)] for i in range(calls.count)]


def measured_facts(workload: Workload, expected: list) -> dict:
    """What the oracle's outputs say about the inputs.

    acceptance_rate: accepted drafts over drafts examined (those up to the first rejection);
    tokens_per_step: emitted tokens a request; bytes: what the algorithm must touch in one call, in
    the mean of the copies: two V-rows for a rejected request, one for an accepted one, 2K scalars.
    """
    size, length = workload.batch_size, workload.spec_length
    counts = [int(n) for want in expected for n in want.num_accepted]
    accepted, rejected = sum(counts), sum(n < length for n in counts)
    examined = accepted + rejected
    per_call_rows = size + rejected / len(expected)
    scalars = 2 * length * size * workloads.DTYPES[workload.dtype].itemsize
    return {
        "acceptance_rate": round(accepted / examined, 4) if examined else None,
        "tokens_per_step": round(accepted / len(counts) + 1, 4),
        "bytes": round(per_call_rows * workload.row_bytes + scalars),
    }


def _empty_row(workload: Workload, entrant: Contestant) -> dict:
    shape = workload._asdict()
    return {
        "sampler": entrant.name,
        "label": entrant.label,
        "workload": shape.pop("name"),
        **shape,
        "status": "skipped" if entrant.function is None else "ok",
        "reason": entrant.reason,
        "command": entrant.command,
        "warning": None,
        "gpu_us": None,
        "latency_us": None,
        "floor_us": None,
        "bytes": None,
        "acceptance_rate": None,
        "tokens_per_step": None,
        "speedup": None,
        "copies": None,
        "cold": None,
        "gpu_state": None,
    }


def _stop(row: dict, status: str, reason: str) -> None:
    row.update(status=status, reason=reason, gpu_us=None, latency_us=None, floor_us=None)


def _add_speedups(rows: dict[str, dict]) -> None:
    reference = rows.get(BASELINE)
    if not reference or not reference["latency_us"]:
        return
    for row in rows.values():
        if row["latency_us"]:
            ratio = reference["latency_us"]["median"] / row["latency_us"]["median"]
            row["speedup"] = round(ratio, 3)
