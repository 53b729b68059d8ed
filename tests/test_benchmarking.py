"""The harness itself: it must catch what it is there to catch."""

import errno
import json
import os
import time

import numpy as np
import pytest
import torch

from src import oracle, samplers
from src.benchmarking import checks, compare, report, results, sweep, tables, timing, workloads
from src.benchmarking.sweep import Contestant
from src.benchmarking.workloads import Workload
from src.contract import SamplerOutput

TINY = Workload(3, 4, 500, name="tiny")
vectorized = samplers.get("vectorized").load()


def wrong_token(**inputs):
    output = vectorized(**inputs)
    last = output.num_accepted.long()[:, None]
    return output._replace(token_ids=output.token_ids.scatter(1, last, 7))


def accepts_one_too_few(**inputs):
    output = vectorized(**inputs)
    return output._replace(num_accepted=output.num_accepted - 1)


def never_writes_its_output(**inputs):
    output = vectorized(**inputs)
    return SamplerOutput(*(torch.empty_like(tensor) for tensor in output))


class OverwritesItsLastOutput:
    def __init__(self):
        self.buffers = None

    def __call__(self, **inputs):
        output = vectorized(**inputs)
        self.buffers = self.buffers or output
        for buffer, tensor in zip(self.buffers, output, strict=True):
            buffer.copy_(tensor)
        return self.buffers


class ReturnsItsFirstOutput:
    def __init__(self):
        self.first = None

    def __call__(self, **inputs):
        self.first = self.first or vectorized(**inputs)
        return self.first


def mutates_its_inputs(**inputs):
    output = vectorized(**inputs)
    inputs["target_probs"][0, 0, 0] += 1
    return output


def raises(**inputs):
    raise RuntimeError("out of\nluck")


def wrong_shape(**inputs):
    output = vectorized(**inputs)
    return output._replace(token_ids=output.token_ids[:, :-1])


class WrongOnceWarm:
    """Right while it is checked, one call for each copy, and wrong when the clock runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, **inputs):
        self.calls += 1
        copies = -(-workloads.MIN_REQUESTS // TINY.batch_size)
        return (vectorized if self.calls <= copies else wrong_token)(**inputs)


PLANTED = {
    "wrong_token": (wrong_token, "drew 7"),
    "accepts_one_too_few": (accepts_one_too_few, "wrong tokens"),
    "never_writes_its_output": (never_writes_its_output, "wrong tokens"),
    "overwrites_its_last_output": (OverwritesItsLastOutput(), "wrong tokens"),
    "returns_its_first_output": (ReturnsItsFirstOutput(), "wrong tokens"),
    "mutates_its_inputs": (mutates_its_inputs, "changed its input target_probs"),
    "raises": (raises, "RuntimeError: out of luck"),
    "wrong_shape": (wrong_shape, "shapes"),
    "wrong_once_warm": (WrongOnceWarm(), "in the last timed call"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_a_failed_row_without_time(name):
    function, message = PLANTED[name]
    entrants = [*sweep.contestants(["baseline"], "cpu"), Contestant(name, name, function, False)]
    good, bad = sweep.run([TINY], entrants, "cpu", runs=3, seed=1)
    assert good["status"] == "ok" and good["speedup"] == 1
    assert bad["status"] == "failed" and message in bad["reason"]
    assert bad["latency_us"] is None and bad["speedup"] is None
    assert f"{name} failed" in tables.notes([good, bad])[0]


def test_a_sampler_that_cannot_run_is_a_skipped_row_with_its_reason():
    entrants = sweep.contestants(["baseline", "cuda"], "cpu")
    rows = sweep.run([TINY], entrants, "cpu", runs=2, seed=0)
    assert [row["status"] for row in rows] == ["ok", "skipped"]
    assert "not on cpu" in rows[1]["reason"]
    assert "skipped" in tables.method_table({"rows": rows})


def test_inputs_that_do_not_fit_are_skipped_rows(monkeypatch):
    monkeypatch.setattr(workloads, "memory_budget", lambda device: 1000)
    rows = sweep.run([TINY], sweep.contestants(["baseline"], "cpu"), "cpu", runs=2, seed=0)
    assert rows[0]["status"] == "skipped" and "GiB" in rows[0]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_sampler_on_a_stream_of_its_own_is_caught():
    side = torch.cuda.Stream()

    def elsewhere(**inputs):
        with torch.cuda.stream(side):
            return vectorized(**inputs)

    copies = [workloads.make_inputs(TINY, "cuda", seed) for seed in range(8)]
    expected = [checks.expected_outputs(inputs) for inputs in copies]
    judge = sweep.PROBABILITIES.judge(Contestant("x", "X", vectorized), copies, expected)
    stall = timing.make_stall("cuda")
    assert checks.check(vectorized, copies, judge, stall) is None
    assert checks.check(elsewhere, copies, judge, stall)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_gpu_only_what_can_be_captured_has_gpu_time():
    entrants = sweep.contestants(["baseline", "vectorized"], "cuda")
    baseline, captured = sweep.run([Workload(4, 4, 32_000)], entrants, "cuda", runs=3, seed=0)
    assert baseline["status"] == captured["status"] == "ok"
    assert baseline["gpu_us"] is None and captured["gpu_us"]["median"] > 0
    assert captured["gpu_us"]["median"] < captured["latency_us"]["median"]
    assert captured["cold"]


class CallsWithoutAGraph:
    """timing.CapturedCalls for a machine with no card: replay calls and copies into outputs."""

    def __init__(self, function, copies, call_us=None):
        if function is raises:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.function, self.copies = function, copies
        self.indices = [i % len(copies) for i in range(2 * len(copies))]
        self.outputs = self.call()

    def call(self):
        return [self.function(**self.copies[i]) for i in self.indices]

    def replay(self):
        for output, again in zip(self.outputs, self.call(), strict=True):
            for tensor, value in zip(output, again, strict=True):
                tensor.copy_(value)


class ReplaysNothing(CallsWithoutAGraph):
    def replay(self):
        pass


def gpu_rows(monkeypatch, calls, functions, readers=None):
    def times(captured, backlog, *, runs, budget_s):
        return {name: [10.0, 20.0, 30.0] for name in captured}

    monkeypatch.setattr(timing, "CapturedCalls", calls)
    monkeypatch.setattr(timing, "gpu_times", times)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copies = [workloads.make_inputs(TINY, "cpu", seed) for seed in range(3)]
    expected = [checks.expected_outputs(inputs) for inputs in copies]
    rows, judges = {}, {}
    for name, function in functions.items():
        entrant = Contestant(name, name, function)
        rows[name] = sweep.empty_row(TINY, entrant) | {"latency_us": timing.summary([50.0])}
        judges[name] = sweep.PROBABILITIES.judge(entrant, copies, expected)
    sweep._add_gpu_times(rows, functions, judges, readers or {}, copies, None)
    return rows


def test_gpu_time_is_for_checked_replays_and_latency_outlives_a_failed_capture(monkeypatch):
    readers = {f"floor {blocks}": lambda **inputs: None for blocks in (1, 2)}
    functions = {"good": vectorized, "uncapturable": raises}
    rows = gpu_rows(monkeypatch, CallsWithoutAGraph, functions, readers)
    assert rows["good"]["gpu_us"]["median"] == 20 and rows["good"]["floor_us"] == 20
    assert rows["uncapturable"]["status"] == "ok" and rows["uncapturable"]["latency_us"]
    assert "no GPU time: RuntimeError: operation not permitted" in rows["uncapturable"]["reason"]


def test_a_replay_that_writes_nothing_is_a_failed_row(monkeypatch):
    row = gpu_rows(monkeypatch, ReplaysNothing, {"stale": vectorized})["stale"]
    assert row["status"] == "failed" and "in a CUDA graph: wrong tokens" in row["reason"]
    assert row["latency_us"] is None


def test_a_planted_slowdown_of_a_fifth_is_slower_and_noise_is_the_same():
    noise = np.random.default_rng(0).normal(1, 0.03, 300)
    before, again = timing.summary(100 * noise[:100]), timing.summary(100 * noise[100:200])
    slow = timing.summary(120 * noise[200:])
    assert compare.change(before, again) == "same"
    assert compare.change(before, slow) == "slower"
    assert compare.change(slow, before) == "faster"


def test_a_drift_of_clocks_is_no_change_however_narrow_the_intervals():
    still = {"median": 100.0, "p10": 99.9, "p90": 100.1, "n": 30}
    warm = {"median": 101.0, "p10": 100.9, "p90": 101.1, "n": 30}
    assert compare.change(still, warm) == "same"


def test_comparing_results_names_each_row_and_what_is_missing():
    env = {"device": "CPU"}
    row = sweep.empty_row(TINY, Contestant("a", "A", None))
    timed = {**row, "status": "ok", "latency_us": timing.summary([10, 11, 12])}
    slower = {**timed, "latency_us": timing.summary([20, 21, 22])}
    other = {**timed, "sampler": "b", "label": "B"}
    old, new = ({"environment": env, "rows": rows} for rows in ([timed], [slower, other]))
    text = compare.lines(old, new)
    assert "A, batch 3, vocab 500: latency slower, 11.0 us" in text[0]
    assert text[1].startswith("B, batch 3") and "not in the earlier result" in text[1]
    assert (
        "cannot be compared: ok then, skipped now"
        in compare.lines(old, {"environment": env, "rows": [row]})[0]
    )


def test_every_sampler_takes_turns_at_every_input():
    seen = {"a": [], "b": [], "c": []}
    order = []

    def make(name):
        def function(copy):
            seen[name].append(copy)
            order.append(name)

        return function

    copies = [{"copy": i} for i in range(6)]
    samples, last = timing.latencies({n: make(n) for n in seen}, copies, "cpu", runs=9)
    assert {name: len(values) for name, values in samples.items()} == {"a": 9, "b": 9, "c": 9}
    assert all(set(copies) == set(range(6)) for copies in seen.values())
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(set(r) == set(seen) for r in rounds) and {r[0] for r in rounds} == set(seen)
    assert all(len({seen[name][r] for name in seen}) == 3 for r in range(12))
    assert last["a"][0] == seen["a"][-1]


def test_inputs_are_a_function_of_the_seed_and_acceptance_is_a_dial():
    first, second = (workloads.make_inputs(TINY, "cpu", 3) for _ in range(2))
    other = workloads.make_inputs(TINY, "cpu", 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    rates = []
    for acceptance in ("low", "medium", "high"):
        workload = Workload(64, 8, 2000, acceptance=acceptance)
        inputs = workloads.make_inputs(workload, "cpu", 0)
        expected = [checks.expected_outputs(inputs)]
        rates.append(sweep.measured_facts(workload, expected)["acceptance_rate"])
    assert rates == sorted(rates) and 0.3 < rates[0] < 0.55 and 0.7 < rates[2] < 0.9


def test_bytes_are_two_rows_for_a_rejected_request_and_one_for_an_accepted_one():
    workload = Workload(2, 3, 1000, dtype="bfloat16")
    one = checks.expected_outputs(workloads.make_inputs(workload, "cpu", 0))
    facts = sweep.measured_facts(workload, [one._replace(num_accepted=np.array([3, 1]))])
    assert facts["bytes"] == (1 + 2) * 1000 * 2 + 2 * (2 * 3) * 2
    assert facts["acceptance_rate"] == 0.8 and facts["tokens_per_step"] == 3


@pytest.mark.parametrize("acceptance", ["low", "high", "all", "none"])
def test_the_oracle_asked_draft_by_draft_is_the_oracle(acceptance):
    inputs = workloads.make_inputs(Workload(9, 3, 100, acceptance=acceptance), "cpu", 0)
    whole, parts = oracle.rejection_sample(**inputs), checks.expected_outputs(inputs)
    assert np.array_equal(whole.token_ids, parts.token_ids)
    assert np.array_equal(whole.num_accepted, parts.num_accepted)
    assert whole.recovery_uniforms == parts.recovery_uniforms
    assert whole.accept_margins == parts.accept_margins
    assert all(map(np.array_equal, whole.weights, parts.weights))


def test_the_ends_of_the_dial_accept_every_draft_or_none():
    for acceptance, rate in (("all", 1.0), ("none", 0.0)):
        workload = Workload(16, 4, 500, acceptance=acceptance)
        expected = [checks.expected_outputs(workloads.make_inputs(workload, "cpu", 0))]
        assert sweep.measured_facts(workload, expected)["acceptance_rate"] == rate


def test_a_sampler_with_its_own_randomness_is_held_to_validity_and_distribution():
    def own_numbers(uniforms, **inputs):
        return vectorized(**inputs)

    def accepts_always(uniforms, **inputs):
        return vectorized(uniforms=torch.zeros_like(uniforms), **inputs)

    def pads_with_zeros(uniforms, **inputs):
        output = vectorized(**inputs)
        return output._replace(token_ids=output.token_ids.clamp(min=0))

    entrants = [
        Contestant(function.__name__, function.__name__, function, exact=False)
        for function in (own_numbers, accepts_always, pads_with_zeros)
    ]
    good, biased, unpadded = sweep.run([TINY], entrants, "cpu", runs=2, seed=0)
    assert good["status"] == "ok" and good["latency_us"]
    assert biased["status"] == "failed" and "wrong distribution: token 1" in biased["reason"]
    assert unpadded["status"] == "failed" and unpadded["latency_us"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tokens, n: (tokens, n + 9), "num_accepted outside 0 to 4"),
        (lambda tokens, n: (tokens.scatter(1, n.long()[:, None], 500), n), "outside 0 to 499"),
        (lambda tokens, n: (torch.where(tokens < 0, 0, tokens), n), "no padding of -1"),
        (lambda tokens, n: (tokens.roll(1, 0), n.roll(1, 0)), "not the draft's"),
        (lambda tokens, n: (tokens[:, 1:], n), "shapes"),
    ],
)
def test_an_impossible_output_is_invalid(change, message):
    inputs = workloads.make_inputs(TINY, "cpu", 3)
    output = vectorized(**inputs)
    assert checks.invalid([output], [inputs]) is None
    assert message in checks.invalid([change(*output)], [inputs])


def test_what_is_left_out_of_a_workload_is_a_row_that_says_so():
    def too_slow(cell, entrant):
        return "takes seconds" if cell.batch_size > 3 else None

    cells = [TINY, TINY._replace(batch_size=4)]
    entrants = sweep.contestants(["vectorized"], "cpu")
    kept, left = sweep.run(cells, entrants, "cpu", runs=2, seed=0, leave_out=too_slow)
    assert kept["status"] == "ok" and left["status"] == "skipped"
    assert left["reason"] == "takes seconds" and left["latency_us"] is None


def test_rows_have_the_keys_of_the_schema():
    rows = sweep.run([TINY], sweep.contestants(["vectorized"], "cpu"), "cpu", runs=3, seed=0)
    row = json.loads(results.dumps(results.make("x", {}, rows)))["rows"][0]
    wanted = "sampler label batch_size spec_length vocab_size dtype status reason gpu_us latency_us"
    wanted += " floor_us bytes acceptance_rate tokens_per_step speedup"
    assert not set(wanted.split()) - set(row)
    assert row["status"] == "ok" and row["gpu_us"] is None and row["reason"] is None
    assert set(row["latency_us"]) == {"median", "p10", "p90", "n"} and row["latency_us"]["n"] == 3
    assert row["speedup"] is None  # no baseline ran


@pytest.mark.parametrize(
    "error, seen",
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), results.CannotSave),
    ],
    ids=["interrupted", "full disk"],
)
def test_a_write_that_fails_leaves_the_earlier_result(tmp_path, monkeypatch, error, seen):
    path = tmp_path / "result.json"
    results.write_atomically(path, "earlier")

    def interrupted(*arguments):
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(seen):
        results.write_atomically(path, "later")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_result_of_another_commit_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    monkeypatch.setenv("BENCHMARK_COMMIT", "b" * 40)
    path.write_text(results.dumps(results.make("x", {"commit": "a" * 40}, [])))
    with pytest.raises(results.CannotSave, match="recorded at commit aaaaaaaaaaaa.*--overwrite"):
        results.ensure_writable(path, overwrite=False)
    results.ensure_writable(path, overwrite=True)
    monkeypatch.setenv("BENCHMARK_COMMIT", "a" * 40 + "-dirty")
    results.ensure_writable(path, overwrite=False)
    path.write_text("{}")
    with pytest.raises(results.CannotSave, match="not a result file"):
        results.ensure_writable(path, overwrite=False)


def test_a_verdict_is_by_interval():
    def row(*samples):
        return {"latency_us": timing.summary(samples)}

    assert tables.verdict(row(1, 1, 1), row(2, 2, 2)) == "2.00x win"
    assert tables.verdict(row(2, 2, 2), row(1, 1, 1)) == "0.50x loss"
    assert tables.verdict(row(1, 2, 3), row(2, 3, 4)).endswith("same")
    assert tables.verdict(None, row(1)) == "-"


def test_readme_tables_come_from_recorded_results(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:quick_demo -->\nold\n<!-- /table -->\nafter\n")
    recorded = tmp_path / "benchmark_results"
    arguments = ["--readme", str(readme), "--results", str(recorded)]
    assert report.main([*arguments, "--check"]) == 1
    assert "python -m src.benchmarking.report --readme" in capsys.readouterr().err
    assert report.main(arguments) == 0
    assert "Nothing recorded yet" in readme.read_text()
    rows = sweep.run([TINY], sweep.contestants(["baseline"], "cpu"), "cpu", runs=2, seed=0)
    env = {"device": "CPU X", "driver": None, "cuda": None, "torch": "2", "python": "3"}
    env |= {"commit": "c" * 40, "dirty": False, "utc": "2025-01-01T00:00:00+00:00"}
    (recorded / "cpu-x").mkdir(parents=True)
    path = recorded / "cpu-x" / "quick_demo.json"
    path.write_text(results.dumps(results.make("quick_demo", env, rows)))
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /table -->\nafter\n")
    assert "| Baseline (Python loop) |" in text and "CPU X" in text and "old" not in text


def test_the_readme_shows_the_card_that_was_recorded_last(tmp_path, monkeypatch):
    monkeypatch.setattr(report.environment, "is_recorded", lambda path: True)
    rows = sweep.run([TINY], sweep.contestants(["baseline"], "cpu"), "cpu", runs=2, seed=0)
    dates = {"card-a": "2025-01-02", "card-b": "2025-01-03", "cpu-c": "2025-01-04"}
    for device, date in dates.items():
        env = {"device": device, "driver": None, "cuda": None, "torch": "2", "python": "3"}
        env |= {"commit": "c" * 40, "dirty": False, "utc": f"{date}T00:00:00+00:00"}
        (tmp_path / device).mkdir()
        text = results.dumps(results.make("quick_demo", env, rows))
        (tmp_path / device / "quick_demo.json").write_text(text)
    text = report.readme_text("<!-- table:quick_demo -->\n<!-- /table -->", tmp_path)
    assert text.index("card-b,") < text.index("| Baseline") < text.index("Recorded too: [card-a]")
    assert text.index("[card-a]") < text.index("[cpu-c]")


def test_the_readme_has_the_recorded_tables():
    assert report.main(["--readme", "--check"]) == 0


def test_no_difference_is_claimed_below_that_of_two_runs_of_the_same_thing():
    still = {"median": 100.0, "p10": 99.9, "p90": 100.1, "n": 30}
    other = {"median": 110.0, "p10": 109.9, "p90": 110.1, "n": 30}
    row, again = {"latency_us": still, "gpu_us": None}, {"latency_us": other, "gpu_us": None}
    assert compare.repeat([row], [again]) == {"latency_us": 0.1}
    assert compare.change(still, other) == "slower"
    least = compare.least_difference(row, again, clock="latency_us")
    assert compare.change(still, other, least=least + 0.001) == "same"


def test_a_card_that_is_slower_afterwards_warns_on_the_row(monkeypatch):
    row = sweep.empty_row(TINY, Contestant("a", "A", vectorized))
    monkeypatch.setattr(sweep, "_measure", lambda *arguments: [row])
    monkeypatch.setattr(timing, "copy_gb_s", lambda device: 1000.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    entrants = [Contestant("a", "A", vectorized)]
    sweep.run([TINY], entrants, "cuda", runs=1, seed=0, copy_gb_s=1050.0)
    assert row["warning"] is None
    sweep.run([TINY], entrants, "cuda", runs=1, seed=0, copy_gb_s=2000.0)
    assert "busy or throttled" in row["warning"] and "busy" in tables.notes([row])[0]


def test_slow_calls_end_the_hosts_clock_at_its_budget():
    slow = {"slow": lambda: time.sleep(0.005)}
    found = timing.host_times(slow, [{}], "cpu", runs=1000, budget_s=0.02)
    assert found["slow"]["n"] == timing.MIN_ROUNDS


def test_copies_are_as_few_as_the_rows_that_are_read_allow(monkeypatch):
    monkeypatch.setattr(workloads, "memory_budget", lambda device: 2**40)
    monkeypatch.setattr(workloads, "l2_bytes", lambda: 60 * 2**20)
    cell = Workload(1, 8, 128_256, "bfloat16")
    counts = []
    for rows_touched in (1, 2):
        copies = workloads.make_copies(cell, "cuda", 0, lambda *cell: {}, rows_touched)
        assert workloads.are_cold(cell, len(copies), rows_touched)
        counts.append(len(copies))
    assert counts[0] in (2 * counts[1], 2 * counts[1] - 1)
