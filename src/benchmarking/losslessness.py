"""Emitted tokens against the target's distribution, at real vocabularies and many draws.

Every sampler of the device, token by token and, where it has it, block verification, from
probabilities and from logits, K 1, 2, 4, 8 and V 16 to 151,936. All requests of a row share one
target row a position and one draft row, with fresh draft tokens and the next numbers of their own
streams in each call. Held to chi-square, with Bonferroni over the table:

- the first token, the second one where it was emitted, and the later ones together;
- the first two tokens jointly (where no draft was accepted, the next round draws the second);
- first tokens of the same request in consecutive calls, and of neighbouring rows in a call.

    python -m src.benchmarking.losslessness [--draws N] [--budget SECONDS]

writes losslessness.json, .md and .png. Slow samplers get as many draws as their share of the budget
allows; each row says how many. vectorized-compiled is run at K = 4 only.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from src import from_logits, samplers
from src.benchmarking import checks, cli, environment, losslessness_tables, plots, results
from src.contract import VERIFICATIONS, SamplerUnavailable

DRAWS = 10**7
ALPHA = 0.01  # of the whole table
SPEC_LENGTHS = (1, 2, 4, 8)
VOCABULARIES = (16, 1000, 32_000, 151_936)
# Seconds that do not bind, so that a smoke run draws the same tokens every time: one that is judged
# by chance would fail now and then.
SMOKE_SIZES, SMOKE_DRAWS, SMOKE_SECONDS = ((2,), (16, 1000)), 10_000, 3600.0
LEAST_SECONDS = 0.1  # of a row, when the budget is spent
COMPILED, COMPILED_AT = "vectorized-compiled", 4  # the only spec length it is compiled for
# A bin has at least this many expected draws, and this much mass: uniforms have 24 bits, so that a
# token's probability is a multiple of 2^-24, which 10^7 draws of many rare tokens would show.
LEAST_EXPECTED, LEAST_MASS = 20.0, 1e-4
COARSE = 16  # bins of about equal mass, for pairs of tokens
# Peaked as a language model's rows where there are enough tokens for that.
SCALES = ((1000, 1.5), (10**9, 4.0))
MOST_REQUESTS = {"cuda": 16_384, "cpu": 4096}
MOST_ELEMENTS = {"cuda": 2**28, "cpu": 2**21}  # B (K + 1) V, where a sampler writes as much
KERNELS = ("cuda", "cpp", "cuda-thread-per-row")


class Cell(NamedTuple):
    """source: what the rows are, "probabilities" or "logits"."""

    source: str
    verification: str
    spec_length: int
    vocab_size: int


class Rows(NamedTuple):
    """target [K+1, V] and draft [K, V] float32 as the sampler gets them, and the distributions p
    [K+1, V] and q [K, V] float64 that they stand for."""

    target: torch.Tensor
    draft: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor


def make_rows(cell: Cell, device: str, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    size = (cell.spec_length + 1, cell.vocab_size)
    scale = next(scale for most, scale in SCALES if cell.vocab_size <= most)
    target = (scale * torch.randn(size, generator=g)).to(device)
    draft = target[:-1] + torch.randn((size[0] - 1, size[1]), generator=g).to(device)
    if cell.source == "logits":
        return Rows(target, draft, *(x.double().softmax(-1) for x in (target, draft)))
    target, draft = target.softmax(-1), draft.softmax(-1)
    p, q = (x.double() / x.sum(-1, keepdim=True, dtype=torch.float64) for x in (target, draft))
    return Rows(target, draft, p, q)


def verifier(function: Callable, cell: Cell, rows: Rows, batch_size: int) -> Callable:
    """(draft_token_ids, seeds, offsets) -> SamplerOutput of a sampler for `cell.source`."""
    options = {} if cell.verification == "token" else {"verification": cell.verification}
    # Stride 0 along the batch: the rows stay in a GPU's cache.
    target = rows.target.expand(batch_size, -1, -1)
    draft = rows.draft.expand(batch_size, -1, -1)
    if cell.source == "logits":
        return lambda ids, seeds, offsets: function(
            ids, target, draft_logits=draft, seeds=seeds, offsets=offsets, **options
        )
    return lambda ids, seeds, offsets: function(
        ids, draft, target, seeds=seeds, offsets=offsets, **options
    )


class Drawn:
    """Draws from rows [N, V] of probabilities, float64, on their device."""

    def __init__(self, rows: torch.Tensor):
        self.cdf = rows.cumsum(-1)
        self.total = self.cdf[:, -1:].clone()

    def __call__(self, count: int) -> torch.Tensor:
        """[count, N] int64."""
        shape = (len(self.cdf), count)
        u = torch.rand(shape, dtype=torch.float64, device=self.cdf.device) * self.total
        found = torch.searchsorted(self.cdf, u, right=True)
        return found.clamp_(max=self.cdf.shape[1] - 1).t().contiguous()


class Tally:
    """What was emitted, counted on the device without a synchronisation."""

    def __init__(self, rows: Rows, seed: int):
        p, device = rows.p, rows.p.device
        self.places, self.vocab_size = p.shape
        self.masses, bins = zip(*(coarse(row.cpu().numpy(), seed) for row in p[:2]), strict=True)
        # One more entry, for what is no token.
        self.bins = [torch.from_numpy(np.append(b, 0)).to(device) for b in bins]
        self.columns = torch.arange(self.places, device=device)
        self.next_round = Drawn(p[1:2])

        def zeros(*size):
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.tokens = zeros(self.places, self.vocab_size + 1)
        first, second = map(len, self.masses)
        self.joint = zeros(first * second)
        self.calls, self.rows = zeros(first * first), zeros(first * first)
        self.impossible, self.accepted = zeros(), zeros()
        self.draws = 0
        self._previous = None

    def add(self, output) -> None:
        """The output of a call, whose requests are those of the last one; an even number."""
        tokens, accepted = output.token_ids.long(), output.num_accepted.long()
        emitted = self.columns <= accepted[:, None]
        valid = (tokens >= 0) & (tokens < self.vocab_size)
        self.impossible += (torch.where(emitted, ~valid, tokens != -1)).sum()
        self.accepted += accepted.sum()
        slots = torch.where(emitted & valid, tokens, self.vocab_size)
        _count(self.tokens, slots + self.columns * (self.vocab_size + 1))

        count = len(tokens)
        drawn = self.next_round(count)[:, 0]
        second = torch.where(accepted > 0, slots[:, 1], drawn)
        here, after = self.bins[0][slots[:, 0]], self.bins[1][second]
        width = len(self.masses[0])
        _count(self.joint, here * len(self.masses[1]) + after)
        _count(self.rows, here[0::2] * width + here[1::2])
        if self._previous is None:
            self._previous = here
        else:  # pairs of calls share no call, so that they are independent
            _count(self.calls, self._previous * width + here)
            self._previous = None
        self.draws += count

    def judged(self, p: np.ndarray) -> dict[str, dict]:
        """The tests by name, each as of `chi_square`; p [K+1, V] float64."""
        tokens = self.tokens[:, :-1].cpu().numpy()
        by_place = [_binned(*pair) for pair in zip(tokens, p, strict=True)]
        first, second = self.masses
        pairs = {
            "first two": (self.joint, second),
            "calls": (self.calls, first),
            "rows": (self.rows, first),
        }
        found = {
            "first": chi_square(*by_place[0]),
            "second": chi_square(*by_place[1]),
            # Given that a place is reached, its token does not depend on those before it.
            "later": _pooled([chi_square(*place) for place in by_place[2:]]),
        }
        for name, (counts, other) in pairs.items():
            found[name] = chi_square(*_binned(counts.cpu().numpy(), np.outer(first, other).ravel()))
        return {name: test for name, test in found.items() if test}


def _count(counts: torch.Tensor, index: torch.Tensor) -> None:
    index = index.flatten()
    counts.view(-1).scatter_add_(0, index, torch.ones_like(index))


def coarse(p: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """COARSE bins or fewer, of about equal mass, of tokens in random order: masses, and the bin of
    each token."""
    order = np.random.default_rng(seed).permutation(len(p))
    middle = np.cumsum(p[order]) - p[order] / 2
    bins = np.empty(len(p), dtype=np.int64)
    bins[order] = np.minimum(middle * COARSE, COARSE - 1).astype(np.int64)
    bins = np.unique(bins, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return np.bincount(bins, weights=p), bins


def merged(p: np.ndarray, least: float) -> np.ndarray:
    """The bin of each of p's cells: its own from a mass of `least` on; smaller ones are merged, in
    order of mass, until they have about as much."""
    bins = np.empty(len(p), dtype=np.int64)
    large = p >= least
    bins[large] = np.arange(large.sum())
    small = np.flatnonzero(~large)
    small = small[np.argsort(p[small], kind="stable")]
    cumulative = np.cumsum(p[small])
    groups = (cumulative - p[small]) // least
    if len(small):
        # What is left over at the end joins the bin before it, or the smallest large cell.
        full = cumulative[-1] // least
        if full:
            groups = np.minimum(groups, full - 1)
        bins[small] = large.sum() + np.unique(groups, return_inverse=True)[1].reshape(-1)
        if not full and large.any():
            bins[small] = p[large].argmin()
    return bins


def _binned(counts: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = max(int(counts.sum()), 1)
    bins = merged(p, max(LEAST_MASS, LEAST_EXPECTED / total))
    return np.bincount(bins, weights=counts), np.bincount(bins, weights=p)


def chi_square(counts: np.ndarray, masses: np.ndarray) -> dict | None:
    """Pearson's test of `counts` against the masses, and the total variation between them with the
    mean and the standard deviation that chance gives it. None where there is nothing to test."""
    total, masses = counts.sum(), masses / masses.sum()
    if len(masses) < 2 or total * masses.min() < LEAST_EXPECTED / 2:
        return None
    noise = np.sqrt(masses * (1 - masses) / total)  # of a share
    off = np.abs(counts / total - masses)
    statistic = float((((counts - total * masses) ** 2) / (total * masses)).sum())
    return {
        "n": int(total),
        **_p_value(statistic, len(masses) - 1),
        "tv": float(f"{off.sum() / 2:.4g}"),
        "tv_expected": float(f"{noise.sum() * np.sqrt(2 / np.pi) / 2:.4g}"),
        "tv_sigma": float(f"{np.sqrt((noise**2).sum() * (1 - 2 / np.pi)) / 2:.3g}"),
    }


def _pooled(tests: list[dict | None]) -> dict | None:
    tests = [test for test in tests if test]
    if not tests:
        return None
    sums = {key: sum(test[key] for test in tests) for key in ("n", "chi2", "dof")}
    return {"n": sums["n"], **_p_value(sums["chi2"], sums["dof"])}


def _p_value(statistic: float, dof: int) -> dict:
    half = torch.tensor([dof / 2, statistic / 2], dtype=torch.float64)
    p = float(torch.special.gammaincc(half[0], half[1]))
    return {"chi2": round(statistic, 2), "dof": dof, "p": float(f"{p:.4g}")}


def measure(
    function: Callable, cell: Cell, batch_size: int, device: str, *, draws: int, seconds: float
) -> dict:
    """Figures of a row: at most about `draws` draws or `seconds`, at least two calls."""
    rows = make_rows(cell, device, seed=cell.vocab_size + cell.spec_length)
    sample = verifier(function, cell, rows, batch_size)
    drafts, tally = Drawn(rows.q), Tally(rows, seed=1)
    seeds = torch.arange(batch_size, device=device)
    offsets = torch.zeros_like(seeds)
    sample(drafts(batch_size), seeds, offsets + 2**40)  # what is loaded or compiled at first
    events, calls = [], 0
    begin = time.perf_counter()
    while calls < 2 or (tally.draws < draws and time.perf_counter() - begin < seconds):
        tally.add(sample(drafts(batch_size), seeds, offsets))
        offsets += cell.spec_length + 1
        calls += 1
        if device == "cuda":  # the host stays two calls ahead
            events.append(torch.cuda.Event())
            events[-1].record()
            if calls > 2:
                events.pop(0).synchronize()
    if device == "cuda":
        torch.cuda.synchronize()
    passed = time.perf_counter() - begin
    p = rows.p.cpu().numpy()
    return {
        "draws": tally.draws,
        "calls": calls,
        "batch_size": batch_size,
        "seconds": round(passed, 3),
        "tokens_per_step": round(int(tally.accepted) / tally.draws + 1, 4),
        "impossible": int(tally.impossible),
        "tests": tally.judged(p),
        "points": _points(tally.tokens[0, :-1].cpu().numpy(), p[0]),
    }


def _points(counts: np.ndarray, p: np.ndarray) -> list[list[float]]:
    """[expected, observed] shares of the first token at ranks 1, 2, 4, 8, ... of probability."""
    order = np.argsort(-p, kind="stable")
    ranks = [2**i - 1 for i in range(20) if 2**i <= len(p)]
    total = counts.sum()
    return [[float(f"{x[order[r]]:.5g}") for x in (p, counts / total)] for r in ranks]


def batch_for(name: str, cell: Cell, device: str) -> int:
    """Requests a call; an even number."""
    if name == "baseline":
        return 64
    most = MOST_REQUESTS[device]
    if name not in KERNELS:
        most = min(most, MOST_ELEMENTS[device] // ((cell.spec_length + 1) * cell.vocab_size))
    elif device == "cpu":
        most = min(most, MOST_ELEMENTS[device] // cell.vocab_size)
    elif cell.source == "logits":
        most //= 2
    return max(2, most // 2 * 2)


class Entrant(NamedTuple):
    name: str
    label: str
    source: str
    function: Callable | None
    verifications: tuple[str, ...]
    reason: str | None = None
    command: str | None = None


def entrants(device: str) -> list[Entrant]:
    """Every sampler of `device`, from probabilities and from logits."""
    known = [("probabilities", samplers.get(name)) for name in samplers.names(device)]
    known += [("logits", from_logits.get(name)) for name in from_logits.names(device)]
    found = []
    for source, sampler in known:
        function = reason = command = None
        verifications = VERIFICATIONS[:1]
        try:
            function = sampler.load(device)
            if source == "logits":
                function = function.rejection_sample_from_logits
            if "verification" in inspect.signature(function).parameters:
                verifications = VERIFICATIONS
        except SamplerUnavailable as error:
            reason, command = error.reason, error.command
        entry = (sampler.name, sampler.label, source, function, verifications, reason, command)
        found.append(Entrant(*entry))
    return found


def run(
    entered: list[Entrant],
    device: str,
    *,
    draws: int,
    budget_s: float,
    spec_lengths: Iterable[int] = SPEC_LENGTHS,
    vocabularies: Iterable[int] = VOCABULARIES,
    progress: Callable[[list], Iterable] = lambda rows: rows,
) -> list[dict]:
    """Rows of a result file, judged. What is left of the budget is shared by the rows left."""
    wanted = [
        (entrant, Cell(entrant.source, verification, spec_length, vocab_size))
        for vocab_size in vocabularies
        for spec_length in spec_lengths
        for verification in VERIFICATIONS
        for entrant in entered
        if verification in entrant.verifications
        and (entrant.name != COMPILED or spec_length == COMPILED_AT)
    ]
    wanted.sort(key=lambda pair: pair[0].name == COMPILED)  # last: compiling has no bound
    begin, around, rows = time.perf_counter(), [], []
    torch.manual_seed(0)  # of drafts; samplers have streams of their own
    for i, (entrant, cell) in enumerate(progress(wanted)):
        row = empty_row(entrant, cell)
        if entrant.function is not None:
            started = time.perf_counter()
            share = (budget_s - (started - begin)) / (len(wanted) - i)
            share -= statistics.median(around or [0.0])  # what a row takes beside its calls
            size = batch_for(entrant.name, cell, device)
            try:
                row |= measure(
                    entrant.function,
                    cell,
                    size,
                    device,
                    draws=draws,
                    seconds=max(share, LEAST_SECONDS),
                )
                around.append(time.perf_counter() - started - row["seconds"])
            except Exception as error:
                row.update(status="failed", reason=checks.one_line(error))
            if device == "cuda" and entrant.name not in KERNELS:
                torch.cuda.empty_cache()
        rows.append(row)
    judge(rows)
    return rows


def empty_row(entrant: Entrant, cell: Cell) -> dict:
    return {
        "sampler": entrant.name,
        "label": entrant.label,
        "source": cell.source,
        "verification": cell.verification,
        "spec_length": cell.spec_length,
        "vocab_size": cell.vocab_size,
        "dtype": "float32",
        "status": "ok" if entrant.function is not None else "skipped",
        "reason": entrant.reason,
        "command": entrant.command,
        "warning": None,
        **dict.fromkeys(("draws", "calls", "batch_size", "seconds", "tokens_per_step")),
        **dict.fromkeys(("impossible", "tests", "points", "least_p")),
    }


def judge(rows: list[dict]) -> None:
    """Sets `least_p`, fails the rows whose least p-value is below ALPHA over all tests, and skips
    those without draws enough for a test."""
    threshold = ALPHA / max(1, losslessness_tables.count_tests(rows))
    for row in rows:
        if row["status"] != "ok":
            continue
        row["least_p"] = min((test["p"] for test in row["tests"].values()), default=None)
        if row["impossible"]:
            row.update(status="failed", reason=f"{row['impossible']} tokens that cannot be emitted")
        elif row["least_p"] is None:
            why = f"{row['draws']} draws are too few to judge: a larger --budget gives more"
            row.update(status="skipped", reason=why)
        elif not row["least_p"] >= threshold:
            name = min(row["tests"], key=lambda test: row["tests"][test]["p"])
            why = f"test {name!r}: p = {row['least_p']:.1e}, below {threshold:.1e}"
            row.update(status="failed", reason=why)


def main(argv: list[str] | None = None) -> int:
    parser = cli.options(__doc__, runs=1, dials=False, choice=False)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds on a CPU, for CI")
    parser.add_argument("--draws", type=cli.positive, default=DRAWS, help="of each row, at most")
    parser.add_argument(
        "--budget", type=cli.positive, default=300, metavar="SECONDS", help="of the whole table"
    )
    args = cli.parse(parser, "losslessness", argv, program="-m src.benchmarking.losslessness")
    options = {"draws": args.draws, "budget_s": float(args.budget)}
    if args.smoke:
        options = {
            "draws": min(args.draws, SMOKE_DRAWS),
            "budget_s": SMOKE_SECONDS,
            **dict(zip(("spec_lengths", "vocabularies"), SMOKE_SIZES, strict=True)),
        }
    env = environment.collect(args.device, args.command)
    cli.say(args, environment.machine_line(env))

    def progress(rows):
        return tqdm(rows, unit="row", leave=False, disable=None)

    rows = run(entrants(args.device), args.device, progress=progress, **options)
    env["alpha"], env["tests"] = ALPHA, losslessness_tables.count_tests(rows)
    result = results.make(args.script, env, rows)
    return cli.finish_untimed(args, result, plots.losslessness)


if __name__ == "__main__":
    cli.run(main)
