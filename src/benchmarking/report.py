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
from src.benchmarking.glance import INPUTS, glance
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
    if script == "glance":
        first, *_ = scripts = list(INPUTS)
        card = next(iter(_newest_first(_recorded(f"*/{first}.json", recorded))), recorded / "none")
        paths = [card.parent / f"{name}.json" for name in scripts]
        return glance([results.load(path) for path in paths if environment.is_recorded(path)])
    paths = _newest_first(_recorded(f"*/{script}.json", recorded))
    paths += _recorded(f"*/{script}-*.json", recorded)
    if not paths:
        program = _PROGRAMS.get(script, f"{script}.py")
        return f"Nothing recorded yet: `python {program}` measures it on your machine."
    if script in SUMMARIES:
        addresses = [_address(path.with_suffix(".md"), recorded) for path in paths]
        return SUMMARIES[script](list(zip(map(results.load, paths), addresses, strict=True)))
    return "\n\n".join([_block(paths[0], script, recorded), *_others(paths[1:], script, recorded)])


def _recorded(pattern: str, recorded: Path) -> list[Path]:
    """The results that git keeps, graphics cards first; a smoke run is none."""
    paths = [path for path in recorded.glob(pattern) if not path.stem.endswith("-smoke")]
    paths = filter(environment.is_recorded, paths)
    return sorted(paths, key=lambda path: (results.cards_first(path.parent), path))


def _newest_first(paths: list[Path]) -> list[Path]:
    """By when they were recorded, graphics cards still before processors."""
    by_date = sorted(paths, key=lambda p: results.load(p)["environment"]["utc"], reverse=True)
    return sorted(by_date, key=lambda path: results.is_of_processor(path.parent))


def _address(path: Path, recorded: Path) -> str:
    return path.relative_to(recorded.parent).as_posix()


def _block(path: Path, script: str, recorded: Path) -> str:
    """A result's machine, its table, and where the rest is."""
    result = results.load(path)
    said = len(notes(result["rows"]))
    full = _address(path.with_suffix(".md"), recorded)
    lines = [f"{conditions(result)}:", "", brief(result), ""]
    lines.append(f"[Every figure]({full})" + (f", with {said} notes on rows." if said else "."))
    plot = path.with_suffix(".png")
    if plot.exists() and environment.is_recorded(plot):
        device = result["environment"]["device"]
        lines += ["", f"![{script}, {device}]({_address(plot, recorded)})"]
    return "\n".join(lines)


def _others(paths: list[Path], script: str, recorded: Path) -> list[str]:
    """One line for what else was recorded."""
    links = []
    for path in paths:
        text = results.load(path)["environment"]["device"]
        text += "" if path.stem == script else f", {path.stem}"
        links.append(f"[{text}]({_address(path.with_suffix('.md'), recorded)})")
    return [f"Recorded too: {'; '.join(links)}."] if links else []


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
    try:
        results.write_atomically(args.readme, after)
    except results.CannotSave as error:
        parser.error(str(error))
    return 0


def _write_page(parser: argparse.ArgumentParser, folder: Path) -> int:
    try:
        results.write_atomically(folder / "index.html", page.page(folder))
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}; wanted a folder of results")
    except (ValueError, results.CannotSave) as error:
        parser.error(str(error))
    print(f"Written: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
