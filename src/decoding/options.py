"""The demo's options, and the comparison that they ask for."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm

from src.decoding import models, prompts
from src.decoding.methods import Comparison, Settings
from src.decoding.speculative import MODES

DTYPES = ("bfloat16", "float16", "float32")


def options(description: str) -> argparse.ArgumentParser:
    """The demo's parser."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pair", default="auto", help=f"auto, {', '.join([*models.PAIRS, *models.SYNTHETIC])}")
    add("--target", help="hub id, local folder or GGUF file, instead of --pair")
    add("--draft", help="with --target: the same, or prompt-lookup (default)")
    add(
        "--spec-length",
        type=spec_lengths,
        default=(8,),
        metavar="K",
        help="draft tokens a round, or auto: measure and choose; several, as in 1-4,8,auto, run "
        "the fastest sampler at each (default: 8)",
    )
    add("--max-new-tokens", type=positive, default=30)
    add("--runs", type=positive, default=3, help="timed runs over all prompts")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is off")
    add("--top-p", type=float, default=1.0, help="1 is off")
    add("--verification", choices=("token", "block"), default="token")
    add("--batch-size", type=positive, default=1)
    add("--prompts", type=Path, default=prompts.OWN, help="JSON lines in Spec-Bench's format")
    add("--category", action="append", default=[], help="only this one (may be repeated)")
    add("--per-category", type=positive, help="prompts a category (default: all; on a CPU 1)")
    add("--acceptance", type=float, default=0.8, help="forced, for a synthetic pair")
    add("--modes", default=",".join(MODES), help="eager, graphed, or both (default)")
    add(
        "--compile", action="store_true", help="under torch.compile what the CUDA kernels do not do"
    )
    add("--check-lossless", action="store_true", help="report how the text compares with plain")
    add("--stream", action="store_true", help="print the first prompt's text as it comes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, choices=("cpu", "cuda"), help="default: a card if there is one")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a card, float32 on a CPU")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="two prompts, eight tokens, one run")
    add("--output", type=Path, default=Path("benchmark_results"), metavar="FOLDER")
    add("--overwrite", action="store_true", help="replace a result that another commit recorded")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least 1, got {text!r}")
    return int(text)


def spec_lengths(text: str) -> tuple[int | str, ...]:
    """(1, 2, 3, 8, "auto") of "1-3,8,auto"."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if part == "auto":
            found.append(part)
        else:
            found += range(positive(first), positive(last if dash else first) + 1)
    if len(set(found)) < max(1, len(found)):
        raise argparse.ArgumentTypeError(f"wanted each length once, got {text!r}")
    if not found:
        raise argparse.ArgumentTypeError(f"wanted lengths, got {text!r}")
    return tuple(found)


def check(args: argparse.Namespace) -> None:
    """What needs no model. Raises ValueError for options that cannot be."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA card here; run with --device cpu")
    if args.draft and not args.target:
        raise ValueError("--draft came without --target; wanted both, or a --pair")


def comparison(args: argparse.Namespace) -> Comparison:
    """What checked options ask for, models loaded; says on stdout which.

    Raises models.ModelUnavailable, and ValueError for options that cannot be.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    models.quiet()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    place = {"device": args.device, "dtype": dtype}
    if args.target:
        pair = models.load_models(args.target, args.draft or models.PROMPT_LOOKUP, **place)
    else:
        pair = models.load(args.pair, **place)
    print("\n".join([*pair.notes, f"{pair.label} ({args.device}, {dtype})"]), flush=True)
    bar = tqdm(disable=None, leave=False, bar_format="{desc} [{elapsed}]")
    settings = Settings(
        spec_lengths=args.spec_length,
        max_new_tokens=8 if args.smoke else args.max_new_tokens,
        runs=1 if args.smoke else args.runs,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        verification=args.verification,
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


def file_name(args: argparse.Namespace, script: str) -> str:
    """A result's file: pairs, batch sizes and kinds of run do not replace one another's, and a
    smoke run never replaces a result."""
    pair = args.pair
    if args.target:
        pair = f"{Path(args.target).name}-{Path(args.draft or models.PROMPT_LOOKUP).name}"
    parts = [script]
    if args.smoke:
        return f"{script}-smoke.json"
    if pair != "auto":
        parts.append(re.sub(r"[^\w.]+", "-", pair))
    if pair.startswith("synthetic:"):
        parts.append(f"{args.acceptance:g}")
    if args.batch_size > 1:
        parts.append(f"batch-{args.batch_size}")
    if len(args.spec_length) > 1:
        parts.append("lengths")
    return "-".join(parts) + ".json"
