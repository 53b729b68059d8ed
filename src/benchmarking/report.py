"""Tables from result files: the README's between its markers, and a page of all of them.

python -m src.benchmarking.report benchmark_results   writes its index.html, which needs no network
python -m src.benchmarking.report --readme            rewrites them from the results git keeps
python -m src.benchmarking.report --readme --check    exit status 1 where they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from src.benchmarking import compare, environment, results
from src.benchmarking.losslessness_tables import (
    losslessness_table,
    losslessness_words,
    soak_table,
    soak_words,
)
from src.benchmarking.profile_tables import profile_brief, profile_table
from src.benchmarking.profile_tables import words as words_of_profile
from src.benchmarking.tables import (
    batch_table,
    bullets,
    conditions,
    method_table,
    notes,
    vocab_brief,
    vocab_table,
)
from src.benchmarking.target_tables import (
    kernel_brief,
    kernel_table,
    kernel_words,
    logits_brief,
    logits_table,
    logits_words,
)
from src.decoding import tables as decoding_tables

MARKERS = re.compile(r"(<!-- table:([a-z0-9_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


# What runs a script that is not <script>.py at the top level.
_PROGRAMS = {"kernel": "-m src.benchmarking.kernel", "from_logits": "-m src.benchmarking.logits"}


def table(result: dict) -> str:
    """The Markdown table of a result, by its script."""
    return _TABLES.get(result["script"], method_table)(result)


def document(result: dict) -> str:
    """The .md beside a result's .json: the machine, the table, the rows with something to say."""
    env = result["environment"]
    lines = [f"# {result['script']}", "", conditions(result), "", table(result)]
    said = [*compare.repeated(env), *notes(result["rows"])]
    return "\n".join([*lines, *bullets(said), "", f"    {env['command']}", ""])


_TABLES: dict[str, Callable[[dict], str]] = {
    "quick_demo": method_table,
    "test_batch_sizes": batch_table,
    "compare_vocab_sizes": vocab_table,
    "kernel": kernel_table,
    "from_logits": logits_table,
    "profile_rejection_sampling": profile_table,
    "demo_with_real_llm": lambda result: decoding_tables.tables(result["rows"]),
    "losslessness": losslessness_table,
    "soak": soak_table,
}


_WORDS: dict[str, Callable[[dict], list[str]]] = {
    "kernel": kernel_words,
    "from_logits": logits_words,
    "profile_rejection_sampling": words_of_profile,
    "losslessness": losslessness_words,
    "soak": soak_words,
}


# What the README shows of a result whose table is long.
_BRIEF: dict[str, Callable[[dict], str]] = {
    "compare_vocab_sizes": vocab_brief,
    "kernel": kernel_brief,
    "from_logits": logits_brief,
    "profile_rejection_sampling": profile_brief,
}
# What it shows of many results of one script, in one table.
_SUMMARIES = {"demo_with_real_llm": decoding_tables.summary}


def words(result: dict) -> list[str]:
    """What a result's numbers come to in sentences, for the scripts that say so."""
    return _WORDS.get(result["script"], lambda result: [])(result)


def readme_text(readme: str, recorded: Path) -> str:
    """`readme` with the text between each pair of markers made from the files under `recorded`."""
    return MARKERS.sub(
        lambda match: match[1] + _recorded_tables(match[2], recorded) + "\n" + match[3], readme
    )


def _recorded_tables(script: str, recorded: Path) -> str:
    paths = [*recorded.glob(f"*/{script}.json"), *recorded.glob(f"*/{script}-*.json")]
    paths = [path for path in paths if not path.stem.endswith("-smoke")]
    paths = filter(environment.is_recorded, paths)
    # Graphics cards first.
    paths = sorted(paths, key=lambda path: (path.parent.name.startswith("cpu-"), path))
    if not paths:
        program = _PROGRAMS.get(script, f"{script}.py")
        return f"Nothing recorded yet: `python {program}` measures it on your machine."
    if script in _SUMMARIES:
        addresses = [path.with_suffix(".md").relative_to(recorded.parent) for path in paths]
        found = zip(map(results.load, paths), (a.as_posix() for a in addresses), strict=True)
        return _SUMMARIES[script](list(found))
    blocks = []
    for path in paths:
        result = results.load(path)
        short = _BRIEF.get(script, table)(result)
        lines = [f"{conditions(result)}:", "", short]
        if path.stem != script:
            lines[0] = f"`{result['environment']['command']}`, {lines[0]}"
        full = path.with_suffix(".md").relative_to(recorded.parent).as_posix()
        said = len(notes(result["rows"]))
        lines += [
            "",
            f"[Every figure]({full})" + (f", with {said} notes on rows." if said else "."),
        ]
        plot = path.with_suffix(".png")
        if plot.exists() and environment.is_recorded(plot):
            address = plot.relative_to(recorded.parent).as_posix()
            lines += ["", f"![{script}, {result['environment']['device']}]({address})"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="results, of which index.html is written into it"
    )
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=environment.ROOT / "README.md",
        metavar="FILE",
        help="the file whose tables are written (default: README.md)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a change")
    parser.add_argument("--results", type=Path, default=environment.ROOT / "benchmark_results")
    args = parser.parse_args(argv)
    if args.folder:
        return _write_page(parser, args.folder)
    if not args.readme:
        parser.error("wanted a folder of results, or --readme")
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


def _write_page(parser: argparse.ArgumentParser, folder: Path) -> int:
    from src.benchmarking import page  # which imports this module

    try:
        results.write_atomically(folder / "index.html", page.page(folder))
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}; wanted a folder of results")
    except ValueError as error:
        parser.error(str(error))
    print(f"Written: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
