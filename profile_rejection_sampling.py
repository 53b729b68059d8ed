"""Where the time of a rejection sampler goes, at Llama 3.2's vocabulary and several batch sizes.

For each sampler: host time by stage (validation in Python, the Python between operators, dispatch,
allocation, launch, waiting), device time by kernel (torch.profiler), the bytes that a call must
touch, the bandwidth that this comes to, and the distance to the floor, a kernel that only reads
those bytes. On a GPU the ladder of docs/kernel.md runs beside the samplers: a thread a row, a block
a row, the vocabulary split over blocks in two launches, and over a cluster in one. Every one is
checked against the float64 oracle first. On a CPU, stages and operators are the host's own.
"""

from pathlib import Path

from src.benchmarking import cli, plots, profiling, workloads

SCRIPT = "profile_rejection_sampling"


def main(argv: list[str] | None = None) -> int:
    parser = cli.sweep_options(__doc__, runs=50)
    sizes = workloads.PROFILE_BATCH_SIZES
    parser.add_argument("--batch-sizes", type=cli.integers, default=sizes, metavar="B,B")
    parser.add_argument("--spec-length", type=cli.positive, default=workloads.SPEC_LENGTH)
    parser.add_argument("--vocab-size", type=cli.positive, default=workloads.BATCH_SWEEP_VOCAB)
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write a Chrome trace")
    parser.add_argument("--nvtx", action="store_true", help="an NVTX range a call, for nsys")
    parser.add_argument("--ncu", action="store_true", help="only print Nsight Compute's commands")
    parser.add_argument("--once", action="store_true", help="one call, between profiler marks")
    args = cli.parse(parser, SCRIPT, argv)
    args.entrants = profiling.all_contestants(args)
    shape = {"spec_length": args.spec_length, "vocab_size": args.vocab_size}
    cells = [workloads.Workload(size, **shape) for size in args.batch_sizes]
    cells = cli.sized(args, cells)
    if args.ncu or args.once:
        return profiling.isolate(args, cells, [f"{SCRIPT}.py"])
    result = cli.measure(args, cells)
    options = {"seed": args.seed, "trace": args.trace, "nvtx": args.nvtx}
    profiling.add_profiles(result["rows"], cells, args.entrants, args.device, **options)
    return cli.finish(args, result, plots.roofline)


if __name__ == "__main__":
    cli.run(main)
