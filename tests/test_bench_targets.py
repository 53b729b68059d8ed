"""The two sweeps with targets: their cells, what is judged and how, and that they run."""

import pytest
import torch

from src import from_logits, oracle
from src.benchmarking import (
    glance,
    kernel,
    logits,
    results,
    sweep,
    tables,
    target_tables,
    timing,
    workloads,
)
from src.benchmarking.sweep import Contestant

SMOKE = ["--smoke", "--device", "cpu"]


@pytest.fixture(autouse=True)
def torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "module, name, count", [(kernel, "kernel", 14 * 3), (logits, "from_logits", 8 * 4)]
)
def test_a_smoke_sweep_checks_every_row_and_writes_its_files(capsys, tmp_path, module, name, count):
    assert module.main([*SMOKE, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No target was judged" in out and "Time is latency: there was no GPU." in out
    path = next(tmp_path.glob(f"*/{name}-smoke.json"))
    result = results.load(path)
    assert result["script"] == name and len(result["rows"]) == count
    assert all(row["status"] == "ok" and row["latency_us"] for row in result["rows"])
    assert result["environment"]["command"].startswith(f"python -m {module.__name__} --smoke")
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_cells_are_those_of_the_targets():
    float32 = [c for c in workloads.KERNEL_CELLS if c.dtype == "float32" and not c.name]
    assert {c.batch_size for c in float32} == {1, 2, 4, 8, 16, 64, 256}
    assert {c.vocab_size for c in float32} == {32_000, 128_256, 151_936} and len(float32) == 21
    assert {c.spec_length for c in float32} == {8}
    others = {(c.vocab_size, c.spec_length, c.acceptance) for c in workloads.KERNEL_CELLS if c.name}
    assert {(100, 1, "medium"), (128_256, 1, "medium")} < others
    assert {(128_256, 8, "all"), (128_256, 8, "none")} < others
    assert {c.dtype for c in workloads.KERNEL_CELLS} == set(workloads.DTYPES)
    assert {(c.batch_size, c.dtype) for c in workloads.LOGITS_CELLS if c.name == "no filter"} == {
        (batch, dtype) for batch in (1, 16, 64) for dtype in ("bfloat16", "float32")
    }


def gpu_row(sampler, gpu, floor=2.0, **others):
    """A row as a GPU's would be; its figures stand in."""
    row = sweep.empty_row(others.pop("cell", workloads.KERNEL_CELLS[0]), Contestant("x", "X", len))
    clocks = {"gpu_us": timing.summary([gpu]), "latency_us": timing.summary([gpu + 20])}
    row |= {"sampler": sampler, "label": sampler.title(), "floor_us": floor, **clocks}
    return row | {
        "bytes": 10**6,
        "acceptance_rate": 0.6,
        "host_us": timing.summary([9.0]),
        "torch_add_us": 3.0,
        **others,
    }


def as_result(rows):
    return {
        "script": "kernel",
        "rows": rows,
        "environment": {"copy_gb_s": 1e3},
    }


def test_the_kernels_target_is_the_larger_of_a_factor_and_a_margin_over_the_floor():
    rows = [gpu_row("cuda", 5.4), gpu_row("cuda", 5.6), gpu_row("cuda", 119.0, floor=100.0)]
    rows += [gpu_row("cuda", 121.0, floor=100.0), gpu_row("vectorized", 1.0)]
    kernel.add_targets(rows)
    assert [row["target_us"] for row in rows] == [5.5, 5.5, 120.0, 120.0, None]
    assert [row["target_met"] for row in rows] == [True, False, True, False, None]
    said = target_tables.kernel_words(as_result([rows[1]]))
    assert said[0] == "Target met in 0 of 1 rows."
    assert "5.6 us, target 5.5 us" in said[1]
    assert "9.0 us a call in the median cell" in said[-1] and "costs 3.0 of them" in said[-1]
    assert said[-1].endswith("met in 1 of 1 rows.")


def test_a_cell_that_the_kernel_loses_is_said():
    rows = [gpu_row("cuda", 10.0), gpu_row("vectorized", 5.0)]
    rows.append(gpu_row("other", 20.0, exact=False))
    kernel.add_targets(rows)
    said = "\n".join(target_tables.kernel_words(as_result(rows)))
    assert "Vectorized is faster by GPU time" in said and "lost to no other" not in said
    text = target_tables.kernel_table(as_result(rows))
    assert "2.00x win (Other)" in text and "0.50x loss" in text and "missed" in text
    rows[1] = gpu_row("vectorized", 50.0)
    kernel.add_targets(rows)
    assert "lost to no other" in "\n".join(target_tables.kernel_words(as_result(rows)))


def test_the_glance_sets_the_kernel_beside_the_fastest_of_other_packages():
    env = {"device": "Card X", "driver": "1", "cuda": "13", "torch": "2", "python": "3"}
    env |= {"commit": "c" * 40, "dirty": False, "utc": "2025-01-01T00:00:00+00:00"}
    rows = [gpu_row("cuda", 10.0), gpu_row("vectorized", 5.0), gpu_row("baseline", 80.0)]
    rows += [gpu_row("slow", 40.0, exact=False), gpu_row("quick", 25.0, exact=False)]
    result = {"script": "from_logits", "rows": rows, "environment": env}
    line, *_, said = glance.glance([result]).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "logits" and cells[3:] == ["10.0", "25.0 (Quick)", "2.5x", "5", "100"]
    assert said.startswith("- Logits: Card X") and "2025-01-01" in said
    alone = result | {"rows": rows[:3]}
    other = result | {"script": "quick_demo"}
    assert glance.glance([alone, other]) == "Nothing recorded on a card yet."


def test_the_python_loop_is_left_out_of_large_batches_with_a_reason():
    loop, fast = (Contestant(name, name, len) for name in ("baseline", "cuda"))
    large = workloads.Workload(64, 8, 1000)
    assert "left out above batch 16" in kernel.too_slow(large, loop)
    assert kernel.too_slow(large, fast) is None
    assert kernel.too_slow(large._replace(batch_size=16), loop) is None


@pytest.mark.parametrize("name", workloads.FILTERS)
def test_the_oracle_of_logits_asked_draft_by_draft_is_the_oracle(name):
    workload = workloads.Workload(6, 3, 200, dtype="bfloat16", name=name)
    inputs = logits.make_inputs(workload, "cpu", 0)
    parts, whole = logits.expected(inputs), oracle.rejection_sample_from_logits(**inputs)
    assert parts.token_ids.tolist() == whole.token_ids.tolist()
    assert parts.num_accepted.tolist() == whole.num_accepted.tolist()
    assert parts.accept_margins == whole.accept_margins


def test_bytes_of_logits_are_a_target_row_a_token_and_the_rejected_draft_row():
    workload = workloads.Workload(2, 3, 1000, dtype="bfloat16", name="no filter")
    one = logits.expected(logits.make_inputs(workload, "cpu", 0))
    found = logits.facts(workload, [one._replace(num_accepted=torch.tensor([3, 1]).numpy())])
    scalars = 2 * (2 * 3) * 2
    assert found["bytes"] == (4 + 2 + 1) * 2000 + scalars
    assert found["bytes_without"] == (4 + 2 + 1 + 3 + 1) * 2000 + scalars


def test_logits_targets_are_for_bfloat16_and_three_times_as_long_with_a_filter():
    plain = next(c for c in workloads.LOGITS_CELLS if c.batch_size == 64 and c.dtype == "bfloat16")
    rows = []
    for cell in (plain, plain._replace(name="top-p 0.9"), plain._replace(dtype="float32")):
        without = {"bytes_without": 2 * 10**6}
        for sampler, us in (("softmax", 400.0), ("cuda-no-logsumexp", 90.0), ("cuda", 70.0)):
            rows.append(gpu_row(sampler, us, cell=cell, **without))
    logits.add_targets(rows)
    assert [row["target_us"] for row in rows] == [None, 100, 60, None, 300, 180, None, None, None]
    assert [row["target_met"] for row in rows[:6]] == [None, True, False, None, True, True]
    assert rows[2]["over_softmax"] == pytest.approx(400 / 70, abs=0.001)
    assert rows[1]["bytes"] == 2 * 10**6 and rows[2]["bytes"] == 10**6
    assert "missed" in target_tables.logits_table(as_result(rows))


def test_a_wrong_verifier_of_logits_is_a_failed_row():
    sample = from_logits.get("vectorized").load().rejection_sample_from_logits

    def draft_and_target_swapped(target_logits, draft_logits, **inputs):
        swapped = torch.cat([draft_logits, target_logits[:, -1:]], dim=1)
        return sample(target_logits=swapped, draft_logits=target_logits[:, :-1], **inputs)

    cell = workloads.Workload(4, 3, 500, name="no filter")
    entrants = [Contestant("wrong", "Wrong", draft_and_target_swapped)]
    options = {"runs": 2, "seed": 0, "problem": logits.PROBLEM}
    row = sweep.run([cell], entrants, "cpu", **options)[0]
    assert row["status"] == "failed" and "wrong tokens" in row["reason"]


def test_the_batch_table_says_what_a_torch_add_would_take_in_the_kernels_place():
    row = gpu_row("cuda", 6.0, speedup=20.0, torch_add_latency_us=13.0)
    said = tables.batch_table(as_result([row])).splitlines()[-1]
    assert "torch.add" in said and "13.0 us, Cuda 26.0" in said
    assert "20.0 times as fast as the Python loop, the add 40.0" in said
    before = gpu_row("cuda", 6.0, speedup=20.0)  # as earlier results have it
    before.pop("torch_add_latency_us")
    assert "torch.add" not in tables.batch_table(as_result([before]))
