"""Speculative decoding from scratch, on two toy language models: what is drafted, what is accepted,
and that nothing of it shows in the text.

    python -m examples.from_scratch

A model here is a table: row t is the distribution of the token after t. docs/learn.md goes through
it line by line.
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate


def toy_models(vocab_size: int, noise: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(target, draft), both [V, V] with rows that sum to 1. More noise: a draft that knows less."""
    logits = 2 * torch.randn(vocab_size, vocab_size, generator=generator)
    unlike = torch.randn(vocab_size, vocab_size, generator=generator)
    return logits.softmax(-1), (logits + noise * unlike).softmax(-1)


def draw(weights: torch.Tensor, generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def plain_round(token: int, target, draft, spec_length: int, generator) -> list[int]:
    """One forward of the target, one token."""
    return [draw(target[token], generator)]


def speculative_round(
    token: int, target, draft, spec_length: int, generator, residual: bool = True
) -> list[int]:
    """One forward of the target, 1 to K + 1 tokens: Leviathan et al. 2023, algorithm 1."""
    drafts = []
    for _ in range(spec_length):  # K small forwards, one after the other
        drafts.append(draw(draft[drafts[-1] if drafts else token], generator))
    before = [token, *drafts]
    p, q = target[before], draft[before]  # the target's K + 1 rows at once: its one forward
    for k, x in enumerate(drafts):
        u = torch.rand((), generator=generator)
        if u * q[k, x] < p[k, x]:  # accepted with probability min(1, p / q)
            continue
        # Rejected: what p has more than q, which is what accepting drafts of q has not given yet.
        weights = (p[k] - q[k]).clamp(min=0) if residual else p[k]
        return [*drafts[:k], draw(weights, generator)]
    return [*drafts, draw(p[spec_length], generator)]  # all accepted: a bonus token


def wrong_round(*arguments) -> list[int]:
    """The mistake that is made most: after a rejection the token is drawn from p."""
    return speculative_round(*arguments, residual=False)


METHODS = {
    "plain decoding": plain_round,
    "speculative decoding": speculative_round,
    "the same, recovering from p": wrong_round,
}


def measure(one_round, target, draft, spec_length: int, num_tokens: int, generator):
    """(tokens a forward of the target, how far the text is from the target: the total variation
    distance of its pairs of neighbours)."""
    text, rounds = [0], 0
    while len(text) < num_tokens:
        text += one_round(text[-1], target, draft, spec_length, generator)
        rounds += 1
    first, second = torch.tensor(text[:-1]), torch.tensor(text[1:])
    pairs = torch.zeros_like(target).index_put_((first, second), torch.ones(()), accumulate=True)
    expected = target * pairs.sum(1, keepdim=True)
    return (len(text) - 1) / rounds, float((pairs - expected).abs().sum() / 2 / pairs.sum())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec-length", type=int, default=4, metavar="K", help="drafts a round")
    parser.add_argument("--noise", type=float, default=0.5, help="how unlike the draft is")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text, for each method")
    parser.add_argument("--vocab-size", type=int, default=12, metavar="V")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    target, draft = toy_models(args.vocab_size, args.noise, generator)
    rows = []
    for name, one_round in METHODS.items():
        tokens, distance = measure(
            one_round, target, draft, args.spec_length, args.tokens, generator
        )
        rows.append([name, f"{tokens:.2f}", f"{distance:.4f}"])
    print(
        tabulate(
            rows,
            ["Method", "Tokens a forward", "Distance from the target"],
            "github",
            disable_numparse=True,
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
