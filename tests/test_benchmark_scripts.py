"""The scripts: their errors, their files, and what a pipe and Ctrl-C do to them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quick_demo
from src.benchmarking import cli, environment, results, sweep

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


def test_a_piped_run_shows_no_progress_bar(tmp_path):
    command = [sys.executable, "quick_demo.py", *SMALL, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "" and "| Method " in done.stdout


def test_a_failed_check_is_status_1(tmp_path, monkeypatch, capsys):
    bad = sweep.Contestant("baseline", "Baseline", lambda **inputs: None)
    monkeypatch.setattr(sweep, "contestants", lambda names, device: [bad])
    assert quick_demo.main([*SMALL, "--output", str(tmp_path)]) == 1
    assert "Baseline failed" in capsys.readouterr().out
