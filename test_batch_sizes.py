"""Time over batch size at Llama 3.2's vocabulary (128,256) with 8 draft tokens a request.

Batch 1 to 16, to 256 with --large. Latency is from the call to the synchronised result, medians of
samplers that take turns; on a GPU a second table has the GPU's own time a call, from a CUDA graph
over inputs that do not fit the L2 cache. Each sampler is checked against the float64 oracle on the
timed inputs first. "win" and "loss" are the kernel's, "same" where p10-p90 overlap.

A script, not a test: pytest collects tests/ only.
"""

from src.benchmarking import cli, plots, workloads


def main(argv: list[str] | None = None) -> int:
    parser = cli.sweep_options(__doc__, runs=100)
    parser.add_argument("--large", action="store_true", help="batch 32, 64, 128 and 256 too")
    parser.add_argument("--spec-length", type=cli.positive, default=workloads.SPEC_LENGTH)
    parser.add_argument("--vocab-size", type=cli.positive, default=workloads.BATCH_SWEEP_VOCAB)
    args = cli.parse(parser, "test_batch_sizes", argv)
    cells = workloads.batch_sweep(args.spec_length, args.vocab_size, args.large)
    return cli.finish(args, cli.measure(args, cells), plots.over_batch)


if __name__ == "__main__":
    cli.run(main)
