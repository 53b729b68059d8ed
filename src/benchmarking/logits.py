"""Verification from logits against what an engine without it does: softmax, then the kernel.

Batch 1, 16 and 64 at Llama 3.2's vocabulary with 8 drafts, bfloat16 and float32, temperature 1; the
kernel with the draft's logsumexp, which saves it a pass over the draft's logits, and without; then
rows with top-k 50 and with top-p 0.9. Each is checked against the float64 oracle on the timed
inputs first. Bytes are the target's rows up to the last token and the draft's rejected row (all
up to it, without the logsumexp).

    python -m src.benchmarking.logits

writes from_logits.json, .md and .png. Some minutes on a GPU; on a CPU it is for --smoke.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from src import from_logits, oracle, samplers
from src.benchmarking import checks, cli, peers, plots, sweep, workloads
from src.benchmarking.sweep import Contestant
from src.benchmarking.workloads import Workload
from src.contract import SamplerUnavailable

SOFTMAX, WITHOUT = "softmax", "no-logsumexp"
_PARAMETERS = ("top_k", "top_p")
# Microseconds at V = 128256, K = 8 in bfloat16, with the logsumexp and without, by batch.
TARGETS_US = {1: (10.0, 10.0), 16: (25.0, 25.0), 64: (60.0, 100.0)}
FILTERED_FACTOR = 3.0
# Seconds of a cell's latencies, of its host times and of its GPU times: at batch 64 PyTorch sorts
# 1,088 rows a call, and the numbers of samples asked for would take minutes.
BUDGET_S = 2.0
# Requests whose drafts are drawn by one call: on a GPU it costs the host as much for one of them.
DRAWN_TOGETHER = 16


def make_inputs(workload: Workload, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of rejection_sample_from_logits, a function of workload and seed.

    draft_token_ids [B, K] int64 drawn from the draft, target_logits [B, K+1, V] and draft_logits
    [B, K, V] of the workload's dtype, draft_logsumexp [B, K] float64, uniforms [B, K+1] float32 and
    the [B] parameters of the filter that is the workload's name.
    """
    size, length, vocab = workload.batch_size, workload.spec_length, workload.vocab_size
    g = torch.Generator(device).manual_seed(seed)
    dtype = workloads.DTYPES[workload.dtype]
    noise = workloads.ACCEPTANCE_NOISE[workload.acceptance]
    target = torch.empty(size, length + 1, vocab, dtype=dtype, device=device)
    draft = torch.empty(size, length, vocab, dtype=dtype, device=device)
    ids = torch.empty(size, length, dtype=torch.int64, device=device)
    logsumexp = torch.empty(size, length, dtype=torch.float64, device=device)
    filters = workloads.FILTERS[workload.name]
    draw = from_logits.get("vectorized").load(device).sample_from_logits
    for b in range(size):  # by request, so that the float32 temporaries stay small
        logits = workloads.PEAKEDNESS * torch.randn(length + 1, vocab, device=device, generator=g)
        target[b] = logits
        draft[b] = logits[:length] + noise * torch.randn(length, vocab, device=device, generator=g)
    for b in range(0, size, DRAWN_TOGETHER):
        some = draft[b : b + DRAWN_TOGETHER]
        options = _parameters(filters, len(some) * length, device)
        drawn = draw(some.flatten(0, 1), generator=g, **options)
        for mine, values in zip((ids, logsumexp), drawn, strict=True):
            mine[b : b + DRAWN_TOGETHER] = values.view(-1, length)
    return {
        "draft_token_ids": ids,
        "target_logits": target,
        "draft_logits": draft,
        "draft_logsumexp": logsumexp,
        "uniforms": torch.rand(size, length + 1, device=device, generator=g),
        **_parameters(filters, size, device),
    }


def _parameters(filters: dict, size: int, device: str) -> dict[str, torch.Tensor]:
    dtypes = {"top_k": torch.int32, "top_p": torch.float32}
    return {
        name: torch.full((size,), value, dtype=dtypes[name], device=device)
        for name, value in filters.items()
    }


def expected(inputs: dict) -> oracle.OracleOutput:
    return checks.expected_outputs(inputs, _logit_rows)


def _logit_rows(inputs: dict, b: int, k: int):
    options = {name: inputs[name][b : b + 1] for name in _PARAMETERS if name in inputs}

    def row(logits):
        return oracle.probabilities(logits[b : b + 1, k : k + 1], **options)[0, 0]

    draft = inputs["draft_logits"]
    return None if k == draft.shape[1] else row(draft), row(inputs["target_logits"])


def facts(workload: Workload, outputs: list) -> dict:
    """sweep.measured_facts with the bytes of logits: `bytes` with the draft's logsumexp, and
    `bytes_without` it."""
    found = sweep.measured_facts(workload, outputs)
    length, size = workload.spec_length, workload.batch_size
    counts = [int(n) for want in outputs for n in want.num_accepted]
    rejected = sum(n < length for n in counts)
    scalars = 2 * length * size * workloads.DTYPES[workload.dtype].itemsize
    rows = sum(counts) + len(counts) + rejected  # a target row a token, and the rejected draft row
    for name, extra in (("bytes", 0), ("bytes_without", sum(counts))):
        found[name] = round((rows + extra) / len(outputs) * workload.row_bytes + scalars)
    return found


# A request's first token takes a target row, and either a second one or the rejected draft's row.
PROBLEM = sweep.Problem(
    make_inputs,
    expected,
    facts,
    lambda copies, outputs: {},
    oracle.LOGITS_EPSILON,
    rows_touched=2,
)


def contestants(device: str) -> list[Contestant]:
    """Vectorized PyTorch, softmax and the kernel of probabilities, and the kernel of logits without
    and with draft_logsumexp."""
    name = "cuda" if device == "cuda" else "cpp"
    label = from_logits.get(name).label
    rows: list[tuple[str, str, Callable[[], Callable]]] = [
        (
            "vectorized",
            from_logits.get("vectorized").label,
            lambda: _verifier("vectorized", device),
        ),
        (SOFTMAX, f"Softmax, then {label}", lambda: _softmax_first(name, device)),
        (f"{name}-{WITHOUT}", f"{label}, no logsumexp", lambda: _without(_verifier(name, device))),
        (name, label, lambda: _verifier(name, device)),
    ]
    found = []
    for key, text, load in rows:
        try:
            found.append(Contestant(key, text, load()))
        except SamplerUnavailable as error:
            found.append(Contestant(key, text, None, reason=error.reason, command=error.command))
    return found


def _verifier(name: str, device: str) -> Callable:
    return from_logits.get(name).load(device).rejection_sample_from_logits


def _without(function: Callable) -> Callable:
    def verify(draft_logsumexp, **inputs):
        return function(**inputs)

    return verify


def _softmax_first(name: str, device: str) -> Callable:
    sample = samplers.get(name).load(device)
    filtered = from_logits.get("vectorized").load(device).log_probabilities

    def probabilities(logits, filters):
        if filters:
            return filtered(logits, **filters).exp()
        return logits.softmax(-1, dtype=torch.float32)

    def verify(draft_token_ids, target_logits, draft_logits, draft_logsumexp, uniforms, **filters):
        q, p = (probabilities(logits, filters) for logits in (draft_logits, target_logits))
        return sample(draft_token_ids, q, p, uniforms=uniforms)

    return verify


def not_theirs(cell: Workload, entrant: Contestant) -> str | None:
    """Why a peer has no place in a cell, or None: none filters inside the call that is timed."""
    if entrant.exact or not workloads.FILTERS[cell.name]:
        return None
    return "top-k and top-p come before the call that its adapter makes"


def add_targets(rows: list[dict]) -> None:
    """Sets the kernel's bytes without the logsumexp, `target_us` and `target_met` (None where no
    target was set) and `over_softmax`, how many times as fast as softmax first a row is."""
    softmax = {_cell(row): row for row in rows if row["sampler"] == SOFTMAX}
    for row in rows:
        kernel = row["sampler"].startswith(("cuda", "cpp"))
        without = row["sampler"].endswith(WITHOUT)
        if without and row["bytes"]:
            row["bytes"] = row["bytes_without"]
        row["target_us"] = row["target_met"] = row["over_softmax"] = None
        asked = row["dtype"] == "bfloat16" and row["vocab_size"] == workloads.BATCH_SWEEP_VOCAB
        if kernel and asked and row["gpu_us"] and row["batch_size"] in TARGETS_US:
            factor = FILTERED_FACTOR if workloads.FILTERS[row["workload"]] else 1.0
            row["target_us"] = factor * TARGETS_US[row["batch_size"]][without]
            row["target_met"] = row["gpu_us"]["median"] <= row["target_us"]
        other = softmax.get(_cell(row))
        clock = "gpu_us" if row["gpu_us"] else "latency_us"
        if kernel and other and other[clock] and row[clock]:
            row["over_softmax"] = round(other[clock]["median"] / row[clock]["median"], 3)


def _cell(row: dict) -> tuple:
    return tuple(row[key] for key in ("workload", "batch_size", "vocab_size", "dtype"))


def main(argv: list[str] | None = None) -> int:
    parser = cli.sweep_options(__doc__, runs=50, dials=False, choice=False)
    parser.add_argument("--peers", action="store_true", help="those of other packages too")
    args = cli.parse(parser, "from_logits", argv, program="-m src.benchmarking.logits")
    args.entrants = contestants(args.device)
    if args.peers:
        try:
            args.entrants += peers.contestants(args.device, "logits")
        except SamplerUnavailable as error:
            parser.error(f"--peers: {error}")
    options = {"problem": PROBLEM, "budget_s": BUDGET_S, "leave_out": not_theirs}
    result = cli.measure(args, workloads.LOGITS_CELLS, **options)
    add_targets(result["rows"])
    return cli.finish(args, result, plots.from_logits)


if __name__ == "__main__":
    cli.run(main)
