"""Three samplers race on one small workload: batch 4, 8 draft tokens, vocabulary 32,000.

Each is first checked against the float64 oracle on the very inputs that are timed. Time is latency:
from the call to the synchronised result, what a Python loop pays, median over --runs. On a GPU a
second column has the GPU's own time a call, from a CUDA graph over inputs that do not fit the L2
cache. Rows are peaked like a language model's and draft tokens are drawn from the draft.
Exit status: 0, or 1 where a sampler gave wrong tokens, or 2 for a bad option.
"""

from src.benchmarking import cli, workloads


def main(argv: list[str] | None = None) -> int:
    usual = workloads.QUICK_DEMO
    parser = cli.options(__doc__, runs=100)
    for option, default in (
        ("--batch-size", usual.batch_size),
        ("--spec-length", usual.spec_length),
        ("--vocab-size", usual.vocab_size),
    ):
        parser.add_argument(option, type=cli.positive, default=default)
    args = cli.parse(parser, "quick_demo", argv)
    workload = workloads.Workload(args.batch_size, args.spec_length, args.vocab_size)
    return cli.finish(args, cli.measure(args, [workload]))


if __name__ == "__main__":
    cli.run(main)
