"""The options that the scripts share, their errors (one line, exit status 2), and saving.

A script is: options(...), parse(...), measure(...), finish(...).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from src import samplers
from src.benchmarking import (
    compare,
    environment,
    peers,
    rendering,
    results,
    sweep,
    tables,
    timing,
    workloads,
)
from src.benchmarking.workloads import Workload
from src.contract import SamplerUnavailable

# In a table's order; vectorized-compiled is asked for by name, for compiling takes its time.
DEFAULT_SAMPLERS = {
    "cpu": ["baseline", "vectorized", "cpp"],
    "cuda": ["baseline", "vectorized", "cuda"],
}
INTERRUPTED = 130
SMOKE_RUNS = 5
BUSY_PERCENT = 5  # a display takes a few


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without argparse's page of usage


def options(
    description: str | None, *, runs: int, dials: bool = True, choice: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options of every script.

    dials: --dtype and --acceptance for all workloads, where they do not have their own.
    choice: --samplers and --peers, where the script does not say what it compares.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if dials:
        _add_dials(parser)
    if choice:
        _add_choice(parser)
    parser.add_argument("--device", type=_known("device", DEFAULT_SAMPLERS), help="cpu or cuda")
    parser.add_argument("--runs", type=positive, default=runs, help="timed calls of each sampler")
    parser.add_argument("--seed", type=_seed, default=0)
    # Threads that spin while they wait for one another made one vectorized call (4 x 32,000) take
    # between 4 and 158 ms on a virtual machine with 2 cores, and 2.3 to 3.1 ms with one thread.
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads with --device cpu (default 1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark_results"),
        metavar="FOLDER",
        help="results go to FOLDER/<device>/ (default: benchmark_results)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a result that another commit recorded"
    )
    parser.add_argument("--json", action="store_true", help="print the result file on stdout")
    return parser


def _add_dials(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", type=_known("dtype", workloads.DTYPES))
    parser.add_argument(
        "--acceptance",
        default="medium",
        type=_known("acceptance", workloads.ACCEPTANCE_NOISE),
        help="how near the draft is to the target: low, medium (default) or high",
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samplers",
        type=_names,
        metavar="NAME,NAME",
        help=f"of {', '.join(samplers.SAMPLERS)}; 'all' is every one of the device",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="the samplers of other packages too, where they are installed",
    )


def sweep_options(description: str | None, **others) -> argparse.ArgumentParser:
    """The same for a sweep over several workloads; arguments as of `options`."""
    parser = options(description, **others)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds on a CPU, for CI")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="say what is faster, slower or the same"
    )
    parser.add_argument(
        "--twice",
        action="store_true",
        help="the whole sweep again: a difference below that of its two runs is then none",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser,
    script: str,
    argv: Sequence[str] | None,
    *,
    program: str | None = None,
):
    """Arguments that can be run: device and samplers resolved, output folder and --compare tried.

    program: what python is given to run it, "<script>.py" unless it is "-m module".
    Adds `script`, `command`, `entrants`, `path` (of the JSON file) and `old`, the result to compare
    with. Ends the process with status 2 and one line where something is wrong.
    """
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA card"
        parser.error(f"--device cuda: {why} ({torch.__version__}); run with --device cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    args.script = script
    program = program or f"{script}.py"
    args.command = [*program.split(), *(sys.argv[1:] if argv is None else argv)]
    args.entrants = _entrants(args, parser, program) if hasattr(args, "samplers") else []
    args.smoke = getattr(args, "smoke", False)
    # Another name: a smoke run never replaces a recorded result, whatever --output is.
    name = f"{script}-smoke.json" if args.smoke else f"{script}.json"
    args.path = results.folder(args.output, args.device) / name
    args.old = None
    try:
        results.ensure_writable(args.path, args.overwrite)
        if getattr(args, "compare", None):
            args.old = results.load(args.compare)
    except (results.CannotSave, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--compare {args.compare}: {error.strerror}")
    return args


def _entrants(args, parser: argparse.ArgumentParser, program: str) -> list[sweep.Contestant]:
    names = args.samplers or DEFAULT_SAMPLERS[args.device]
    if names == ["all"]:
        names = samplers.names(args.device)
    entrants = sweep.contestants(names, args.device)
    for entrant in entrants:
        # Asked for by name: an error. Among the defaults: a row that says why it was skipped.
        if args.samplers and args.samplers != ["all"] and entrant.function is None:
            usual = ",".join(DEFAULT_SAMPLERS[args.device])
            command = entrant.command or f"python {program} --samplers {usual}"
            parser.error(f"--samplers {entrant.name}: {entrant.reason}; run: {command}")
    try:
        return entrants + (peers.contestants(args.device) if args.peers else [])
    except SamplerUnavailable as error:
        parser.error(f"--peers: {error}")


def sized(args, cells: Sequence[Workload]) -> list[Workload]:
    """`cells` as the options want them: their dtype and acceptance, and small for --smoke."""
    if hasattr(args, "dtype"):
        cells = [cell._replace(dtype=args.dtype, acceptance=args.acceptance) for cell in cells]
    return workloads.smoke(cells) if args.smoke else list(cells)


def measure(args, cells: Sequence[Workload], **options) -> dict:
    """Prints the machine's line, then times `cells`, with the dtype and acceptance of the options
    where the script has them, under a progress bar on stderr (none where stderr is no terminal).

    options: of sweep.run. Returns the result.
    """
    cells = sized(args, cells)
    if args.smoke:
        args.runs = min(args.runs, SMOKE_RUNS)
    env = environment.collect(args.device, args.command)
    say(args, environment.machine_line(env))
    say(args, "\n".join(describe(cell) for cell in cells) + "\n")
    busy = environment.idle_utilisation() if args.device == "cuda" else None
    env["copy_gb_s"] = timing.copy_gb_s(args.device)
    options |= {"runs": args.runs, "seed": args.seed, "copy_gb_s": env["copy_gb_s"]}

    def run() -> list[dict]:
        bar = tqdm(cells, unit="workload", leave=False, disable=None)
        return sweep.run(bar, args.entrants, args.device, **options)

    rows = run()
    if getattr(args, "twice", False):
        env["repeatability"] = compare.repeat(rows, run())
    for row in rows:
        if busy and busy > BUSY_PERCENT:
            sweep.warn(row, f"the card was {busy} % busy with something else before the run")
    return results.make(args.script, env, rows)


def finish(args, result: dict, plot: Callable[[dict, Path], None] | None = None) -> int:
    """Prints the table, writes .json, .md and, with `plot(result, path)`, .png, and prints what was
    skipped or failed. Returns the exit status: 1 where a check failed. Raises results.CannotSave;
    the table has been printed then."""
    checked: dict[bool, dict] = {True: {}, False: {}}
    for row in result["rows"]:
        if row["status"] == "ok":
            checked[row["exact"]][row["label"]] = None
    exactly = ", ".join(checked[True]) or "none"
    say(args, f"Checked against the float64 oracle on the timed inputs: {exactly}")
    if checked[False]:
        say(args, f"Checked for validity and distribution: {', '.join(checked[False])}")
    say(args, "")
    say(args, rendering.table(result))
    if args.old:
        say(args, "\n".join(["", f"Against {args.compare}:", *compare.lines(args.old, result)]))
    _save(args, result, plot)
    return _end(args, result)


def finish_untimed(args, result: dict, plot: Callable[[dict, Path], None]) -> int:
    """finish for a result without times."""
    say(args, rendering.table(result))
    _save(args, result, plot)
    return _end(args, result)


def _save(args, result: dict, plot: Callable[[dict, Path], None] | None) -> None:
    results.write_atomically(args.path, results.dumps(result))
    results.write_atomically(args.path.with_suffix(".md"), rendering.document(result))
    if plot:
        plot(result, args.path.with_suffix(".png"))


def _end(args, result: dict) -> int:
    repeated = compare.repeated(result["environment"])
    say(args, "\n".join(["", *repeated, *tables.notes(result["rows"]), f"Written: {args.path}"]))
    if args.json:
        print(results.dumps(result), end="")
    return int(any(row["status"] == "failed" for row in result["rows"]))


def describe(cell: Workload) -> str:
    name = f"{cell.name}: " if cell.name else ""
    return (
        f"{name}batch {cell.batch_size}, spec length {cell.spec_length}, vocab {cell.vocab_size}, "
        f"{cell.dtype}, {cell.acceptance} acceptance"
    )


def say(args, text: str) -> None:
    """For people: stdout, or stderr where --json has stdout."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def run(main: Callable[[], int]) -> None:
    """Runs a script: Ctrl-C is one line and status 130, a result that cannot be written one line
    and status 1, with earlier results as they were."""
    try:
        sys.exit(main())
    except results.CannotSave as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: earlier results are as they were", file=sys.stderr)
        sys.exit(INTERRUPTED)


def integers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    value = int(text) if text.lstrip("-").isdecimal() else least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least {least}, got {text!r}")
    return value


def _known(what: str, names) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(f"{what} {text!r} is not known; wanted one of {known}")
        return text

    return convert


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    try:
        for name in names if names != ["all"] else []:
            samplers.get(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not names:
        raise argparse.ArgumentTypeError("wanted at least one name")
    return list(dict.fromkeys(names))
