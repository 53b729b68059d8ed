"""The profile: its stages add up, its words follow from its numbers, its commands run."""

import json

import pytest
import torch

import profile_rejection_sampling
from src import samplers
from src.benchmarking import plots, profile_tables, profiling, results, tables, timing, workloads

SMOKE = ["--smoke", "--device", "cpu"]
TINY = workloads.Workload(2, 3, 300)


@pytest.fixture(autouse=True)
def torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_smoke_profile_writes_stages_kernels_a_roofline_and_a_trace(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    argv = [*SMOKE, "--batch-sizes", "2", "--output", str(tmp_path), "--trace", str(trace)]
    assert profile_rejection_sampling.main(argv) == 0
    result = results.load(next(tmp_path.glob("*/profile_rejection_sampling-smoke.json")))
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    assert {row["sampler"] for row in timed} == {"baseline", "vectorized", "cpp"}
    for row in timed:
        total = sum(row["stages_us"].values())
        assert total == pytest.approx(row["latency_us"]["median"], rel=0.01)
        assert row["kernels"] and row["kernels"][0]["us"] >= row["kernels"][-1]["us"]
    rungs = [row for row in result["rows"] if row["sampler"].startswith("planned-")]
    assert len(rungs) == 2 and all("run on cuda" in row["reason"] for row in rungs)
    assert next(tmp_path.glob("*/*.png")).read_bytes().startswith(b"\x89PNG")
    assert "vectorized" in trace.read_text() and json.loads(trace.read_text())["traceEvents"]
    assert "| Method " in capsys.readouterr().out


def test_only_what_checks_in_python_has_validation_time():
    inputs = workloads.make_inputs(TINY, "cpu", 0)
    assert profiling.validation_us(samplers.get("vectorized").load(), inputs) > 0
    assert profiling.validation_us(samplers.get("cpp").load(), inputs) is None


def test_an_operator_of_the_extension_is_found_by_name():
    sample = samplers.get("cpp").load()
    prof = profiling.profiled(sample, [workloads.make_inputs(TINY, "cpu", 0)], "cpu")
    found = {kernel["name"]: kernel["calls"] for kernel in profiling.kernels(prof, "cpu")}
    assert found["fused_rejection::rejection_sample"] == 1
    stages = profiling.host_stages(prof, 100.0, None, "cpu")
    assert sum(stages.values()) == pytest.approx(100, abs=0.1) and stages["work"] > 0


def test_nsight_computes_command_runs_this_script_once_for_one_sampler(capsys):
    argv = ["--ncu", "--device", "cpu", "--batch-sizes", "1,16", "--dtype", "bfloat16"]
    assert profile_rejection_sampling.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("ncu --set full ") for line in lines)
    assert "--profile-from-start off" in lines[0] and "--once --samplers cuda" in lines[0]
    assert "--dtype bfloat16" in lines[0] and "--batch-sizes 16" in lines[1]
    assert profile_rejection_sampling.main([*SMOKE, "--once"]) == 2
    assert "wanted --device cuda" in capsys.readouterr().err


def gpu_row(sampler, label, gpu, host, bytes_=1_000_000):
    """A row as a GPU's would be; its figures stand in."""
    row = {"sampler": sampler, "label": label, "status": "ok", "reason": None, "batch_size": 1}
    clock = timing.summary([gpu])
    row |= {"gpu_us": clock, "latency_us": timing.summary([gpu + host]), "bytes": bytes_}
    row |= {"host_us": timing.summary([host]), "floor_us": 2.0, "vocab_size": 128_256}
    row |= {"stages_us": {"dispatch": host - 1, "launch": 1.0}, "spec_length": 8}
    return row | {"kernels": [{"name": "void kernel<float>(int)", "us": gpu, "calls": 1}]}


def test_the_words_follow_from_the_numbers(tmp_path):
    rows = [gpu_row("cuda", "Fast", 4.0, 10.0), gpu_row("vectorized", "Slow", 40.0, 10.0)]
    environment = {"copy_gb_s": 1000.0, "device": "A card", "driver": None, "cuda": None}
    environment |= {"torch": "2", "python": "3", "commit": None, "dirty": None, "utc": "2025-01-01"}
    result = {"script": "profile_rejection_sampling", "environment": environment, "rows": rows}
    fast, slow, batch = profile_tables.words(result)
    assert "2.0 us above the floor of 2.0 us (2.00x)" in fast and "wait for the host" in fast
    assert "25 % of a large copy's bandwidth, not limited by memory" in fast
    assert "dispatch (90 %)" in fast and "wait for the GPU" in slow
    assert batch == "Batch 1: Fast is the fastest by GPU time, 10.0 times faster than Slow."
    rows[0] |= {"gpu_us": timing.summary([1.1]), "floor_us": 1.0}
    assert "near the memory's limit" in profile_tables.words(result)[0]
    assert "kernel<float>" in profile_tables.profile_table(result)
    assert tables.bandwidth_fraction(rows[0], 1000.0) == pytest.approx(0.909, abs=0.001)
    plots.roofline(result, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
