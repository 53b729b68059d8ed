"""The scripts: their errors, their files, and what a pipe and Ctrl-C do to them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import compare_vocab_sizes
import quick_demo
import test_batch_sizes
from src import from_logits, samplers
from src.benchmarking import (
    cli,
    environment,
    logits,
    plots,
    rendering,
    results,
    sweep,
    timing,
    workloads,
)
from src.contract import SamplerUnavailable
from src.peers.adapter import Adapter, LogitsAdapter

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", "2", "--spec-length", "2", "--vocab-size", "100", "--runs", "3"]
SMALL += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fails(capsys, *argv):
    """The one line of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        quick_demo.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch-size", "0"], "--batch-size: wanted an integer of at least 1, got '0'"),
        (["--vocab-size", "many"], "--vocab-size: wanted an integer of at least 1, got 'many'"),
        (["--runs", "-3"], "--runs: wanted an integer of at least 1, got '-3'"),
        (["--samplers", "fast"], "sampler 'fast' is not known; wanted one of baseline"),
        (["--samplers", ","], "at least one name"),
        (["--dtype", "int8"], "dtype 'int8' is not known; wanted one of float32, bfloat16"),
        (["--device", "tpu"], "device 'tpu' is not known; wanted one of cpu, cuda"),
        (["--acceptance", "1"], "acceptance '1' is not known; wanted one of low"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(capsys, tmp_path, argv, message):
    assert message in fails(capsys, "--output", tmp_path, *argv)
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_card_names_the_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(capsys, "--output", tmp_path, "--device", "cuda")
    assert "--device cuda" in line and "run with --device cpu" in line


def test_an_explicit_sampler_never_falls_back(capsys, tmp_path):
    line = fails(capsys, *SMALL, "--output", tmp_path, "--samplers", "baseline,cuda")
    assert "cuda runs on cuda, not on cpu" in line and "run: python quick_demo.py" in line


def test_an_output_folder_that_cannot_be_written_is_found_before_timing(
    capsys, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(sweep, "run", None)
    line = fails(capsys, *SMALL, "--output", file)
    assert "cannot be written" in line and "--output FOLDER" in line


def test_a_result_of_another_commit_stops_a_run_before_timing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_COMMIT", "b" * 40)
    path = results.folder(tmp_path, "cpu") / "quick_demo.json"
    path.parent.mkdir(parents=True)
    path.write_text(results.dumps(results.make("quick_demo", {"commit": "a" * 40}, [])))
    assert "--overwrite" in fails(capsys, *SMALL, "--output", tmp_path)
    assert quick_demo.main([*SMALL, "--output", str(tmp_path), "--overwrite"]) == 0
    assert results.load(path)["environment"]["commit"] == "b" * 40


def test_quick_demo_prints_the_machine_first_and_writes_its_files(capsys, tmp_path):
    assert quick_demo.main([*SMALL, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(environment.device_name("cpu")) and captured.err == ""
    assert captured.out.index("Checked against") < captured.out.index("| Method ")
    for label in ("Baseline (Python loop)", "PyTorch Vectorized", "C++ Kernel (CPU)"):
        assert f"| {label} " in captured.out
    folder = results.folder(tmp_path, "cpu")
    assert sorted(p.name for p in folder.iterdir()) == ["quick_demo.json", "quick_demo.md"]
    result = results.load(folder / "quick_demo.json")
    wanted = "device driver cuda torch python cpu commit dirty utc command copy_gb_s"
    assert not set(wanted.split()) - set(result["environment"])
    assert [row["sampler"] for row in result["rows"]] == ["baseline", "vectorized", "cpp"]
    assert str(tmp_path) not in json.dumps(result)


def test_json_has_stdout_to_itself(capsys, tmp_path):
    argv = [*SMALL, "--output", str(tmp_path), "--samplers", "baseline", "--json"]
    assert quick_demo.main(argv) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["schema"] == 1 and "| Method " in captured.err


def test_ctrl_c_is_status_130_and_keeps_earlier_results(capsys, tmp_path, monkeypatch):
    argv = [*SMALL, "--output", str(tmp_path)]
    quick_demo.main(argv)
    path = results.folder(tmp_path, "cpu") / "quick_demo.json"
    earlier = path.read_bytes()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: quick_demo.main(argv))
    assert stop.value.code == 130 and path.read_bytes() == earlier
    assert "earlier results are as they were" in capsys.readouterr().err


def test_a_disk_that_fills_up_is_one_line_after_the_table(tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--output", str(tmp_path)]
    assert quick_demo.main(argv) == 0
    path = next(tmp_path.glob("*/quick_demo.json"))
    earlier = path.read_bytes()
    capsys.readouterr()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: quick_demo.main(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and path.read_bytes() == earlier
    assert "| Baseline (Python loop) |" in out and "Written" not in out
    assert "quick_demo.json was not written (No space left on device); earlier results are" in err
    assert len(err.strip().splitlines()) == 1


def test_a_piped_run_shows_no_progress_bar(tmp_path):
    command = [sys.executable, "quick_demo.py", *SMALL, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "" and "| Method " in done.stdout


def test_a_failed_check_is_status_1(tmp_path, monkeypatch, capsys):
    bad = sweep.Contestant("baseline", "Baseline", lambda **inputs: None)
    monkeypatch.setattr(sweep, "contestants", lambda names, device: [bad])
    assert quick_demo.main([*SMALL, "--output", str(tmp_path)]) == 1
    assert "Baseline failed" in capsys.readouterr().out


SMOKE = ["--smoke", "--device", "cpu"]


@pytest.mark.parametrize("script", [test_batch_sizes, compare_vocab_sizes])
def test_a_smoke_sweep_writes_its_own_files(capsys, tmp_path, script):
    assert script.main([*SMOKE, "--large", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    name = script.__name__
    folder = results.folder(tmp_path, "cpu")
    files = [f"{name}-smoke.{suffix}" for suffix in ("json", "md", "png")]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert (folder / files[2]).read_bytes().startswith(b"\x89PNG") and err == ""
    result = results.load(folder / files[0])
    assert result["script"] == name
    assert all(row["status"] == "ok" and row["speedup"] for row in result["rows"])
    assert "win" in out or "loss" in out or "same" in out


def test_the_batch_sweep_is_the_first_reports():
    cells = workloads.batch_sweep(8, 128_256, large=True)
    assert [c.batch_size for c in cells] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert len(workloads.vocab_sweep(large=True)) == 2 * len(workloads.VOCABULARIES)


def test_a_sweep_compares_with_an_earlier_one(capsys, tmp_path):
    argv = [*SMOKE, "--samplers", "baseline", "--output", str(tmp_path)]
    test_batch_sizes.main(argv)
    path = results.folder(tmp_path, "cpu") / "test_batch_sizes-smoke.json"
    old = results.load(path)
    for row in old["rows"]:
        row["latency_us"] = {k: v / 100 for k, v in row["latency_us"].items()}
    earlier = tmp_path / "earlier.json"
    earlier.write_text(results.dumps(old))
    capsys.readouterr()
    assert test_batch_sizes.main([*argv, "--compare", str(earlier)]) == 0
    assert "Baseline (Python loop), batch 1, vocab 1000: latency slower" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [(None, "No such file"), ("{}", "not a result file")])
def test_an_earlier_result_that_cannot_be_read_is_one_line(capsys, tmp_path, content, message):
    earlier = tmp_path / "earlier.json"
    if content:
        earlier.write_text(content)
    with pytest.raises(SystemExit) as stop:
        test_batch_sizes.main([*SMOKE, "--output", str(tmp_path), "--compare", str(earlier)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_gpu_time_and_the_floor_have_a_table_and_a_panel(tmp_path):
    entrants = sweep.contestants(["vectorized", "cpp"], "cpu")
    cells = workloads.smoke(workloads.batch_sweep(8, 1000, large=False))
    env = environment.collect("cpu", ["test_batch_sizes.py"])
    result = results.make(
        "test_batch_sizes", env, sweep.run(cells, entrants, "cpu", runs=2, seed=0)
    )
    for row in result["rows"]:  # no GPU here: the figures only stand in
        row["gpu_us"], row["floor_us"] = row["latency_us"], 1.0
    assert "GPU time (ms)" in rendering.table(result)
    plots.over_batch(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def peers_double(adapter, reads="probabilities"):
    """A registry as src/peers would be: one peer that works, one that is not installed."""

    def missing(device):
        raise SamplerUnavailable("no package 'other'", "pip install other==1.0")

    def entry(name, label, load, reads=reads):
        return SimpleNamespace(name=name, label=label, load=load, reads=reads)

    entries = {
        "ours": entry("ours", "Ours again", lambda device: adapter),
        "other": entry("other", "Other", missing),
        "else": entry("else", "Reads something else", missing, "something else"),
    }
    registry = ModuleType("src.peers")
    registry.names, registry.get = lambda: list(entries), entries.__getitem__
    return registry


def test_peers_are_rows_of_the_same_run_and_missing_ones_say_what_to_install(
    capsys, tmp_path, monkeypatch
):
    sample = samplers.get("vectorized").load()
    adapter = Adapter(lambda *arguments: lambda: sample(*arguments))
    monkeypatch.setitem(sys.modules, "src.peers", peers_double(adapter))
    argv = [*SMOKE, "--samplers", "baseline", "--peers", "--output", str(tmp_path)]
    assert test_batch_sizes.main(argv) == 0
    out = capsys.readouterr().out
    assert "Checked for validity and distribution: Ours again\n" in out
    assert "on the timed inputs: Baseline (Python loop)\n" in out
    assert "Other skipped: no package 'other'; run: pip install other==1.0" in out
    rows = results.load(next(tmp_path.glob("*/*.json")))["rows"]
    by_name = {row["sampler"]: row for row in rows}
    assert by_name["ours"]["status"] == "ok" and by_name["ours"]["speedup"]
    assert by_name["other"]["status"] == "skipped" and "else" not in by_name


def test_peers_that_read_logits_are_in_the_table_of_logits(capsys, tmp_path, monkeypatch):
    sample, given = from_logits.get("vectorized").load().rejection_sample_from_logits, []

    def prepare_logits(draft_token_ids, draft_logits, target_logits):
        given.append({draft_logits.dtype, target_logits.dtype})
        return lambda: sample(draft_token_ids, target_logits, draft_logits=draft_logits)

    double = peers_double(LogitsAdapter(prepare_logits), "logits")
    monkeypatch.setitem(sys.modules, "src.peers", double)
    assert logits.main([*SMOKE, "--peers", "--output", str(tmp_path)]) == 0
    rows = results.load(next(tmp_path.glob("*/*.json")))["rows"]
    ours = [row for row in rows if row["sampler"] == "ours"]
    timed = [(row["dtype"], row["workload"]) for row in ours if row["latency_us"]]
    assert set(timed) == {("bfloat16", "no filter"), ("float32", "no filter")}
    assert {torch.bfloat16} in given and {torch.float32} in given, "logits as the workload has them"
    assert {row["reason"] for row in ours if row["workload"] != "no filter"} == {
        "top-k and top-p come before the call that its adapter makes"
    }


def test_peers_without_a_registry_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "src.peers", None)  # as if it were not there
    line = fails(capsys, *SMALL, "--output", tmp_path, "--peers")
    assert "--peers: this checkout has no src/peers" in line


def test_a_sweep_run_twice_says_how_far_its_runs_differ(capsys, tmp_path):
    argv = [*SMOKE, "--samplers", "vectorized", "--twice", "--output", str(tmp_path)]
    assert test_batch_sizes.main(argv) == 0
    assert "Two runs of the same thing differed by at most" in capsys.readouterr().out
    result = results.load(next(tmp_path.glob("*/*.json")))
    worst = result["environment"]["repeatability"]["latency_us"]
    assert worst == max(row["repeated"]["latency_us"] for row in result["rows"])


def test_a_card_that_somebody_else_uses_warns_on_every_timed_row(capsys, tmp_path, monkeypatch):
    row = sweep.empty_row(workloads.QUICK_DEMO, sweep.Contestant("a", "A", len))
    monkeypatch.setattr(environment, "idle_utilisation", lambda: 40)
    monkeypatch.setattr(environment, "collect", lambda device, command: dict(ENVIRONMENT))
    monkeypatch.setattr(timing, "copy_gb_s", lambda device: 1000.0)
    monkeypatch.setattr(sweep, "run", lambda *arguments, **options: [row])
    args = SimpleNamespace(device="cuda", smoke=False, runs=1, seed=0, json=False, entrants=[])
    args.command, args.script = ["x"], "quick_demo"
    cli.measure(args, [workloads.QUICK_DEMO])
    assert row["warning"] == "the card was 40 % busy with something else before the run"


ENVIRONMENT = {"device": "A card", "driver": "1", "cuda": "13", "torch": "2", "python": "3"}
ENVIRONMENT |= {"commit": None, "dirty": None}
