"""Two figures that are never mixed, for samplers that take turns.

Latency: host clock from the call to the synchronised result, what a Python loop pays.
GPU time: calls captured in a CUDA graph over rotating inputs, divided by their count. Events around
single calls on an idle stream would time the host's launches instead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

WARM_UP_ROUNDS = 3
# Fewer calls a graph would let the start of the replay count for more than about 1 %.
MIN_CALLS_A_GRAPH = 100
# ... and so would a replay shorter than this, which slow calls reach with fewer of them.
MIN_GRAPH_US = 10_000
MIN_ROUNDS = 10


def summary(samples_us: Iterable[float]) -> dict:
    """Median, 10th and 90th percentile in microseconds, and how many samples they come from."""
    samples = np.asarray(list(samples_us), dtype=np.float64)
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return {
        "median": round(float(median), 3),
        "p10": round(float(p10), 3),
        "p90": round(float(p90), 3),
        "n": int(samples.size),
    }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def latencies(
    functions: dict[str, Callable],
    copies: list[dict],
    device: str,
    *,
    runs: int,
    budget_s: float = 20.0,
) -> tuple[dict[str, list[float]], dict[str, tuple[int, object]]]:
    """Microseconds of `runs` calls of each function, one call of each a round.

    After MIN_ROUNDS rounds a run longer than `budget_s` ends early (n says so). Functions start at
    different copies and in rotating order, so that none finds its inputs warmed by another one.
    Also returns, by name, the last timed call's copy number and output, for a check afterwards.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    last: dict[str, tuple[int, object]] = {}
    # torch.cuda.synchronize() would add some microseconds of Python to each sample. Work on another
    # stream would not be waited for: checks.check refuses such a sampler.
    wait = torch.cuda.current_stream().synchronize if device == "cuda" else lambda: None
    stride = max(1, len(copies) // max(1, len(functions)))
    started = None
    for r in range(WARM_UP_ROUNDS + runs):
        if r == WARM_UP_ROUNDS:
            started = time.perf_counter()
        if r >= WARM_UP_ROUNDS + MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for i, name in rotated(list(enumerate(functions)), r):
            copy = (r + i * stride) % len(copies)
            inputs, function = copies[copy], functions[name]
            synchronise(device)
            before = time.perf_counter_ns()
            output = function(**inputs)
            wait()
            after = time.perf_counter_ns()
            last[name] = (copy, output)
            if r >= WARM_UP_ROUNDS:
                samples[name].append((after - before) / 1e3)
    return samples, last


def host_times(
    functions: dict[str, Callable],
    copies: list[dict],
    device: str,
    *,
    runs: int = 50,
    budget_s: float = 10.0,
) -> dict[str, dict]:
    """Summaries of the microseconds until a call returns, its work queued but not waited for: the
    host's share. The device is idle when each call begins. After MIN_ROUNDS rounds a run longer
    than `budget_s` ends early (n says so)."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for r in range(WARM_UP_ROUNDS + runs):
        if r >= WARM_UP_ROUNDS + MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for name, function in rotated(list(functions.items()), r):
            inputs = copies[r % len(copies)]
            synchronise(device)
            before = time.perf_counter_ns()
            function(**inputs)
            after = time.perf_counter_ns()
            if r >= WARM_UP_ROUNDS:
                samples[name].append((after - before) / 1e3)
    synchronise(device)
    return {name: summary(values) for name, values in samples.items()}


def add_of_one_element(device: str) -> Callable:
    """`torch.add` of one element as a sampler: what any call into PyTorch costs."""
    one = torch.ones(1, device=device)
    return lambda **_inputs: torch.add(one, one)


class CapturedCalls:
    """Calls of one sampler over the copies in a CUDA graph; `outputs` are those of each replay.

    call_us: about what a call takes: of slow calls fewer are captured, of the first copies only.
    """

    def __init__(self, function: Callable, copies: list[dict], call_us: float | None = None):
        if call_us and call_us * len(copies) > MIN_GRAPH_US:
            copies = copies[: max(2, math.ceil(MIN_GRAPH_US / call_us))]
        wanted = MIN_CALLS_A_GRAPH
        if call_us:
            wanted = min(wanted, math.ceil(MIN_GRAPH_US / call_us))
        self.count = -(-wanted // len(copies)) * len(copies)
        self.indices = [i % len(copies) for i in range(self.count)]
        # Warm up on a side stream, as torch.cuda.graph's documentation asks for.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in copies[:WARM_UP_ROUNDS]:
                function(**inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.outputs = []
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                for i in self.indices:
                    self.outputs.append(function(**copies[i]))
        except BaseException:
            # torch.cuda.graph leaves its own stream current where ending the capture raises.
            torch.cuda.set_stream(stream)
            raise

    def replay(self) -> None:
        self.graph.replay()


def gpu_times(
    captured: dict[str, CapturedCalls],
    backlog: Callable[[], None],
    *,
    runs: int,
    budget_s: float = 10.0,
) -> dict[str, list[float]]:
    """Microseconds a call, one sample a replay; the captured samplers take turns. After MIN_ROUNDS
    rounds a run longer than `budget_s` ends early (n says so).

    backlog: enqueues work that outlasts the host's launch of a graph, so that the start event is
    reached with the graph already queued, and that leaves none of the inputs in the L2 cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in captured}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started = time.perf_counter()
    for r in range(WARM_UP_ROUNDS + runs):
        if r >= WARM_UP_ROUNDS + MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for name in rotated(list(captured), r):
            calls = captured[name]
            backlog()
            start.record()
            calls.replay()
            end.record()
            end.synchronize()
            if r >= WARM_UP_ROUNDS:
                samples[name].append(start.elapsed_time(end) * 1e3 / calls.count)
    return samples


def make_backlog(device: str) -> Callable[[], None]:
    """Work for the current stream, about 0.3 ms on an H100: a copy larger than any L2 cache."""
    if device != "cuda":
        return lambda: None
    source = torch.zeros(2**29, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def make_stall(device: str) -> Callable[[], None]:
    """Keeps the current stream waiting for about 1 ms while other streams find the card idle: a
    backlog's copy occupies every multiprocessor, and so holds their kernels up too."""
    if device != "cuda":
        return lambda: None
    return lambda: torch.cuda._sleep(2_000_000)  # cycles; what PyTorch's own stream tests use


def copy_gb_s(device: str) -> float:
    """Bandwidth of a large copy in GB/s (10^9), bytes read plus bytes written, median of several:
    the ceiling that the samplers' bytes are held against."""
    size = 2**28
    if device == "cuda":
        size = max(2**26, min(2**30, torch.cuda.mem_get_info()[0] // 8))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    seconds = _copy_seconds_gpu if device == "cuda" else _copy_seconds_host
    return round(2 * size / statistics.median(seconds(source, destination)) / 1e9, 1)


def rotated(items: list, by: int) -> list:
    by %= max(1, len(items))
    return items[by:] + items[:by]


def _copy_seconds_gpu(source, destination, repeats: int = 23) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        destination.copy_(source)
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events[WARM_UP_ROUNDS:], events[WARM_UP_ROUNDS + 1 :], strict=False)
    return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def _copy_seconds_host(source, destination, repeats: int = 7) -> list[float]:
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        destination.copy_(source)
        seconds.append(time.perf_counter() - before)
    return seconds[1:]
