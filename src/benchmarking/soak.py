"""Millions of calls of mixed shapes, dtypes, layouts and entry points: tokens stay the oracle's and
memory stays flat.

A pool of inputs is called in rotation. Every 1,000 calls the outputs of a whole rotation are
compared with those that were held to the float64 oracle at the start, one of them is held to the
oracle again, and every 100th time the memory is noted: what PyTorch allocated, what the card
reports as used, and what the process has resident.

    python -m src.benchmarking.soak [--calls N] [--minutes M]

ends at whichever comes first and writes soak.json, .md and .png.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from src import from_logits, oracle, philox, samplers
from src.benchmarking import cli, environment, plots, results, timing
from src.contract import SamplerOutput, SamplerUnavailable
from src.cuda.fused_sampler import rejection_sample_flattened

CALLS, MINUTES = 10**7, 30
CHECK_EVERY = 1000
SAMPLES = 100  # of memory, in a run of the calls asked for
SMOKE_CALLS, SMOKE_CHECK_EVERY = 3000, 200
KINDS = ("padded", "seeded", "one-hot", "out", "flattened", "block", "logits", "sample")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, K, V), small ones more often: a call should cost the host more than the card.
SHAPES = [(1, 4, 1000), (3, 2, 32_000), (8, 4, 5003), (1, 8, 128_256), (2, 5, 50_257), (16, 3, 512)]
SMOKE_SHAPES = [(1, 4, 100), (3, 2, 700), (2, 3, 513)]
POOL = 64
# Since the first sample after the start: what may differ where nothing leaks.
MOST_GROWTH_MIB = {"allocated": 1.0, "card_used": 64.0, "resident": 64.0}


class Entry(NamedTuple):
    """One member of the pool: `call` takes nothing; `problems` says what is wrong with an output on
    the CPU against the oracle."""

    kind: str
    shape: tuple[int, int, int]
    dtype: str
    call: Callable[[], tuple]
    problems: Callable[[tuple], list[str]]


def make_pool(device: str, shapes: list[tuple], size: int, seed: int) -> list[Entry]:
    """Entries of every kind, over the shapes and dtypes in turn."""
    pool = []
    for i in range(size):
        rounds, kind = divmod(i, len(KINDS))
        shape = shapes[(rounds + kind) % len(shapes)]
        pool.append(make_entry(KINDS[kind], shape, device, size * seed + i))
    return pool


def make_entry(kind: str, shape: tuple[int, int, int], device: str, seed: int) -> Entry:
    name = "cuda" if device == "cuda" else "cpp"
    dtype = DTYPES[(seed // 3) % len(DTYPES)]
    make = {"logits": _from_logits, "sample": _sample}.get(kind, _from_probabilities)
    call, problems = make(kind, shape, dtype, name, device, torch.Generator().manual_seed(seed))
    return Entry(kind, shape, str(dtype).removeprefix("torch."), call, problems)


def _rows(shape, dtype, g):
    """Logits of both sides, [B, K+1, V] and [B, K, V], and drafts [B, K] drawn from the draft."""
    size, length, vocab = shape
    target = 4 * torch.randn(size, length + 1, vocab, generator=g)
    draft = target[:, :length] + torch.randn(size, length, vocab, generator=g)
    target, draft = target.to(dtype), draft.to(dtype)
    flat = draft.float().softmax(-1).reshape(-1, vocab)
    return target, draft, torch.multinomial(flat, 1, generator=g).reshape(size, length)


def _from_probabilities(kind, shape, dtype, name, device, g):
    size, length, _ = shape
    target, draft, ids = _rows(shape, dtype, g)
    p, q = (x.float().softmax(-1).to(dtype) for x in (target, draft))
    lengths = torch.randint(0, length + 1, (size,), generator=g).int()
    u = torch.rand(size, length + 1, generator=g)
    case = {"draft_token_ids": ids, "draft_probs": q, "target_probs": p, "uniforms": u}
    if kind == "one-hot":
        case.update(draft_probs=None, draft_token_ids=ids.int())
    if kind in ("padded", "flattened"):
        case["num_draft_tokens"] = lengths
    if kind == "block":
        case["verification"] = "block"
    if kind == "seeded":
        seeds, offsets = torch.arange(size) * 2**33 - 5, torch.arange(size) * 7 + 2**35
        u = philox.uniforms(seeds.numpy(), offsets.numpy(), length + 1)
        case["uniforms"] = torch.from_numpy(u)
    wanted = oracle.rejection_sample(**case)
    # Block verification's tests compare quotients of float32 sums: a margin as of logits.
    epsilon = oracle.LOGITS_EPSILON if kind == "block" else None
    problems = _held_to(wanted, epsilon)
    sample = samplers.get(name).load(device)
    if kind == "flattened":
        return _flattened(case, lengths, name, device), problems
    if kind == "seeded":
        del case["uniforms"]
        case.update(seeds=seeds, offsets=offsets)
    there = _on(case, device)
    if kind == "padded":  # positions before requests, and rows with a gap after each
        there["target_probs"] = _spaced(there["target_probs"])
    if kind == "out":
        out = SamplerOutput(
            torch.empty(size, length + 1, dtype=torch.int64, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
        )
        there["out"] = out
    return lambda: sample(**there), problems


def _flattened(case, lengths, name, device):
    samplers.get(name).load(device)
    ids, q, p = case["draft_token_ids"], case["draft_probs"], case["target_probs"]
    length = ids.shape[1]
    kept = torch.arange(length) < lengths[:, None]
    there = _on(
        {
            "draft_token_ids": ids[kept],
            "cu_num_draft_tokens": lengths.cumsum(0).int(),
            "draft_probs": q[kept],
            "target_probs": p[:, :length][kept],
            "bonus_probs": p[torch.arange(len(ids)), lengths.long()],
            "uniforms": case["uniforms"],
        },
        device,
    )
    return lambda: rejection_sample_flattened(**there, max_spec_length=length)


def _parameters(size, g):
    return {
        "temperature": 0.5 + torch.rand(size, generator=g),
        "top_k": torch.randint(0, 100, (size,), generator=g).int(),
    }


def _from_logits(kind, shape, dtype, name, device, g):
    size, length, _ = shape
    target, draft, ids = _rows(shape, dtype, g)
    u = torch.rand(size, length + 1, generator=g)
    case = {"draft_token_ids": ids, "target_logits": target, "draft_logits": draft, "uniforms": u}
    case |= _parameters(size, g)
    wanted = oracle.rejection_sample_from_logits(**case)
    sample = from_logits.get(name).load(device).rejection_sample_from_logits
    there = _on(case, device)
    return lambda: sample(**there), _held_to(wanted, oracle.LOGITS_EPSILON)


def _sample(kind, shape, dtype, name, device, g):
    size = shape[0]
    logits = _rows(shape, dtype, g)[0][:, 0]
    case = {"logits": logits, "uniforms": torch.rand(size, generator=g), **_parameters(size, g)}
    _, logsumexp = oracle.sample_from_logits(**case)
    # A draw is a verification without drafts, for which the oracle knows how near an edge it was.
    drawn = oracle.rejection_sample_from_logits(
        torch.empty(size, 0, dtype=torch.int64),
        logits[:, None],
        **{key: value for key, value in case.items() if key not in ("logits", "uniforms")},
        uniforms=case["uniforms"][:, None],
    )
    sample = from_logits.get(name).load(device).sample_from_logits
    there = _on(case, device)
    logsumexp = torch.from_numpy(logsumexp)

    def problems(output):
        none = torch.zeros(size, dtype=torch.int32)
        found = oracle.disagreements(output[0][:, None], none, drawn, oracle.LOGITS_EPSILON)
        if not torch.allclose(output[1], logsumexp, rtol=1e-5, atol=1e-5):
            found.append("the logsumexp differs from the oracle's")
        return found

    return lambda: sample(**there), problems


def _held_to(wanted, epsilon):
    return lambda output: oracle.disagreements(*output, wanted, epsilon)


def _on(case, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def _spaced(p):
    size, places, vocab = p.shape
    wide = p.new_full((places, size, vocab + 3), 1.0)
    wide[..., :vocab] = p.transpose(0, 1)
    return wide[..., :vocab].transpose(0, 1)


def memory(device: str) -> dict[str, float]:
    """MiB now; what cannot be asked for here is left out."""
    found = {}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["allocated"] = torch.cuda.memory_allocated() / 2**20
        found["reserved"] = torch.cuda.memory_reserved() / 2**20
        found["card_used"] = (total - free) / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["resident"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, AttributeError, ValueError, IndexError):
        pass
    return {f"{name}_mib": round(value, 3) for name, value in found.items()}


def soak(
    pool: list[Entry], device: str, *, calls: int, seconds: float, check_every: int, progress=None
) -> dict:
    """Figures of a row. Calls until `calls` or `seconds`; between checks nothing waits for the
    device. `wrong`: outputs that differed, `problems`: the first of them in words."""
    functions = [entry.call for entry in pool]
    problems, wanted = [], []
    for entry in pool:
        output = entry.call()
        problems += [
            f"{_name(entry)}: {line}" for line in entry.problems([t.cpu() for t in output])
        ]
        wanted.append(tuple(tensor.clone() for tensor in output))
    wrong, flat = len(problems), _flat(wanted)
    # Whole rotations between checks, so that each entry is called as often as any other.
    rotations = max(1, check_every // len(pool))
    a_check = rotations * len(pool)
    every = max(1, calls // a_check // SAMPLES)  # checks between two notes of memory
    timing.synchronise(device)
    samples, done, checks = [], 0, 0
    begin = time.perf_counter()
    while done < calls and time.perf_counter() - begin < seconds:
        for call in itertools.islice(itertools.cycle(functions), a_check - len(pool)):
            call()
        outputs = [call() for call in functions]
        done += a_check
        differing = sum((a != b).sum() for a, b in zip(_flat(outputs), flat, strict=True))
        again = checks % len(pool)
        found = pool[again].problems([tensor.cpu() for tensor in outputs[again]])
        problems += [f"call {done}, {_name(pool[again])}: {line}" for line in found]
        wrong += int(differing) + len(found)
        checks += 1
        del outputs, differing
        if checks % every == 0 or checks == 1:
            passed = round(time.perf_counter() - begin, 1)
            samples.append({"calls": done, "seconds": passed, **memory(device)})
        if progress:
            progress(a_check)
    passed = time.perf_counter() - begin
    samples.append({"calls": done, "seconds": round(passed, 1), **memory(device)})
    growth = growths(samples)
    rounds = done // len(pool)
    kinds = Counter(entry.kind for entry in pool)
    return {
        "calls": done,
        "checks": checks,
        "wrong": wrong,
        "problems": problems[:10],
        "seconds": round(passed, 1),
        "us_per_call": round(passed / done * 1e6, 2) if done else None,
        "kinds": {kind: count * rounds for kind, count in kinds.items()},
        "memory": samples,
        "growth_mib": growth,
        "flat": all(growth.get(name, 0.0) <= most for name, most in MOST_GROWTH_MIB.items()),
    }


def _flat(outputs: list[tuple]) -> list[torch.Tensor]:
    """All numbers of the outputs: integers, and the others."""
    tensors = [tensor.flatten() for output in outputs for tensor in output]
    parts = [t for t in tensors if not t.is_floating_point()]
    others = [t for t in tensors if t.is_floating_point()]
    return [torch.cat(group) for group in (parts, others) if group]


def growths(samples: list[dict]) -> dict[str, float]:
    """MiB by which the last samples' lowest figure exceeds the first ones' highest: a level that
    goes up and down is no growth. The first tenth of a long run is its start, and left out."""
    kept = samples[len(samples) // 10 :]
    some = max(1, len(kept) // 4)
    names = [name for name in kept[0] if name.endswith("_mib")] if kept else []
    return {
        name.removesuffix("_mib"): round(
            min(sample[name] for sample in kept[-some:])
            - max(sample[name] for sample in kept[:some]),
            3,
        )
        for name in names
    }


def _name(entry: Entry) -> str:
    return f"{entry.kind} {list(entry.shape)} {entry.dtype}"


def main(argv: list[str] | None = None) -> int:
    parser = cli.options(__doc__, runs=1, dials=False, choice=False)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds on a CPU, for CI")
    parser.add_argument("--calls", type=cli.positive, default=CALLS)
    parser.add_argument("--minutes", type=cli.positive, default=MINUTES)
    args = cli.parse(parser, "soak", argv, program="-m src.benchmarking.soak")
    shapes, every = (SMOKE_SHAPES, SMOKE_CHECK_EVERY) if args.smoke else (SHAPES, CHECK_EVERY)
    calls = min(args.calls, SMOKE_CALLS) if args.smoke else args.calls
    env = environment.collect(args.device, args.command)
    cli.say(args, environment.machine_line(env))
    name = "cuda" if args.device == "cuda" else "cpp"
    row = empty_row(name)
    try:
        pool = make_pool(args.device, shapes, POOL, args.seed)
        with tqdm(total=calls, unit="call", leave=False, disable=None) as bar:
            options = {"calls": calls, "seconds": 60.0 * args.minutes, "check_every": every}
            row |= soak(pool, args.device, **options, progress=bar.update)
        judge(row)
    except SamplerUnavailable as error:
        row.update(status="skipped", reason=error.reason, command=error.command)
    result = results.make(args.script, env, [row])
    return cli.finish_untimed(args, result, plots.soak)


def empty_row(name: str) -> dict:
    figures = ("calls", "checks", "wrong", "problems", "seconds", "us_per_call", "kinds", "memory")
    return {
        "sampler": name,
        "label": samplers.get(name).label,
        "status": "ok",
        "reason": None,
        "command": None,
        "warning": None,
        **dict.fromkeys((*figures, "growth_mib", "flat")),
    }


def judge(row: dict) -> None:
    if row["wrong"]:
        first = row["problems"][0] if row["problems"] else "an output changed"
        row.update(status="failed", reason=f"{row['wrong']} wrong outputs; the first: {first}")
    elif not row["flat"]:
        row.update(status="failed", reason=f"memory grew: {row['growth_mib']} MiB")


if __name__ == "__main__":
    cli.run(main)
