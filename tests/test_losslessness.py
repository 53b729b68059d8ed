"""The distribution run: its statistics are right, every sampler passes, planted faults fail."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from src import samplers
from src.benchmarking import losslessness, losslessness_tables, rendering, results
from src.contract import SamplerOutput
from src.randomness import philox_uniforms

CELL = losslessness.Cell("probabilities", "token", 2, 16)
DRAWS = 30_000


@pytest.fixture(autouse=True)
def torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_smoke_run_judges_every_sampler_and_writes_its_files(capsys, tmp_path):
    argv = ["--smoke", "--device", "cpu", "--output", str(tmp_path)]
    assert losslessness.main(argv) == 0
    path = next(tmp_path.glob("*/losslessness-smoke.json"))
    result = results.load(path)
    rows = result["rows"]
    assert all(row["draws"] >= losslessness.SMOKE_DRAWS for row in rows), "no clock cuts it short"
    assert {row["sampler"] for row in rows} == {"baseline", "vectorized", "cpp"}
    assert {(row["source"], row["verification"]) for row in rows if row["sampler"] == "cpp"} == {
        (source, how) for source in ("probabilities", "logits") for how in ("token", "block")
    }
    assert {row["verification"] for row in rows if row["sampler"] == "baseline"} == {"token"}
    for row in rows:
        assert row["status"] == "ok" and row["draws"] > 0 and row["impossible"] == 0
        assert row["tests"] and row["least_p"] == min(t["p"] for t in row["tests"].values())
    assert result["environment"]["tests"] == losslessness_tables.count_tests(rows)
    assert "No row departs from its target." in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| C++ Kernel (CPU) " in path.with_suffix(".md").read_text()


def judged(function, cell=CELL, batch_size=1000, draws=DRAWS):
    """The row of a sampler in a table of its own."""
    entrant = losslessness.Entrant("x", "X", cell.source, function, (cell.verification,))
    row = losslessness.empty_row(entrant, cell)
    torch.manual_seed(0)
    row |= losslessness.measure(function, cell, batch_size, "cpu", draws=draws, seconds=60)
    losslessness.judge([row])
    return row


vectorized = samplers.get("vectorized").load()


def swap_p_and_q(ids, q, p, *, seeds, offsets):
    swapped = torch.cat([q, p[:, 2:]], dim=1)
    return vectorized(ids, p[:, :2], swapped, seeds=seeds, offsets=offsets)


def recover_from_p(ids, q, p, *, seeds, offsets):
    output = vectorized(ids, q, p, seeds=seeds, offsets=offsets)
    last = output.num_accepted.long()[:, None]
    u = philox_uniforms(seeds, offsets, 3)[:, 2:].double()
    rows = p[torch.arange(len(p)), last[:, 0]].double().cumsum(-1)
    drawn = torch.searchsorted(rows, u * rows[:, -1:], right=True)
    return output._replace(token_ids=output.token_ids.scatter(1, last, drawn))


def same_numbers_for_neighbours(ids, q, p, *, seeds, offsets):
    ids = ids[0::2].repeat_interleave(2, 0)
    return vectorized(ids, q, p, seeds=seeds // 2, offsets=offsets)


def same_numbers_in_every_call(ids, q, p, *, seeds, offsets):
    # Drafts are fresh, so that only what is drawn after a rejection repeats.
    return vectorized(ids, q, p, seeds=seeds, offsets=torch.zeros_like(offsets))


def second_token_like_the_first(ids, q, p, *, seeds, offsets):
    output = vectorized(ids, q, p, seeds=seeds, offsets=offsets)
    tokens = output.token_ids.clone()
    tokens[:, 1] = torch.where(output.num_accepted > 0, tokens[:, 0], tokens[:, 1])
    return SamplerOutput(tokens, output.num_accepted)


def out_of_vocabulary(ids, q, p, *, seeds, offsets):
    output = vectorized(ids, q, p, seeds=seeds, offsets=offsets)
    tokens = output.token_ids.clone()
    tokens[0, 0] = p.shape[2]
    return SamplerOutput(tokens, output.num_accepted)


def test_a_right_sampler_passes():
    row = judged(vectorized)
    assert row["status"] == "ok" and row["draws"] == DRAWS
    assert set(row["tests"]) == {"first", "second", "later", "first two", "calls", "rows"}
    first = row["tests"]["first"]
    assert abs(first["tv"] - first["tv_expected"]) < 5 * first["tv_sigma"]


@pytest.mark.parametrize(
    "fault, test",
    [
        (swap_p_and_q, "first"),
        (recover_from_p, "first"),
        (second_token_like_the_first, "second"),
        (same_numbers_for_neighbours, "rows"),
        (same_numbers_in_every_call, "calls"),
    ],
)
def test_a_planted_fault_fails_the_table(fault, test):
    row = judged(fault)
    assert row["status"] == "failed" and "below" in row["reason"]
    assert row["tests"][test]["p"] < 1e-6


def test_a_token_outside_the_vocabulary_fails():
    row = judged(out_of_vocabulary, draws=4000)
    assert row["status"] == "failed" and "cannot be emitted" in row["reason"]


def test_too_few_draws_are_no_verdict():
    row = judged(vectorized, batch_size=2, draws=4)
    assert row["status"] == "skipped" and "too few to judge" in row["reason"]


def test_a_fault_in_one_row_fails_after_bonferroni_over_many():
    rows = [judged(vectorized, draws=4000) | {"status": "ok"} for _ in range(5)]
    rows.append(judged(swap_p_and_q) | {"status": "ok"})
    losslessness.judge(rows)
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed"]
    result = {"script": "losslessness", "rows": rows, "environment": {"alpha": 0.01}}
    assert "1 rows failed." in rendering.table(result) and "failed" in rendering.table(result)


def test_the_chi_square_is_scipys():
    g = np.random.default_rng(0)
    masses = g.dirichlet(np.full(500, 20.0))
    counts = g.multinomial(10**6, masses)
    found = losslessness.chi_square(counts, masses)
    wanted = chisquare(counts, masses * 10**6)
    assert found["p"] == pytest.approx(wanted.pvalue, rel=1e-3)
    assert found["chi2"] == pytest.approx(wanted.statistic, rel=1e-3) and found["dof"] == 499
    assert abs(found["tv"] - found["tv_expected"]) < 5 * found["tv_sigma"]


@pytest.mark.parametrize("least", [1e-4, 1e-2, 0.3, 2.0])
def test_bins_hold_everything_and_have_the_least_mass(least):
    p = np.random.default_rng(1).dirichlet(np.full(3000, 0.2))
    bins = losslessness.merged(p, least)
    masses = np.bincount(bins, weights=p)
    assert len(bins) == len(p) and masses.sum() == pytest.approx(1)
    assert masses.min() > least / 2 or len(masses) == 1
    large = np.flatnonzero(p >= least)
    assert len(set(bins[large])) == len(large)


def test_coarse_bins_are_of_about_equal_mass():
    p = np.random.default_rng(2).dirichlet(np.ones(5000))
    masses, bins = losslessness.coarse(p, seed=0)
    assert len(masses) == losslessness.COARSE and masses.sum() == pytest.approx(1)
    assert np.allclose(masses, 1 / losslessness.COARSE, atol=0.01)
    assert np.allclose(np.bincount(bins, weights=p), masses)
    alone, _ = losslessness.coarse(np.array([0.97, 0.01, 0.01, 0.01]), seed=0)
    assert len(alone) <= 4 and alone.sum() == pytest.approx(1)


def test_draws_follow_their_rows():
    rows = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.1, 0.0, 0.9]], dtype=torch.float64)
    drawn = losslessness.Drawn(rows)(20_000)
    assert drawn.shape == (20_000, 2)
    for k, row in enumerate(rows):
        counts = torch.bincount(drawn[:, k], minlength=4).double()
        possible = row > 0
        assert not counts[~possible].any()
        assert chisquare(counts[possible], row[possible] * 20_000).pvalue > 1e-6
