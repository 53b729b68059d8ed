"""Speculative decoding with a real draft and target: what the rejection sampler is for.

Times plain decoding, speculative decoding with each sampler, and transformers' own assisted
generation on the same prompts, eagerly and (on a CUDA card) with rounds captured in CUDA graphs.

    python demo_with_real_llm.py                      the first pair that can be had
    python demo_with_real_llm.py --pair offline       no hub, no licence, runs on a CPU
    python demo_with_real_llm.py --draft X --target Y hub ids, local folders or GGUF files
"""

from __future__ import annotations

import sys

from src.decoding import models, options, plots, saving, tables

SCRIPT = "demo_with_real_llm"


def main(argv: list[str] | None = None) -> int:
    parser = options.options(__doc__)
    args = parser.parse_args(argv)
    try:
        comparison = options.comparison(args)
    except models.ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(str(error))
    if args.stream:
        comparison.stream(print)
    env = saving.environment(args.device)
    rows = comparison.run()
    report = f"{comparison.pair.label}\n\n{tables.tables(rows)}\n\n{tables.insights(rows)}"
    if args.check_lossless:
        report += f"\n\n{tables.lossless(comparison.check_lossless())}"
    print(f"\n{report}")
    # Another name, so that a smoke run never replaces a result.
    suffix = "-smoke" if args.smoke else ""
    path = saving.save(args.output, SCRIPT, env, rows, report, suffix=suffix)
    plots.save(rows, path.with_suffix(".png"), f"{comparison.pair.label}, {env['device']}")
    print(f"\nWritten: {path}")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
