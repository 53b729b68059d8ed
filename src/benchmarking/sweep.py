"""A workload at a time: inputs, checks, times; a row for every sampler, whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from src import oracle, samplers
from src.benchmarking import checks, environment, timing, workloads
from src.benchmarking.workloads import Workload
from src.contract import SamplerUnavailable
from src.cuda import floor

Judge = Callable[..., str | None]

BASELINE = "baseline"
# They read values back while they work, so no CUDA graph can hold them: latency only.
SYNCHRONISING = {BASELINE}
GRAPH_REPLAYS = 30
MOST_S = 10.0
FLOOR_BLOCKS = (1, 2, 4, 8, 16, 32, 64)


# A large copy that is this much slower after a cell's times than before the run: somebody else is
# on the card, or it is throttled.
SLOWER_COPY = 0.9


class Contestant(NamedTuple):
    """A sampler in a run: `function` is None where it cannot run, with the reason and, where there
    is one, the command that mends it.

    exact: it takes the uniforms, so that its tokens are the oracle's; else it is held to what is
    valid, and its distribution is tested before the first workload.
    prepare: takes the arguments of `function` and returns a function of none, whose calls are what
    is timed; None where calls of `function` are.
    """

    name: str
    label: str
    function: Callable | None
    capturable: bool = True
    reason: str | None = None
    command: str | None = None
    exact: bool = True
    status: str = "skipped"  # where function is None
    prepare: Callable | None = None


def contestants(names: Iterable[str], device: str) -> list[Contestant]:
    """The samplers of these names for `device`. Raises ValueError for a name that is not known."""
    return [contestant(samplers.get(name), device) for name in names]


def contestant(sampler, device: str, *, exact: bool = True) -> Contestant:
    """A registry's entry (name, label, load; capturable, unless it is by its name) as one that
    runs, or as one that says why not."""
    capturable = getattr(sampler, "capturable", sampler.name not in SYNCHRONISING)
    try:
        function, reason, command = sampler.load(device), None, None
    except SamplerUnavailable as error:
        function, reason, command = None, error.reason, error.command
    return Contestant(sampler.name, sampler.label, function, capturable, reason, command, exact)


class Problem(NamedTuple):
    """What is sampled: how inputs for a workload are made, what the oracle says about them, what
    that says about the workload, and the functions whose best is its floor. rows_touched: V-rows of
    a request that any sampler has to read, at least."""

    make_inputs: Callable[[Workload, str, int], dict]
    expected: Callable[[dict], oracle.OracleOutput]
    facts: Callable[[Workload, list], dict]
    floors: Callable[[list[dict], list], dict[str, Callable]]
    epsilon: float | None = None  # of oracle.disagreements
    rows_touched: int = 1

    def judge(self, entrant: Contestant, copies: list[dict], expected: list) -> Judge:
        """A function of outputs and, unless they are of the copies in their order, of the numbers
        of their copies; it returns what is wrong with them, or None."""

        def judge(outputs: list, indices: Iterable[int] | None = None) -> str | None:
            indices = range(len(copies)) if indices is None else indices
            if entrant.exact:
                return checks.disagreement(outputs, [expected[i] for i in indices], self.epsilon)
            return checks.invalid(outputs, [copies[i] for i in indices])

        return judge


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
    problem: Problem | None = None,
    leave_out: Callable[[Workload, Contestant], str | None] = lambda cell, entrant: None,
    copy_gb_s: float | None = None,
    budget_s: float = 20.0,
) -> list[dict]:
    """Rows of a result file (schema 1), by workload and then in the order of `entrants`.

    A row has status "ok", "failed" (wrong answer or an error) or "skipped" (cannot run here); the
    latter two have a reason, a command where one mends it, and null for every figure.

    problem: PROBABILITIES unless given.
    leave_out: the reason for which an entrant has no place in a workload, or None.
    budget_s: after this many seconds a workload's latencies are measured no further, and neither
        are its host times and its GPU times, which take at most MOST_S.
    copy_gb_s: of this run, to notice on a GPU that somebody else uses it.
    """
    rows = []
    entrants = [_proven(entrant, device) for entrant in entrants]
    for workload in cells:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # each shape compiled for itself, and no recompilation limit
        present = []
        for entrant in entrants:
            reason = leave_out(workload, entrant) if entrant.function else None
            out = {"function": None, "reason": reason, "status": "skipped"}
            present.append(entrant._replace(**out) if reason else entrant)
        clock = {"runs": runs, "budget_s": budget_s}
        measured = _measure(workload, present, device, seed, problem or PROBABILITIES, clock)
        if device == "cuda":
            torch.cuda.empty_cache()
            if copy_gb_s and timing.copy_gb_s(device) < SLOWER_COPY * copy_gb_s:
                for row in measured:
                    warn(row, "a large copy was slower afterwards: the card is busy or throttled")
        rows += measured
    return rows


def warn(row: dict, text: str) -> None:
    """Adds to what a timed row has to say about its time."""
    if row["status"] == "ok":
        row["warning"] = "; ".join(filter(None, [row["warning"], text]))


def _proven(entrant: Contestant, device: str) -> Contestant:
    if entrant.exact or entrant.function is None:
        return entrant
    problem = checks.distribution(entrant.function, device)
    failed = {"function": None, "reason": problem, "status": "failed"}
    return entrant._replace(**failed) if problem else entrant


# Between the samplers' turns, so that the processor's caches are as cold for it as for them.
_ADD = "torch.add"


def _measure(
    workload: Workload,
    entrants: list[Contestant],
    device: str,
    seed: int,
    problem: Problem,
    clock: dict,
) -> list[dict]:
    rows = {entrant.name: empty_row(workload, entrant) for entrant in entrants}
    runnable = {e.name: e for e in entrants if e.function is not None}
    if not runnable:
        return list(rows.values())
    try:
        make, touched = problem.make_inputs, problem.rows_touched
        copies = workloads.make_copies(workload, device, seed, make, touched)
        backlog, stall = timing.make_backlog(device), timing.make_stall(device)
        expected = [problem.expected(inputs) for inputs in copies]
    except (workloads.TooLarge, torch.OutOfMemoryError, MemoryError) as error:
        for name in runnable:
            _stop(rows[name], "skipped", checks.one_line(error))
        return list(rows.values())
    facts = problem.facts(workload, expected)
    facts["copies"] = len(copies)
    cold = device == "cuda" and workloads.are_cold(workload, len(copies), problem.rows_touched)
    facts["cold"] = cold if device == "cuda" else None
    judges = {name: problem.judge(entrant, copies, expected) for name, entrant in runnable.items()}
    for name, entrant in runnable.items():
        rows[name].update(facts)
        wrong = checks.check(entrant.function, copies, judges[name], stall)
        if wrong:
            _stop(rows[name], "failed", wrong)

    timed = {}
    for name, entrant in runnable.items():
        if rows[name]["status"] == "ok":
            try:
                timed[name] = _prepared(entrant, copies)
            except Exception as error:
                _stop(rows[name], "failed", f"while prepared: {checks.one_line(error)}")

    def passing():
        return {name: f for name, f in timed.items() if rows[name]["status"] == "ok"}

    try:
        add = {_ADD: timing.add_of_one_element(device)} if device == "cuda" else {}
        latencies, last = timing.latencies({**passing(), **add}, copies, device, **clock)
        if device == "cuda":
            del last[_ADD]
            shortest = timing.summary(latencies[_ADD])["median"]
            for name in passing():
                rows[name]["torch_add_latency_us"] = shortest
            queueing = {n: f for n, f in passing().items() if runnable[n].capturable}
            budget = {"budget_s": min(MOST_S, clock["budget_s"])}
            host = timing.host_times({**queueing, **add}, copies, device, **budget)
            for name in queueing:
                rows[name]["host_us"] = host[name]
                rows[name]["torch_add_us"] = host[_ADD]["median"]
    except Exception as error:
        # Turns are shared, so who raised is not known; every row says what happened.
        for name in passing():
            _stop(rows[name], "failed", f"while timed: {checks.one_line(error)}")
        return list(rows.values())
    for name, (copy, output) in last.items():
        wrong = judges[name]([output], [copy])
        if wrong:
            _stop(rows[name], "failed", f"in the last timed call: {wrong}")
        else:
            rows[name]["latency_us"] = timing.summary(latencies[name])

    if device == "cuda":
        candidates = {n: f for n, f in passing().items() if runnable[n].capturable}
        readers = problem.floors(copies, expected)
        most = min(MOST_S, clock["budget_s"])
        _add_gpu_times(rows, candidates, judges, readers, copies, backlog, most)
    _add_speedups(rows)
    return list(rows.values())


def _prepared(entrant: Contestant, copies: list[dict]) -> Callable:
    """What is timed, a function of a copy's inputs."""
    if entrant.prepare is None:
        return entrant.function
    calls = {inputs["uniforms"].data_ptr(): entrant.prepare(**inputs) for inputs in copies}

    def call(uniforms, **_others):
        return calls[uniforms.data_ptr()]()

    return call


def _add_gpu_times(rows, candidates, judges, readers, copies, backlog, budget_s=MOST_S) -> None:
    captured = {}
    for name, function in {**candidates, **readers}.items():
        latency = rows[name]["latency_us"]["median"] if name in rows else None
        try:
            calls = timing.CapturedCalls(function, copies, latency)
            wrong = None if name in readers else _check_replay(calls, judges[name])
        except Exception as error:
            # Latency stands: the calls that it timed gave the right tokens.
            if name in rows:
                rows[name]["reason"] = f"no GPU time: {checks.one_line(error)}"
            continue
        if wrong:
            _stop(rows[name], "failed", f"in a CUDA graph: {wrong}")
        else:
            captured[name] = calls
    times = timing.gpu_times(captured, backlog, runs=GRAPH_REPLAYS, budget_s=budget_s)
    state = environment.gpu_state()
    medians = [timing.summary(times.pop(name))["median"] for name in readers if name in times]
    floor_us = min(medians, default=None)
    for row in rows.values():
        if row["status"] == "ok":
            row["floor_us"], row["gpu_state"] = floor_us, state
            if state and state["throttled"]:
                warn(row, f"the card was throttled ({state['celsius']} C)")
    for name, samples in times.items():
        rows[name]["gpu_us"] = timing.summary(samples)
        # The replayed outputs stay checked: nothing may have been overwritten meanwhile.
        wrong = judges[name](captured[name].outputs, captured[name].indices)
        if wrong:
            _stop(rows[name], "failed", f"after timed replays: {wrong}")


def _check_replay(calls: timing.CapturedCalls, judge: Callable) -> str | None:
    for output in calls.outputs:
        for tensor in output:
            checks.poison(tensor)
    calls.replay()
    torch.cuda.synchronize()
    return judge(calls.outputs, calls.indices)


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


def empty_row(workload: Workload, entrant: Contestant) -> dict:
    shape = workload._asdict()
    return {
        "sampler": entrant.name,
        "label": entrant.label,
        "workload": shape.pop("name"),
        **shape,
        "status": entrant.status if entrant.function is None else "ok",
        "reason": entrant.reason,
        "command": entrant.command,
        "warning": None,
        "exact": entrant.exact,
        "gpu_us": None,
        "latency_us": None,
        "host_us": None,
        "torch_add_us": None,
        "torch_add_latency_us": None,
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
    times = dict.fromkeys(("gpu_us", "latency_us", "host_us", "floor_us"))
    row.update(status=status, reason=reason, **times)


PROBABILITIES = Problem(workloads.make_inputs, checks.expected_outputs, measured_facts, floors)


def _add_speedups(rows: dict[str, dict]) -> None:
    reference = rows.get(BASELINE)
    if not reference or not reference["latency_us"]:
        return
    for row in rows.values():
        if row["latency_us"]:
            ratio = reference["latency_us"]["median"] / row["latency_us"]["median"]
            row["speedup"] = round(ratio, 3)
