"""Where a call's time goes: host by stage, device by kernel; and the ladder of the kernels."""

from __future__ import annotations

import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from src import contract
from src.benchmarking import sweep, timing, workloads
from src.benchmarking.sweep import Contestant
from src.contract import SamplerOutput, SamplerUnavailable
from src.cuda import fused_sampler

CALLS = 20
TOP_KERNELS = 8
_SPAN = "one sampler call"
# The host's stages by the profiler's names; what fits none of them and has "::" is dispatch: the
# operators between the call and its launch, the samplers' checks in C++, and on a CPU their work.
_STAGES = {
    "launch": re.compile(r"^cu(da)?Launch|^cudaGraphLaunch"),
    "allocation": re.compile(r"^aten::(new_)?empty|^cuda(Malloc|Free)|^cuMem"),
    "waiting": re.compile(r"^cuda(Memcpy|StreamSync|Event)|^aten::(item|_local_scalar_dense)$"),
}
_BETWEEN_CALLS = "cudaDeviceSynchronize"  # the harness's own


def ladder(device: str) -> list[Contestant]:
    """The rungs of docs/kernel.md that are not samplers of their own: one block a row, and the
    vocabulary split over blocks with a workspace in two launches."""
    plans = {
        "planned-one-block": ("One block a row", "workspace", 1),
        "planned-workspace": ("V split over blocks, two launches", "workspace", 0),
    }
    reason = command = None
    try:
        if device != "cuda":
            raise SamplerUnavailable(f"the rungs of the kernel run on cuda, not on {device}")
        fused_sampler.require(device)
    except SamplerUnavailable as error:
        reason, command = error.reason, error.command
    return [
        Contestant(name, label, None if reason else _planned(*plan), True, reason, command)
        for name, (label, *plan) in plans.items()
    ]


def _planned(exchange: str, blocks_per_row: int) -> Callable:
    operator = fused_sampler.operator("rejection_sample_planned")

    def sample(draft_token_ids, draft_probs, target_probs, *, uniforms):
        arguments = (draft_token_ids, draft_probs, target_probs, None, uniforms, None, None, None)
        return SamplerOutput(*operator(*arguments, exchange, blocks_per_row))

    return sample


def add_profiles(
    rows: list[dict],
    cells: list[workloads.Workload],
    entrants: list[Contestant],
    device: str,
    *,
    seed: int,
    trace: Path | None = None,
    nvtx: bool = False,
) -> None:
    """Adds to each timed row of a sweep `stages_us` (host microseconds a call by stage) and
    `kernels` (name, device microseconds and launches a call; on a CPU operators).

    trace: where the last workload's calls are written as a Chrome trace, all samplers in one.
    nvtx: each call is an NVTX range of the sampler's name.
    """
    by_name = {entrant.name: entrant.function for entrant in entrants}
    for cell in cells:
        copies = [workloads.make_inputs(cell, device, seed + i) for i in range(2)]
        mine = [row for row in rows if row["status"] == "ok" and _is_of(row, cell)]
        for row in mine:
            function = by_name[row["sampler"]]
            prof = profiled(function, copies, device, row["sampler"] if nvtx else None)
            host = row["host_us"] or row["latency_us"]
            checking = validation_us(function, copies[0])
            row["stages_us"] = host_stages(prof, host["median"], checking, device)
            row["kernels"] = kernels(prof, device)
    if trace:
        functions = {
            name: f for name, f in by_name.items() if any(r["sampler"] == name for r in mine)
        }
        with _profiler(device) as prof:
            for name, function in functions.items():
                for inputs in copies:
                    with record_function(name):
                        function(**inputs)
                    timing.synchronise(device)
        prof.export_chrome_trace(str(trace))


def _is_of(row: dict, cell: workloads.Workload) -> bool:
    shape = cell._asdict()
    shape["workload"] = shape.pop("name")
    return all(row[key] == value for key, value in shape.items())


def _profiler(device: str) -> profile:
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *cuda])


def profiled(function: Callable, copies: list[dict], device: str, nvtx: str | None = None):
    """torch.profiler's record of CALLS calls, each on an idle device."""
    for inputs in copies:
        function(**inputs)
    with _profiler(device) as prof:
        for i in range(CALLS):
            timing.synchronise(device)
            if nvtx and device == "cuda":
                torch.cuda.nvtx.range_push(nvtx)
            with record_function(_SPAN):
                function(**copies[i % len(copies)])
            if nvtx and device == "cuda":
                torch.cuda.nvtx.range_pop()
        timing.synchronise(device)
    return prof


def host_stages(prof, host_us: float, validation: float | None, device: str) -> dict[str, float]:
    """Microseconds of a call that takes `host_us` without the profiler, by stage.

    The profiler slows what it watches, so it gives the shares only. validation: measured apart, and
    taken out of the time between operators, "python"; None where nothing checks in Python.
    """
    spent = {"python": 0.0, "dispatch": 0.0, "allocation": 0.0, "launch": 0.0, "waiting": 0.0}
    for event in prof.key_averages():
        if event.device_type != DeviceType.CPU or event.key == _BETWEEN_CALLS:
            continue
        stage = next((s for s, names in _STAGES.items() if names.search(event.key)), None)
        if event.key == _SPAN:
            stage = "python"
        elif stage is None and "::" in event.key:
            stage = "dispatch"
        if stage:
            spent[stage] += event.self_cpu_time_total
    scale = host_us / (sum(spent.values()) or 1.0)
    stages = {stage: us * scale for stage, us in spent.items()}
    checking = min(validation or 0.0, stages["python"])
    stages["python"] -= checking
    stages = {"validation": checking, **stages}
    if device == "cpu":  # an operator's own time is its work
        stages["work"] = stages.pop("dispatch")
        stages.pop("launch")
    return {stage: round(us, 3) for stage, us in stages.items()}


def validation_us(function: Callable, inputs: dict, calls: int = 100) -> float | None:
    """Median microseconds of contract.validate for `inputs`, or None where a call of `function`
    does not come through it: the extension checks in C++, and peers by themselves."""
    entered = False
    code = contract.validate.__code__

    def watch(frame, event, _argument):
        nonlocal entered
        entered = entered or (event == "call" and frame.f_code is code)

    sys.setprofile(watch)
    try:
        function(**inputs)
    finally:
        sys.setprofile(None)
    if not entered:
        return None
    samples = []
    for _ in range(calls):
        before = time.perf_counter_ns()
        contract.validate(**inputs)
        samples.append((time.perf_counter_ns() - before) / 1e3)
    return statistics.median(samples)


def kernels(prof, device: str) -> list[dict]:
    """The kernels of a call by time, TOP_KERNELS of them: name, us and launches a call. On a CPU
    the operators, by the time that is their own."""
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    found = []
    for event in prof.key_averages():
        if event.device_type != wanted or event.key == _SPAN:
            continue
        if device == "cpu" and "::" not in event.key:
            continue
        us = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        calls = round(event.count / CALLS, 2)
        found.append({"name": event.key, "us": round(us / CALLS, 3), "calls": calls})
    found = [kernel for kernel in found if kernel["us"] > 0]
    return sorted(found, key=lambda kernel: -kernel["us"])[:TOP_KERNELS]


def isolate(args, cells: list[workloads.Workload], program: list[str]) -> int:
    """--ncu: prints the command lines, one for each workload of the sampler that is to be seen;
    --once: what they run. Returns the exit status."""
    seen = args.entrants[-1:] if not args.samplers else args.entrants
    if args.ncu:
        names = [entrant.name for entrant in seen] if args.samplers else ["cuda"]
        for cell in cells:
            print("\n".join(ncu_command(program, name, cell) for name in names))
        return 0
    if args.device != "cuda":
        print("--once: Nsight Compute sees CUDA only; wanted --device cuda", file=sys.stderr)
        return 2
    for entrant in seen:
        one_launch(entrant.function, cells[0], args.device, args.seed)
    return 0


def one_launch(function: Callable, cell: workloads.Workload, device: str, seed: int) -> None:
    """One call, warm, between cudaProfilerStart and cudaProfilerStop: what ncu_command isolates."""
    inputs = workloads.make_inputs(cell, device, seed)
    for _ in range(timing.WARM_UP_ROUNDS):
        function(**inputs)
    timing.synchronise(device)
    torch.cuda.profiler.start()
    function(**inputs)
    timing.synchronise(device)
    torch.cuda.profiler.stop()


def ncu_command(program: list[str], sampler: str, cell: workloads.Workload) -> str:
    """The Nsight Compute command line for one call of `sampler` in `cell`, with its report file."""
    report = f"{sampler}-b{cell.batch_size}-v{cell.vocab_size}"
    ncu = [
        "ncu",
        "--set",
        "full",
        "--profile-from-start",
        "off",
        "--export",
        report,
        "--force-overwrite",
    ]
    options = ["--device", "cuda", "--once", "--samplers", sampler, "--dtype", cell.dtype]
    options += ["--acceptance", cell.acceptance, "--batch-sizes", str(cell.batch_size)]
    options += ["--spec-length", str(cell.spec_length), "--vocab-size", str(cell.vocab_size)]
    return shlex.join([*ncu, "python", *program, *options])


def all_contestants(args) -> list[Contestant]:
    """The samplers asked for and, where none were, the ladder of docs/kernel.md in its order."""
    if args.samplers:
        return args.entrants
    rungs = sweep.contestants(["cuda-thread-per-row"], args.device) + ladder(args.device)
    names = [entrant.name for entrant in args.entrants]
    at = names.index("cuda") if "cuda" in names else len(names)
    return args.entrants[:at] + rungs + args.entrants[at:]
