"""Tables from result files: the README's between its markers, and a page of all of them.

python -m src.benchmarking.report benchmark_results   writes its index.html, which needs no network
python -m src.benchmarking.report --readme            rewrites them from the results git keeps
python -m src.benchmarking.report --readme --check    exit status 1 where they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from src.benchmarking import environment, page, results
from src.benchmarking.rendering import SUMMARIES, brief
from src.benchmarking.tables import conditions, notes

MARKERS = re.compile(r"(<!-- table:([a-z0-9_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


# What runs a script that is not <script>.py at the top level.
_PROGRAMS = {"kernel": "-m src.benchmarking.kernel", "from_logits": "-m src.benchmarking.logits"}


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
    if script in SUMMARIES:
        addresses = [path.with_suffix(".md").relative_to(recorded.parent) for path in paths]
        found = zip(map(results.load, paths), (a.as_posix() for a in addresses), strict=True)
        return SUMMARIES[script](list(found))
    blocks = []
    for path in paths:
        result = results.load(path)
        short = brief(result)
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
