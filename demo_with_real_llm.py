"""Speculative decoding with a real draft and target: what the rejection sampler is for.

Times plain decoding, speculative decoding with each sampler, and transformers' own assisted
generation on the same prompts, eagerly and (on a CUDA card) with rounds captured in CUDA graphs.

    python demo_with_real_llm.py                      the first pair that can be had
    python demo_with_real_llm.py --pair offline       no hub, no licence, runs on a CPU
    python demo_with_real_llm.py --draft X --target Y hub ids, local folders or GGUF files
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from src.benchmarking import cli, environment, results
from src.decoding import models, options, plots, tables

SCRIPT = "demo_with_real_llm"


def main(argv: list[str] | None = None) -> int:
    parser = options.options(__doc__)
    args = parser.parse_args(argv)
    try:
        options.check(args)
        path = results.folder(args.output, args.device) / options.file_name(args, SCRIPT)
        results.ensure_writable(path, args.overwrite)
        comparison = options.comparison(args)
    except models.ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, results.CannotSave) as error:
        parser.error(str(error))
    env = environment.collect(
        args.device, [f"{SCRIPT}.py", *(sys.argv[1:] if argv is None else argv)]
    )
    env["transformers"] = metadata.version("transformers")
    print(environment.machine_line(env), flush=True)
    if args.stream:
        comparison.stream(print)
    rows = comparison.run()
    report = f"{comparison.pair.label}\n\n{tables.tables(rows)}\n\n{tables.insights(rows)}"
    if args.check_lossless:
        checked = comparison.check_lossless()
        report += f"\n\n{tables.lossless(checked)}"
        by_method = {(entry["label"], entry["mode"]): entry for entry in checked}
        for row in rows:
            row["losslessness"] = by_method.get((row["label"], row["mode"]))
    print(f"\n{report}")
    save(path, results.make(SCRIPT, env, rows), report, comparison.pair.label)
    print(f"\nWritten: {path}")
    return int(any(row["status"] == "failed" for row in rows))


def save(path: Path, result: dict, report: str, label: str) -> None:
    """Writes .json, .md and, where a method ran, .png."""
    env = result["environment"]
    lines = [f"# {SCRIPT}", f"{environment.machine_line(env)}, {env['utc'][:10]}", report]
    results.write_atomically(path, results.dumps(result))
    document = "\n\n".join([*lines, f"    {env['command']}\n"])
    results.write_atomically(path.with_suffix(".md"), document)
    picture = plots.picture(result["rows"], f"{label}, {env['device']}")
    if picture:
        results.write_atomically(path.with_suffix(".png"), picture)


if __name__ == "__main__":
    cli.run(main)
