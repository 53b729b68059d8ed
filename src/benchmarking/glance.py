"""What one card's recorded results come to: the kernel beside the fastest sampler of any other
package, at the batch sizes of the sweeps."""

from __future__ import annotations

from src.benchmarking.tables import bullets, conditions, markdown
from src.benchmarking.target_tables import KERNELS, cells, fastest_peer

# What a script verifies from, in the order of the lines.
INPUTS = {"test_batch_sizes": "probabilities", "from_logits": "logits"}


def glance(results: list[dict]) -> str:
    """A line a cell, and under them when each result was recorded. `results`: of one device, in the
    order of the lines; those of other scripts are left out."""
    results = [result for result in results if result["script"] in INPUTS]
    body = [line for result in results for line in _lines(result)]
    if not body:
        return "Nothing recorded on a card yet."
    headers = ["Verifies from", "dtype", "Batch Size", "CUDA C++ Kernel (us)"]
    headers += ["Fastest of other packages (us)", "over it", "PyTorch Vectorized (us)"]
    headers += ["Python loop (us)"]
    said = [f"{INPUTS[r['script']].capitalize()}: {conditions(r)}." for r in results]
    return "\n".join([markdown(body, headers), *bullets(said)])


def _lines(result: dict) -> list[list[str]]:
    """A line for each cell in which another package's sampler ran."""
    lines = []
    for rows in cells(result["rows"]).values():
        mine = next((rows[name] for name in KERNELS if name in rows), None)
        peer = fastest_peer(rows, "gpu_us")
        if not (mine and mine["gpu_us"] and peer):
            continue
        ours, theirs = mine["gpu_us"]["median"], peer["gpu_us"]["median"]
        lines.append(
            [INPUTS[result["script"]], mine["dtype"], mine["batch_size"], f"{ours:.1f}"]
            + [f"{theirs:.1f} ({peer['label']})", f"{theirs / ours:.1f}x"]
            + [_us(rows.get("vectorized"), "gpu_us"), _us(rows.get("baseline"), "latency_us")]
        )
    return lines


def _us(row: dict | None, clock: str) -> str:
    return f"{row[clock]['median']:.0f}" if row and row[clock] else "-"
