"""The soak run: its pool is right and mixed; wrong tokens and memory that grows fail it."""

import pytest
import torch

from src.benchmarking import results, soak

CALLS = {"calls": 300, "seconds": 60.0, "check_every": 100}


@pytest.fixture(autouse=True)
def torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small_pool():
    return soak.make_pool("cpu", soak.SMOKE_SHAPES, 16, seed=0)


def judged(pool, **options):
    row = soak.empty_row("cpp") | soak.soak(pool, "cpu", **{**CALLS, **options})
    soak.judge(row)
    return row


def test_a_smoke_run_checks_and_writes_its_files(capsys, tmp_path):
    argv = ["--smoke", "--device", "cpu", "--calls", "2000", "--output", str(tmp_path)]
    assert soak.main(argv) == 0
    path = next(tmp_path.glob("*/soak-smoke.json"))
    row = results.load(path)["rows"][0]
    assert row["status"] == "ok" and row["calls"] >= 2000 and row["wrong"] == 0 and row["flat"]
    assert row["checks"] >= 2000 // soak.SMOKE_CHECK_EVERY
    assert set(row["kinds"]) == set(soak.KINDS) and sum(row["kinds"].values()) == row["calls"]
    assert [sample["calls"] for sample in row["memory"]] == sorted(
        sample["calls"] for sample in row["memory"]
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "flat" in capsys.readouterr().out


def test_the_pool_mixes_kinds_shapes_and_dtypes():
    pool = soak.make_pool("cpu", soak.SMOKE_SHAPES, soak.POOL, seed=0)
    assert {entry.kind for entry in pool} == set(soak.KINDS)
    for kind in soak.KINDS:
        mine = [entry for entry in pool if entry.kind == kind]
        assert {entry.shape for entry in mine} == set(soak.SMOKE_SHAPES)
        assert len({entry.dtype for entry in mine}) > 1


@pytest.mark.parametrize("when", [0, 1, 5])
def test_a_token_that_changes_fails_wherever_it_is_in_the_pool(when):
    pool = small_pool()
    right, count = pool[5].call, 0

    def wrong_in_some_rotation():
        nonlocal count
        count += 1
        output = right()
        if count > when:
            output = (output[0] + 1, *output[1:])
        return output

    pool[5] = pool[5]._replace(call=wrong_in_some_rotation)
    row = judged(pool)
    assert row["status"] == "failed" and "wrong outputs" in row["reason"]


def test_memory_that_grows_fails_and_a_level_that_swings_does_not(monkeypatch):
    level = [100.0]

    def grows(device):
        level[0] += 60.0
        return {"resident_mib": level[0]}

    monkeypatch.setattr(soak, "memory", grows)
    row = judged(small_pool(), calls=800)
    assert row["status"] == "failed" and "memory grew" in row["reason"]
    swings = [{"calls": i, "resident_mib": 100.0 + 500 * (i % 2)} for i in range(40)]
    assert soak.growths(swings)["resident"] <= 0


def test_a_run_ends_at_its_time():
    row = judged(small_pool(), calls=10**9, seconds=0.3)
    assert row["calls"] < 10**6 and row["seconds"] < 30 and row["status"] == "ok"
