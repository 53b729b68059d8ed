"""Tables from result files, and the README's between its markers.

python -m src.benchmarking.report --readme            rewrites them from the results git keeps
python -m src.benchmarking.report --readme --check    exit status 1 where they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from src.benchmarking import environment, results
from src.benchmarking.profile_tables import profile_table
from src.benchmarking.tables import (
    batch_table,
    bullets,
    conditions,
    method_table,
    notes,
    vocab_table,
)
from src.benchmarking.target_tables import kernel_table, logits_table

MARKERS = re.compile(r"(<!-- table:([a-z0-9_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(result: dict) -> str:
    """The Markdown table of a result, by its script."""
    return _TABLES.get(result["script"], method_table)(result)


def document(result: dict) -> str:
    """The .md beside a result's .json: the machine, the table, the rows with something to say."""
    env = result["environment"]
    lines = [f"# {result['script']}", "", conditions(result), "", table(result)]
    return "\n".join([*lines, *bullets(notes(result["rows"])), "", f"    {env['command']}", ""])


_TABLES: dict[str, Callable[[dict], str]] = {
    "quick_demo": method_table,
    "test_batch_sizes": batch_table,
    "compare_vocab_sizes": vocab_table,
    "kernel": kernel_table,
    "from_logits": logits_table,
    "profile_rejection_sampling": profile_table,
}


def readme_text(readme: str, recorded: Path) -> str:
    """`readme` with the text between each pair of markers made from the files under `recorded`."""
    return MARKERS.sub(
        lambda match: match[1] + _recorded_tables(match[2], recorded) + "\n" + match[3], readme
    )


def _recorded_tables(script: str, recorded: Path) -> str:
    paths = filter(environment.is_recorded, recorded.glob(f"*/{script}.json"))
    # Graphics cards first.
    paths = sorted(paths, key=lambda path: (path.parent.name.startswith("cpu-"), path))
    if not paths:
        return f"Nothing recorded yet: `python {script}.py` measures it on your machine."
    blocks = []
    for path in paths:
        result = results.load(path)
        lines = [f"{conditions(result)}:", "", table(result), *bullets(notes(result["rows"]))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=environment.ROOT / "README.md",
        required=True,
        metavar="FILE",
        help="the file whose tables are written (default: README.md)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a change")
    parser.add_argument("--results", type=Path, default=environment.ROOT / "benchmark_results")
    args = parser.parse_args(argv)
    before = args.readme.read_text(encoding="utf-8")
    after = readme_text(before, args.results)
    if args.check:
        if before != after:
            print(
                f"{args.readme.name} differs from the recorded results; "
                "run: python -m src.benchmarking.report --readme",
                file=sys.stderr,
            )
        return int(before != after)
    results.write_atomically(args.readme, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
