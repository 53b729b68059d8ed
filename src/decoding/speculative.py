"""The decoding loop: draft, verify, sample, for any sampler and any draft.

Plain decoding is the same loop with no draft tokens (spec_length 0), so both sides of a comparison
pay for the same bookkeeping. B = batch size, K = spec length, V = vocab size; the position of a
token is its index in its row's text, prompt included.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from src.contract import PLACEHOLDER_TOKEN_ID, SamplerOutput
from src.decoding import graphs
from src.decoding.cache import CachedModel
from src.decoding.state import State

PHASES = ("draft", "verify", "sample")
MODES = ("eager", "graphed")
_ARGMAX_PARTS = 256


class Distribution:
    """Probabilities float32 [B, Q, V] from logits of the same shape.

    processor: a transformers logits processor list whose members look at no earlier tokens: it is
        called with (None, scores [N, V] float32).
    greedy: all probability on the largest logit, with which every sampler of the contract decodes
        greedily.
    """

    def __init__(self, processor: Callable | None = None, *, greedy: bool = False):
        self.processor = processor
        self.greedy = greedy

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.greedy:
            probs = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
            return probs.scatter_(-1, self.best(logits)[..., None], 1.0)
        return torch.softmax(self._processed(logits).float(), -1)

    def best(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, Q] int64: the most probable tokens, the first of equals."""
        scores = self._processed(logits)
        # An argmax is one block's work a row; a large vocabulary is cut into parts for many.
        parts = math.gcd(scores.shape[-1], _ARGMAX_PARTS)
        if parts == 1:
            return scores.argmax(-1)
        largest, at = scores.unflatten(-1, (parts, -1)).max(-1)
        part = largest.argmax(-1, keepdim=True)
        return (at.gather(-1, part) + part * (scores.shape[-1] // parts)).squeeze(-1)

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        if self.processor is None:
            return logits
        return self.processor(None, logits.float().flatten(0, 1)).view(logits.shape)


@dataclass
class Stats:
    """Counts of one generation, over all rows while they were active.

    rounds: rounds times active rows. steps: rounds, whatever the number of rows. drafted,
    accepted: [K], draft tokens proposed and accepted at each position; examined: those whose
    predecessors were all accepted. These are the sampler's
    verdicts: tokens cut off behind an EOS or the limit are in `accepted`, not in `tokens`.
    not_argmax: emitted tokens that are not the argmax of the logits that verified them (greedy
    decoding with check=True only). seconds: of each phase, in a profiled generation only.
    """

    rounds: int = 0
    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    examined: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    not_argmax: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a round emits on average, the recovered or bonus token included."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Accepted over proposed, of each draft position."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def acceptance(self) -> float:
        """Accepted over examined draft tokens, the probability that a draft token is accepted."""
        return sum(self.accepted) / sum(self.examined) if any(self.examined) else 0.0


@dataclass
class Generation:
    """token_ids: the new tokens of each row, EOS included. seconds: wall clock of the whole call,
    prefill_seconds: of its prefill."""

    token_ids: list[list[int]]
    seconds: float
    prefill_seconds: float
    stats: Stats


class Decoder:
    """Decodes up to batch_size prompts at a time; buffers and graphs are kept between calls.

    target: a transformers causal LM in eval mode, or a CachedModel of one, which decoders that
        are not used at the same time may share.
    draft: maker of a draft, called with (batch_size, capacity); None for plain decoding.
    sample: a sampler of src/contract.py.
    spec_length: draft tokens a round; 0 with draft None.
    max_length: the most tokens a row may have, prompt included.
    eos_token_ids: tokens that end a row.
    mode: "eager", or "graphed": rounds captured in CUDA graphs (CUDA only).
    capturable: whether `sample` never reads a tensor on the host; where it does, graphed mode
        captures draft and verify and calls the sampler eagerly.
    compiled: run the target's forward under torch.compile (where it is no CachedModel yet).
    check: count emitted tokens that greedy decoding should not have emitted (stats.not_argmax).
    Raises ValueError for a bad argument and for models of different vocabularies.
    """

    def __init__(
        self,
        target,
        draft: Callable[[int, int], object] | None,
        sample: Callable[..., SamplerOutput],
        *,
        spec_length: int,
        max_length: int,
        batch_size: int = 1,
        distribution: Distribution | None = None,
        eos_token_ids: Sequence[int] = (),
        mode: str = "eager",
        capturable: bool = True,
        compiled: bool = False,
        check: bool = False,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(MODES)}")
        if spec_length < 0 or (spec_length > 0) != (draft is not None):
            raise ValueError(
                f"spec_length is {spec_length} and draft {'None' if draft is None else 'given'}; "
                "wanted a draft with spec_length >= 1, or neither"
            )
        self.device = target.device
        if mode == "graphed":
            graphs.require(self.device)
        self._capture = graphs.Capture() if mode == "graphed" else None
        self.mode = mode
        self.sample = sample
        self.spec_length = spec_length
        self.batch_size = batch_size
        self.max_length = max_length
        self.distribution = distribution or Distribution(greedy=True)
        capacity = max_length + spec_length
        if not isinstance(target, CachedModel):
            target = CachedModel(target, batch_size, capacity, compiled=compiled)
        if target.batch_size != batch_size or target.capacity < capacity:
            raise ValueError(
                f"the target's cache is for {target.batch_size} rows of {target.capacity} tokens; "
                f"wanted {batch_size} of at least {capacity}"
            )
        self.target = target
        self.draft = draft(batch_size, capacity) if draft is not None else None
        drafting = getattr(self.draft, "cached", None)
        if drafting is not None and drafting.vocab_size != self.target.vocab_size:
            raise ValueError(
                f"the draft's vocabulary has {drafting.vocab_size} tokens and the target's "
                f"{self.target.vocab_size}; wanted the same vocabulary"
            )
        self._state = State(batch_size, capacity, spec_length, eos_token_ids, self.device)
        self._not_argmax = torch.zeros((), dtype=torch.int64, device=self.device)
        self._capturable = capturable
        self._check_argmax = check
        # What is emitted in greedy decoding does not depend on the drafts, so that no round has to
        # draft beyond the last token. A sampled row is the same whatever its batch and its limit:
        # there every round draws the same numbers.
        lengths = range(spec_length + 1) if self.distribution.greedy else (spec_length,)
        self._rounds = {length: _Round(self, length) for length in lengths}

    def _clear(self) -> None:
        self._state.clear()
        self._not_argmax.zero_()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        seeds: Sequence[int] | None = None,
        profile: bool = False,
        on_tokens: Callable[[int, list[int]], object] | None = None,
    ) -> Generation:
        """Decodes every prompt until an EOS token or max_new_tokens.

        prompts: token ids, at least one a prompt; at most batch_size prompts.
        seeds: one a prompt; its tokens then do not depend on the other rows. Without them they
            come from torch's default generator.
        profile: time draft, verify and sample (stats.seconds). In graphed mode the round is then
            three graphs instead of one.
        on_tokens: called after each round with (row, its new tokens).
        Raises ValueError for a prompt that is empty or does not fit, and RuntimeError where the
        sampler emits nothing.
        """
        self._check(prompts, max_new_tokens, seeds)
        functions = {k: one.functions(profile) for k, one in self._rounds.items()}
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts),)).tolist()
        self._not_argmax.zero_()
        longest = self._state.fill(prompts, max_new_tokens, seeds)
        clock = _Clock(self.device)
        begin = clock.synchronized()
        clock.mark("prefill")
        # All but the newest token of the longest prompt: the first round takes the newest ones.
        before = self._state.tokens[:, : longest - 1]
        graphed = self.mode == "graphed"
        self.target.prefill(before, graphed=graphed)
        if self.draft is not None:
            self.draft.prefill(before, graphed=graphed)
        clock.mark("rounds")
        sent = [len(prompt) for prompt in prompts]
        # A second round may be in flight unread where the first cannot be the last but by EOS.
        depth = 2 if self.mode == "graphed" and on_tokens is None else 1
        longest_round = functions[self.spec_length]
        left, unread, steps = max_new_tokens, deque(), 0
        while left:
            if steps > max_new_tokens + depth:  # a round emits a token at least
                raise RuntimeError(f"{steps} rounds came to no end: the sampler emits no tokens")
            if len(unread) < depth and (not unread or left > self.spec_length + 1):
                # With a round unread the rest is not known, but is more than the one that is.
                length = self.spec_length if unread else min(self.spec_length, left - 1)
                chosen = functions.get(length, longest_round)
                for name, function in zip(PHASES, chosen, strict=False):
                    if profile:
                        clock.mark(name)
                    function()
                unread.append(_HostCopy(self._state.left))
                steps += 1
            else:
                left = unread.popleft().value()
                if on_tokens is not None:
                    self._report(on_tokens, sent)
        clock.mark("end")
        seconds = clock.synchronized() - begin
        return self._result(prompts, seconds, clock.seconds(), steps, profile)

    def _check(self, prompts, max_new_tokens, seeds) -> None:
        if not 1 <= len(prompts) <= self.batch_size:
            raise ValueError(f"{len(prompts)} prompts came; wanted 1 to {self.batch_size}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted at least 1")
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds came for {len(prompts)} prompts; wanted one each")
        for row, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.max_length - max_new_tokens:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens; wanted 1 to max_length - "
                    f"max_new_tokens = {self.max_length - max_new_tokens}"
                )

    def _report(self, on_tokens, sent: list[int]) -> None:
        for row, text in enumerate(self._state.rows(len(sent))):
            if len(text) > sent[row]:
                on_tokens(row, text[sent[row] :])
                sent[row] = len(text)

    def _result(self, prompts, seconds, marked, steps, profile) -> Generation:
        state = self._state
        rows = state.rows(len(prompts))
        new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        stats = Stats(
            rounds=int(state.rounds),
            steps=steps,
            tokens=sum(len(row) for row in new),
            drafted=state.drafted.tolist(),
            examined=state.examined.tolist(),
            accepted=state.accepted.tolist(),
            not_argmax=int(self._not_argmax),
            seconds={name: marked.get(name, 0.0) for name in PHASES} if profile else {},
        )
        return Generation(new, seconds, marked["prefill"], stats)


class _Round:
    """A round of a decoder with `length` draft tokens, at most its spec_length."""

    def __init__(self, decoder: Decoder, length: int):
        self._decoder = decoder
        self._length = length
        self._phases = self._whole = None  # captured

    def functions(self, profile: bool) -> list[Callable[[], object]]:
        """What to call: the phases where they are timed, else as few as possible."""
        decoder = self._decoder
        phases = [self._draft, self._verify, self._sample]
        if decoder.mode == "eager":
            return phases
        clear = decoder._clear
        if not decoder._capturable:
            if self._phases is None:
                self._phases = [*decoder._capture(phases[:2], clear), self._sample]
            return self._phases
        if profile:
            if self._phases is None:
                self._phases = decoder._capture(phases, clear)
            return self._phases
        if self._whole is None:
            self._whole = decoder._capture([lambda: [phase() for phase in phases]], clear)
        return self._whole

    def _draft(self) -> None:
        state, decoder = self._decoder._state, self._decoder
        self._draft_ids, self._draft_probs = state.newest[:, :0], None
        if self._length:
            self._draft_ids, self._draft_probs = decoder.draft.propose(
                state, self._length, decoder.distribution
            )

    def _verify(self) -> None:
        # A missing draft token (-1) is verified as token 0: the sampler never looks at it.
        state = self._decoder._state
        query = torch.cat([state.newest[:, 1:], self._draft_ids.clamp(min=0)], 1)
        self._logits = self._decoder.target.forward(query, state.start)

    def _sample(self) -> None:
        decoder, state = self._decoder, self._decoder._state
        output = decoder.sample(
            self._draft_ids,
            self._draft_probs,
            decoder.distribution(self._logits),
            seeds=state.seeds,
            offsets=state.offsets[-1],
        )
        start = state.start.clone() if decoder._check_argmax else None
        state.advance(*self._as_of_the_longest(output))
        if decoder._check_argmax:
            columns = state.columns[: self._length + 1]
            kept = columns < (state.start - start)[:, None]
            # Not by a sampler's kernel.
            best = Distribution.best(decoder.distribution, self._logits)
            decoder._not_argmax += (kept & (output.token_ids != best)).sum()

    def _as_of_the_longest(self, output: SamplerOutput):
        """(output, draft_token_ids) with as many columns as the longest round's."""
        missing = self._decoder.spec_length - self._length
        if not missing:
            return output, self._draft_ids
        token_ids, draft_ids = (
            torch.nn.functional.pad(ids, (0, missing), value=PLACEHOLDER_TOKEN_ID)
            for ids in (output.token_ids, self._draft_ids)
        )
        return output._replace(token_ids=token_ids), draft_ids


class _HostCopy:
    """A device scalar on its way to the host, without stopping what is queued behind it."""

    def __init__(self, scalar: torch.Tensor):
        self._copy, self._event = scalar, None
        if scalar.is_cuda:
            self._copy = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._copy.copy_(scalar, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._copy)


class _Clock:
    """Seconds between marks, by CUDA events where there is a device to time, without waiting."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks = []

    def synchronized(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, name: str) -> None:
        if self._cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self._marks.append((name, at))

    def seconds(self) -> dict[str, float]:
        """The time after each mark up to the next, summed by name. Call it when synchronized."""
        total = {}
        for (name, at), (_, following) in itertools.pairwise(self._marks):
            passed = at.elapsed_time(following) / 1e3 if self._cuda else following - at
            total[name] = total.get(name, 0.0) + passed
        return total
