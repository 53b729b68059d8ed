"""Speculative decoding with a real draft and target: what the rejection sampler is for.

Times plain decoding, speculative decoding with each sampler, and transformers' own assisted
generation on the same prompts, eagerly and (on a CUDA card) with rounds captured in CUDA graphs.

    python demo_with_real_llm.py                      the first pair that can be had
    python demo_with_real_llm.py --pair offline       no hub, no licence, runs on a CPU
    python demo_with_real_llm.py --draft X --target Y hub ids, local folders or GGUF files
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from src.decoding import models, plots, prompts, saving, tables
from src.decoding.methods import Comparison, Settings
from src.decoding.speculative import MODES

SCRIPT = "demo_with_real_llm"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pair", default="auto", help=f"auto, {', '.join([*models.PAIRS, *models.SYNTHETIC])}")
    add("--target", help="hub id, local folder or GGUF file, instead of --pair")
    add("--draft", default=models.PROMPT_LOOKUP, help="the same, or prompt-lookup (default)")
    add("--spec-length", default="8", help="draft tokens a round, or auto: measure and choose")
    add("--max-new-tokens", type=int, default=30)
    add("--runs", type=int, default=3, help="timed runs over all prompts")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is off")
    add("--top-p", type=float, default=1.0, help="1 is off")
    add("--batch-size", type=int, default=1)
    add("--prompts", type=Path, default=prompts.OWN, help="JSON lines in Spec-Bench's format")
    add("--category", action="append", default=[], help="only this one (may be repeated)")
    add("--per-category", type=int, help="prompts a category (default: all; on a CPU 1)")
    add("--acceptance", type=float, default=0.8, help="forced, for a synthetic pair")
    add("--modes", default=",".join(MODES), help="eager, graphed, or both (default)")
    add("--compile", action="store_true", help="forwards under torch.compile")
    add("--check-lossless", action="store_true", help="report how the text compares with plain")
    add("--stream", action="store_true", help="print the first prompt's text as it comes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--dtype", help="default: bfloat16 on a card, float32 on a CPU")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="two prompts, eight tokens, one run")
    add("--output", type=Path, default=Path("benchmark_results"), metavar="FOLDER")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    models.quiet()
    try:
        comparison = compare(args, dtype)
    except models.ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(str(error))
    if args.stream:
        comparison.stream(print)
    env = saving.environment(args.device)
    rows = comparison.run()
    report = "\n\n".join(
        [comparison.pair.label, tables.tables(rows), "### Key Insights"]
        + ["\n".join(f"- {insight}" for insight in tables.insights(rows))]
    )
    if args.check_lossless:
        lossless = comparison.check_lossless()
        report += f"\n\n### Losslessness\n\n{tables.lossless(lossless)}"
    print(f"\n{report}")
    # Another name, so that a smoke run never replaces a result.
    suffix = "-smoke" if args.smoke else ""
    path = saving.save(args.output, SCRIPT, env, rows, report, suffix=suffix)
    plots.save(rows, path.with_suffix(".png"), f"{comparison.pair.label}, {env['device']}")
    print(f"\nWritten: {path}")
    return int(any(row["status"] == "failed" for row in rows))


def compare(args, dtype: torch.dtype) -> Comparison:
    place = {"device": args.device, "dtype": dtype}
    if args.target:
        pair = models.load_models(args.target, args.draft, **place)
    else:
        pair = models.load(args.pair, **place)
    print("\n".join([*pair.notes, f"{pair.label} ({args.device}, {dtype})"]), flush=True)
    bar = tqdm(disable=None, leave=False, bar_format="{desc} [{elapsed}]")
    settings = Settings(
        spec_length=args.spec_length if args.spec_length == "auto" else int(args.spec_length),
        max_new_tokens=8 if args.smoke else args.max_new_tokens,
        runs=1 if args.smoke else args.runs,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        acceptance=args.acceptance,
        modes=args.modes.split(","),
        compiled=args.compile,
        seed=args.seed,
        on_progress=bar.set_description,
    )
    chosen = prompts.read(args.prompts, args.category)
    per_category = args.per_category or (1 if args.device == "cpu" else None)
    chosen = prompts.first(chosen, 1 if args.smoke else per_category)
    return Comparison(pair, chosen[-2:] if args.smoke else chosen, settings)


if __name__ == "__main__":
    sys.exit(main())
