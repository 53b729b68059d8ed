"""The ways to decode that are compared, timed in turns over the same prompts."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from src import from_logits, samplers
from src.contract import SamplerOutput
from src.decoding import spec_length as lengths
from src.decoding.cache import CachedModel
from src.decoding.drafts import forced_acceptance
from src.decoding.from_logits import FromLogits
from src.decoding.generate import draft_maker
from src.decoding.lossless import first_divergence
from src.decoding.models import PROMPT_LOOKUP, Pair, logits_processor
from src.decoding.prompts import Prompt
from src.decoding.speculative import MODES, Decoder, Distribution, Generation, Stats

# The last that can be had also decodes plainly.
SAMPLERS = {
    "cpu": ("baseline", "vectorized", "cpp"),
    "cuda": ("baseline", "vectorized", "cuda", "cuda-from-logits"),
}
_FROM_LOGITS = {"cuda-from-logits": "cuda"}  # names of src/from_logits.py
_LABELS = {
    "baseline": "Spec Decode + Baseline (Python loop)",
    "vectorized": "Spec Decode + PyTorch Vectorized",
    "cpp": "Spec Decode + C++ Fused Kernel (CPU)",
    "cuda": "Spec Decode + CUDA Fused Kernel",
    "cuda-from-logits": "Spec Decode + CUDA Kernel from Logits",
}
PLAIN = "plain"
PEER_PLAIN = "transformers"
PEER_ASSISTED = "transformers-assisted"
_READS_ON_HOST = ("baseline",)
_CALIBRATION_LENGTHS = (1, 8)
_CALIBRATION_BATCHES = 5


class Method(NamedTuple):
    """spec_length: draft tokens a round, or "auto"."""

    name: str
    label: str
    mode: str
    spec_length: int | str = 0

    @property
    def speculative(self) -> bool:
        return self.name not in (PLAIN, PEER_PLAIN, PEER_ASSISTED)

    @property
    def peer(self) -> bool:
        return self.name in (PEER_PLAIN, PEER_ASSISTED)


@dataclass
class Settings:
    """What a comparison runs. spec_lengths: draft tokens a round, or "auto"; with several of them
    only the fastest sampler runs. temperature 0 is greedy; acceptance: forced, for a synthetic
    pair."""

    spec_lengths: Sequence[int | str] = (8,)
    max_new_tokens: int = 30
    runs: int = 3
    batch_size: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    verification: str = "token"
    acceptance: float = 0.8
    modes: Sequence[str] = MODES
    compiled: bool = False
    seed: int = 0
    on_progress: object = field(default=lambda text: None)


def methods(
    device: str, modes: Sequence[str] = MODES, spec_lengths: Sequence[int | str] = (8,)
) -> list[Method]:
    """Every method, in table order: each mode's plain decoding, its samplers, then the peers; of
    several spec lengths the fastest sampler's at each."""
    found = []
    for mode in modes:
        found.append(Method(PLAIN, "No Spec Decode (Standard Autoregressive)", mode))
        if len(spec_lengths) > 1:
            name = SAMPLERS[device][-1]
            label = _LABELS[name]
            found += [Method(name, f"{label}, K {k}", mode, k) for k in spec_lengths]
            continue
        [length] = spec_lengths
        found += [Method(name, _LABELS[name], mode, length) for name in SAMPLERS[device]]
        if mode == "eager":
            found.append(Method(PEER_PLAIN, "transformers generate", mode))
            found.append(Method(PEER_ASSISTED, "transformers assisted generation", mode, length))
    return found


class Skipped(Exception):
    """A method that cannot run here; `command` is what mends it, or None."""

    def __init__(self, reason: str, command: str | None = None):
        super().__init__(reason)
        self.command = command


class Comparison:
    """Times every method on a pair over prompts.

    pair: of models.load. Raises ValueError for a prompt set that is empty.
    """

    def __init__(self, pair: Pair, prompts: Sequence[Prompt], settings: Settings):
        if not prompts:
            raise ValueError("no prompts came; wanted at least one")
        for mode in settings.modes:
            if mode not in MODES:
                raise ValueError(f"mode {mode!r} is not known; wanted {' or '.join(MODES)}")
        self.pair = pair
        self.settings = settings
        self.device = pair.target.device
        self.batches = _batches(prompts, settings.batch_size)
        self._category = {batch: category for category, batch in self.batches}  # "mixed" is one
        self._ids = {prompt: pair.encode(prompt.text) for prompt in prompts}
        self._order = {prompt: i for i, prompt in enumerate(self._ids)}
        longest = max(len(ids) for ids in self._ids.values())
        self._max_length = longest + settings.max_new_tokens
        greedy = settings.temperature == 0
        processor = logits_processor(settings.temperature, settings.top_k, settings.top_p)
        self.distribution = Distribution(processor, greedy=greedy)
        self._fastest = _last_available(self.device.type)
        self._fastest_of_probs = _last_available(self.device.type, without=_FROM_LOGITS)
        self._longest_draft = max(
            lengths.LONGEST if length == "auto" else int(length) for length in settings.spec_lengths
        )
        self.methods = methods(self.device.type, settings.modes, settings.spec_lengths)
        self._caches = {}
        self._decoders = {}
        self._lengths = {}

    def run(self) -> list[dict]:
        """Rows of result schema 1, one for each method and category, then one over all."""
        ready, rows = [], []
        for method in self.methods:
            self.settings.on_progress(f"preparing {method.mode} {method.name}")
            try:
                for _, batch in self.batches:
                    self.generate(method, batch)  # builds, captures and warms up
                ready.append(method)
            except Skipped as skip:
                rows.append(self._skipped(method, str(skip), skip.command))
        timed = {method: {batch: [] for _, batch in self.batches} for method in ready}
        for run in range(self.settings.runs):
            for index, (_, batch) in enumerate(self.batches, 1):
                of = f"run {run + 1}/{self.settings.runs}, prompts {index}/{len(self.batches)}"
                for method in ready:
                    self.settings.on_progress(f"{of}: {method.mode} {method.name}")
                    timed[method][batch].append(self.generate(method, batch, run))
        for method in ready:
            rows += self._rows(method, timed[method])
        rank = {(method.label, method.mode): i for i, method in enumerate(self.methods)}
        rows.sort(key=lambda row: rank[row["label"], row["mode"]])
        _speedups(rows)
        return rows

    def spec_length(self, method: Method, category: str) -> int:
        """Draft tokens a round for the method and a category, measured for "auto"."""
        if method.spec_length != "auto":
            return int(method.spec_length)
        key = method.mode, category
        if key not in self._lengths:
            self._lengths[key] = self._calibrate(method, category)
        return self._lengths[key]

    def generate(
        self, method: Method, batch: tuple[Prompt, ...], run: int = 0, check: bool = False
    ) -> Generation:
        """One generation. check: not for timing: with phases, in graphed mode too, and with greedy
        tokens checked. Raises Skipped where the method cannot run here."""
        ids = [self._ids[prompt] for prompt in batch]
        if method.peer:
            return self._by_transformers(method, ids, self._category[batch])
        length = self.spec_length(method, self._category[batch])
        decoder = self.decoder(method, length, check=check and self.distribution.greedy)
        # A seed for each prompt and run, whatever the batch.
        first = self.settings.seed + run * len(self._ids)
        seeds = [first + self._order[prompt] for prompt in batch]
        return decoder.generate(
            ids,
            self.settings.max_new_tokens,
            seeds=seeds,
            profile=check or method.mode == "eager",
        )

    def decoder(self, method: Method, length: int, check: bool = False) -> Decoder:
        """The method's decoder, kept with its graphs. Raises Skipped where it cannot be built."""
        # With nothing drafted there is nothing to verify: speculative methods are then plain.
        name = method.name if length else PLAIN
        key = name, method.mode, length, check
        if key not in self._decoders:
            try:
                self._decoders[key] = self._build(name, method.mode, length, check)
            except samplers.SamplerUnavailable as error:
                raise Skipped(error.reason, error.command) from error
            except ValueError as error:
                if method.mode == "graphed" and self.device.type != "cuda":
                    raise Skipped(str(error)) from error
                raise
        return self._decoders[key]

    def _build(self, name: str, mode: str, length: int, check: bool) -> Decoder:
        sampler = self._fastest if name == PLAIN else name
        sample, distribution = self._sampling(sampler)
        draft = None
        if length:
            model = self.pair.draft
            cached = model if model == PROMPT_LOOKUP else self._cache(model, mode)
            # Draft tokens are drawn by the fastest sampler of the kind, whichever verifies.
            draw = sample if sampler in _FROM_LOGITS else self._sampling(self._fastest_of_probs)[0]
            draft = draft_maker(cached, draw)
        if length and self.pair.synthetic:
            sample = forced_acceptance(sample, self.settings.acceptance, self.device)
        return Decoder(
            self._cache(self.pair.target, mode),
            draft,
            sample,
            spec_length=length,
            max_length=self._max_length,
            batch_size=self.settings.batch_size,
            distribution=distribution,
            eos_token_ids=self.pair.eos_token_ids,
            mode=mode,
            capturable=sampler not in _READS_ON_HOST,
            check=check and not self.pair.synthetic,
        )

    def _sampling(self, name: str) -> tuple[Callable[..., SamplerOutput], Distribution]:
        """The sampler of that name, and what it takes of the logits. Raises SamplerUnavailable,
        and Skipped where it does not verify as asked."""
        settings, sample = self.settings, _load(name, self.device.type)
        if name in _FROM_LOGITS:
            logits = FromLogits(
                sample,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                verification=settings.verification,
            )
            return logits.sample, logits
        if settings.verification != "token":
            if "verification" not in inspect.signature(sample).parameters:
                raise Skipped(f"it has no {settings.verification} verification")
            sample = partial(sample, verification=settings.verification)
        return sample, self.distribution

    def _cache(self, model, mode: str) -> CachedModel:
        """One cache a model and mode for all decoders: they take turns, and compiled code is kept.

        Eager rounds run transformers' own forward, which is what eager code pays for.
        """
        key = model, mode
        if key not in self._caches:
            self._caches[key] = CachedModel(
                model,
                self.settings.batch_size,
                self._max_length + self._longest_draft,
                fused=mode == "graphed",
                compiled=self.settings.compiled,
            )
        return self._caches[key]

    def _calibrate(self, method: Method, category: str) -> int:
        """K from acceptance and times measured on the category's first prompts, with the sampler
        that draws. The same K then serves every sampler of the mode."""
        fast = method._replace(name=self._fastest)
        batches = [batch for name, batch in self.batches if name == category]
        batches = batches[:_CALIBRATION_BATCHES]
        few, many = _CALIBRATION_LENGTHS
        plain, short, long = (self._measure(fast, k, batches, profile=True) for k in (0, few, many))
        # A round's time is a line through those of two lengths. It does not pass through a plain
        # step's: a forward of two tokens may cost much more than one of one, and of three no more.
        step, one, several = (_seconds_a_round(made) for made in (plain, short, long))
        draft = max(0.0, several - one) / (many - few)
        cost = lengths.Cost(draft / step, (one - few * draft) / step, 0.0)
        stats = _summed(made.stats for made in long)
        if self.pair.synthetic or not self.distribution.greedy:
            # A trial would say more of its own luck than of the next text.
            best = lengths.candidates(stats.accepted, stats.rounds, cost, count=1, least=1.02)
            return best[0] if best else 0
        tried = lengths.candidates(stats.accepted, stats.rounds, cost)
        # Their expected speedups differ by less than what a greedy text's own acceptance does.
        made = {k: self._measure(fast, k, batches) for k in (0, *tried)}
        return lengths.choose({k: _seconds_a_token(results) for k, results in made.items()})

    def _measure(
        self, method: Method, length: int, batches, profile: bool = False
    ) -> list[Generation]:
        """A generation of each batch at that length."""
        decoder, new = self.decoder(method, length), self.settings.max_new_tokens

        def generate(batch):
            ids = [self._ids[prompt] for prompt in batch]
            return decoder.generate(
                ids, new, seeds=[self.settings.seed] * len(ids), profile=profile
            )

        generate(batches[0])  # to warm up
        return [generate(batch) for batch in batches]

    def _by_transformers(self, method: Method, ids: list[list[int]], category: str) -> Generation:
        options = self._peer_options(method, category)
        if len(ids) > 1:
            raise Skipped("measured with one prompt at a time (--batch-size 1)")
        prompt = torch.tensor(ids, device=self.device)
        _synchronize(self.device)
        begin = time.perf_counter()
        output = self.pair.target.generate(
            prompt, attention_mask=torch.ones_like(prompt), **options
        )
        _synchronize(self.device)
        seconds = time.perf_counter() - begin
        row = output[0, prompt.shape[1] :].tolist()
        return Generation([row], seconds, 0.0, Stats(tokens=len(row)))

    def _peer_options(self, method: Method, category: str) -> dict:
        settings = self.settings
        eos = self.pair.eos_token_ids
        options = {
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": eos or None,
            "pad_token_id": eos[0] if eos else 0,
            "do_sample": settings.temperature > 0,
        }
        if settings.temperature > 0:
            options |= {"temperature": settings.temperature, "top_k": settings.top_k}
            options["top_p"] = settings.top_p
        if method.name == PEER_PLAIN:
            return options
        if self.pair.synthetic:
            raise Skipped("its acceptance cannot be forced")
        length = self.spec_length(method, category)
        if not length:
            return options
        if self.pair.draft == PROMPT_LOOKUP:
            return options | {"prompt_lookup_num_tokens": length}
        config = self.pair.draft.generation_config
        config.num_assistant_tokens = length
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        return options | {"assistant_model": self.pair.draft}

    def _rows(self, method: Method, timed: dict) -> list[dict]:
        rows = []
        checked = {}
        if not method.peer and (self.distribution.greedy or method.mode == "graphed"):
            for _, batch in self.batches:
                self.settings.on_progress(f"checking {method.mode} {method.name}")
                checked[batch] = self.generate(method, batch, check=True)
        categories = list(dict.fromkeys(category for category, _ in self.batches))
        for category in [*categories, "all"] if len(categories) > 1 else categories:
            chosen = [batch for name, batch in self.batches if category in (name, "all")]
            rows.append(self._row(method, category, chosen, timed, checked))
        return rows

    def _row(self, method: Method, category: str, batches, timed, checked) -> dict:
        runs = [g for batch in batches for g in timed[batch]]
        seconds = sum(g.seconds for g in runs)
        tokens = sum(g.stats.tokens for g in runs)
        row = self._identity(method, category)
        row |= {
            "status": "ok",
            "seconds": seconds / len(runs),
            "seconds_by_run": [
                sum(timed[batch][i].seconds for batch in batches) / len(batches)
                for i in range(self.settings.runs)
            ],
            "tokens": tokens / len(runs),
            "tokens_per_s": tokens / seconds,
        }
        if method.peer:
            return row
        lengths_used = {self.spec_length(method, self._category[batch]) for batch in batches}
        row["spec_length"] = lengths_used.pop() if len(lengths_used) == 1 else "auto"
        row["prefill_s"] = sum(g.prefill_seconds for g in runs) / len(runs)
        total = _summed(g.stats for g in runs)
        row["rounds"] = total.rounds / len(runs)
        row["steps"] = total.steps / len(runs)
        if method.speculative and row["spec_length"] != 0:
            row["acceptance_rate"] = total.acceptance
            row["mean_accepted_length"] = total.mean_accepted_length
            row["acceptance_by_position"] = total.acceptance_by_position
        # Marks between phases cost an eager round nothing; a graphed one is split for them.
        check = [checked[batch] for batch in batches if batch in checked]
        profile = check if method.mode == "graphed" else runs
        for phase in ("draft", "verify", "sample"):
            row[f"{phase}_s"] = sum(g.stats.seconds[phase] for g in profile) / len(profile)
        row["profiled_steps"] = sum(g.stats.steps for g in profile) / len(profile)
        wrong = sum(g.stats.not_argmax for g in check)
        if wrong:
            row |= {"status": "failed", "reason": f"{wrong} greedy tokens are not the argmax"}
        return row

    def _identity(self, method: Method, category: str) -> dict:
        settings = self.settings
        return {
            "method": method.name,
            "label": method.label,
            "mode": method.mode,
            "prompt_category": category,
            "status": None,
            "reason": None,
            "command": None,
            "batch_size": settings.batch_size,
            "spec_length": method.spec_length,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "verification": settings.verification,
            "pair": self.pair.name,
            "synthetic": self.pair.synthetic,
            "forced_acceptance": settings.acceptance if self.pair.synthetic else None,
            "compiled": settings.compiled and not method.peer,
            "seconds": None,
            "tokens": None,
            "tokens_per_s": None,
            "rounds": None,
            "mean_accepted_length": None,
            "acceptance_rate": None,
            "acceptance_by_position": None,
            "draft_s": None,
            "verify_s": None,
            "sample_s": None,
            "speedup": None,
            "speedup_vs": None,
            "model_share": None,
            "expected_speedup": None,
        }

    def _skipped(self, method: Method, reason: str, command: str | None) -> dict:
        row = self._identity(method, "all")
        return row | {"status": "skipped", "reason": reason, "command": command}

    def stream(self, write) -> None:
        """Decodes the first prompt by plain and by speculative decoding, calling write(text) for
        each as the tokens come, and saying what was accepted."""
        _, batch = self.batches[0]
        ids = [self._ids[batch[0]]]
        for name in (PLAIN, self._fastest):
            length = 0 if name == PLAIN else self.settings.spec_lengths[0]
            label = _LABELS.get(name, "plain decoding")
            method = Method(name, label, self.settings.modes[0], length)
            decoder = self.decoder(method, self.spec_length(method, self._category[batch]))
            seen: list[int] = []

            def show(row: int, tokens: list[int], seen=seen) -> None:
                before = self.pair.decode(seen) if seen else ""
                seen += tokens
                write(self.pair.decode(seen)[len(before) :], end="", flush=True)

            write(f"\n{method.label}:")
            result = decoder.generate(
                ids, self.settings.max_new_tokens, seeds=[self.settings.seed], on_tokens=show
            )
            per_round = result.stats.tokens / result.stats.steps
            write(f"\n({result.stats.tokens} tokens, {per_round:.2f} a round)")

    def check_lossless(self) -> list[dict]:
        """Each speculative method against its mode's plain decoding, over the first batch of every
        category: emitted tokens that are not the argmax of the logits that verified them (must be
        0), rows equal to plain decoding, and where the first unequal one parts, with its margin.

        Raises ValueError at a temperature above 0, and for a synthetic pair.
        """
        if not self.distribution.greedy or self.pair.synthetic:
            raise ValueError("--check-lossless wants --temperature 0 and real weights")
        report = []
        firsts = {category: batch for category, batch in reversed(self.batches)}.values()
        for method in self.methods:
            if not method.speculative:
                continue
            plain = Method(PLAIN, "", method.mode)
            entry = {"method": method.name, "label": method.label, "mode": method.mode}
            entry |= {"rows": 0, "equal": 0, "tokens": 0, "not_argmax": 0, "divergences": []}
            try:
                for batch in firsts:
                    got = self.generate(method, batch, check=True)
                    wanted = self.generate(plain, batch).token_ids
                    entry["tokens"] += got.stats.tokens
                    entry["not_argmax"] += got.stats.not_argmax
                    for prompt, row, other in zip(batch, got.token_ids, wanted, strict=True):
                        entry["rows"] += 1
                        entry["equal"] += row == other
                        parted = first_divergence(self.pair.target, self._ids[prompt], row, other)
                        if parted:
                            entry["divergences"].append(parted._asdict())
            except Skipped as skip:
                entry["skipped"] = str(skip)
            report.append(entry)
        return report


def _batches(prompts: Sequence[Prompt], size: int) -> list[tuple[str, tuple[Prompt, ...]]]:
    """(category, prompts) of at most `size` prompts of one category each; where a category does
    not fill a batch, batches are "mixed" instead, in turns from all categories."""
    by_category = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    if size > min(map(len, by_category.values())):
        turns = itertools.zip_longest(*by_category.values())
        by_category = {"mixed": [prompt for turn in turns for prompt in turn if prompt]}
    return [
        (category, tuple(members[i : i + size]))
        for category, members in by_category.items()
        for i in range(0, len(members), size)
    ]


def _load(name: str, device: str):
    """The sampler of a method's name: of probabilities, or the module of one from logits. Raises
    SamplerUnavailable."""
    if name in _FROM_LOGITS:
        return from_logits.get(_FROM_LOGITS[name]).load(device)
    return samplers.get(name).load(device)


def _last_available(device: str, without: Container[str] = ()) -> str:
    for name in reversed(SAMPLERS[device]):
        if name in without:
            continue
        try:
            _load(name, device)
        except samplers.SamplerUnavailable:
            continue
        return name
    raise AssertionError("vectorized runs everywhere")


def _seconds_a_round(made: Sequence[Generation]) -> float:
    seconds = sum(sum(one.stats.seconds.values()) for one in made)
    return seconds / sum(one.stats.steps for one in made)


def _seconds_a_token(made: Sequence[Generation]) -> float:
    return sum(one.seconds for one in made) / sum(one.stats.tokens for one in made)


def _summed(stats: Iterable[Stats]) -> Stats:
    """Counts added up, for generations whose spec lengths may differ."""
    total = Stats()
    for one in stats:
        total.rounds += one.rounds
        total.steps += one.steps
        total.tokens += one.tokens
        for name in ("drafted", "examined", "accepted"):
            mine, theirs = getattr(total, name), getattr(one, name)
            mine += [0] * (len(theirs) - len(mine))
            for i, count in enumerate(theirs):
                mine[i] += count
    return total


def _speedups(rows: list[dict]) -> None:
    """Fills in each row's speedup over its mode's plain decoding, and what it should be.

    expected_speedup: S(K) = E(K) / (K c + v), E(K) the tokens a round, K c and v the draft's and
    the verify forward's time in plain decoding's steps: a loop and a sampler that cost nothing.
    model_share: the part of the time after prefill that the models' forwards take.
    """
    plain = {
        (row["mode"], row["prompt_category"]): row
        for row in rows
        if row["method"] == PLAIN and row["status"] == "ok"
    }
    for row in rows:
        reference = plain.get((row["mode"], row["prompt_category"]))
        if row["status"] != "ok" or not reference:
            continue
        # By tokens a second: rows that end at an EOS need not emit as many as plain decoding.
        row["speedup"] = row["tokens_per_s"] / reference["tokens_per_s"]
        row["speedup_vs"] = f"{reference['method']} {row['mode']}"
        if row["verify_s"] is None:
            continue
        forwards = (row["draft_s"] + row["verify_s"]) / row["profiled_steps"]
        row["model_share"] = forwards * row["steps"] / (row["seconds"] - row["prefill_s"])
        if row["mean_accepted_length"]:
            step = (reference["seconds"] - reference["prefill_s"]) / reference["steps"]
            row["expected_speedup"] = row["mean_accepted_length"] * step / forwards


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
