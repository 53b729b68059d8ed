"""Time over vocabulary size: four named configurations, then the vocabularies of real models.

The configurations are batch 1 and 4 at 32,000 and 128,256 tokens; the vocabularies, from Llama-2's
to Gemma-3's 262,144, run at batch 4 (and 64 with --large), 8 draft tokens a request. A second table
has the bytes that a call must touch (two vocabulary rows for a rejected request, one for an
accepted one) and the share of a large copy's bandwidth that this comes to: by GPU time on a GPU,
else by latency. Each sampler is checked against the float64 oracle on the timed inputs first.
"""

from src.benchmarking import cli, plots, workloads


def main(argv: list[str] | None = None) -> int:
    parser = cli.sweep_options(__doc__, runs=100)
    parser.add_argument("--large", action="store_true", help="the vocabularies at batch 64 too")
    args = cli.parse(parser, "compare_vocab_sizes", argv)
    cells = [*workloads.CONFIGURATIONS, *workloads.vocab_sweep(args.large)]
    return cli.finish(args, cli.measure(args, cells), plots.over_vocab)


if __name__ == "__main__":
    cli.run(main)
