"""The kernel against its targets: every cell of batch x vocabulary, with the floor beside it.

Batch 1 to 256 at 32,000, 128,256 and 151,936 tokens with 8 drafts in float32; the same in bfloat16
and float16 at some batches; and the corners in which a fast kernel could lose to simple code: 100
tokens, one draft, every draft accepted, every first draft rejected. The target of a cell is
max(1.2 floor, floor + 3.5 us) of GPU time; the floor is a kernel that only reads the rows that
matter. Each sampler is checked against the float64 oracle on the timed inputs first.

    python -m src.benchmarking.kernel [--peers]

writes kernel.json, .md and .png. Some minutes on a GPU; on a CPU it is for --smoke.
"""

from __future__ import annotations

from src.benchmarking import cli, plots, workloads
from src.benchmarking.sweep import Contestant
from src.benchmarking.target_tables import KERNELS

FLOOR_FACTOR, FLOOR_MARGIN_US = 1.2, 3.5
# The Python loop takes time in proportion to the batch.
BASELINE_MOST = 16


def too_slow(cell: workloads.Workload, entrant: Contestant) -> str | None:
    if entrant.name == "baseline" and cell.batch_size > BASELINE_MOST:
        return f"left out above batch {BASELINE_MOST}: its time grows with the batch"
    return None


def add_targets(rows: list[dict]) -> None:
    """Sets `target_us` of the kernel's rows, where the floor was measured, and `target_met`."""
    for row in rows:
        row["target_us"] = row["target_met"] = None
        if row["sampler"] in KERNELS and row["floor_us"] and row["gpu_us"]:
            floor = row["floor_us"]
            row["target_us"] = round(max(FLOOR_FACTOR * floor, floor + FLOOR_MARGIN_US), 3)
            row["target_met"] = row["gpu_us"]["median"] <= row["target_us"]


def main(argv: list[str] | None = None) -> int:
    parser = cli.sweep_options(__doc__, runs=50, dials=False)
    args = cli.parse(parser, "kernel", argv, program="-m src.benchmarking.kernel")
    result = cli.measure(args, workloads.KERNEL_CELLS, leave_out=too_slow, budget_s=3.0)
    add_targets(result["rows"])
    return cli.finish(args, result, plots.kernel)


if __name__ == "__main__":
    cli.run(main)
