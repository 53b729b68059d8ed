"""At temperature > 0 the tokens of many runs follow the target's own distribution, exactly known
for a tiny model; a planted fault does not pass."""

import copy
import functools

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from src import from_logits, samplers
from src.contract import SamplerOutput
from src.decoding.drafts import PromptLookupDraft
from src.decoding.from_logits import FromLogits
from src.decoding.lossless import chi_square, first_divergence
from src.decoding.speculative import Decoder, Distribution
from tests.tiny import drafting, llama, relative

VECTORIZED = samplers.get("vectorized").load()
VOCAB = 8
RUNS = 3000
PROMPT = [1, 5, 2, 1, 5, 2, 1]
DRAFTS = {
    "a relative": drafting(relative(0, 0.5, VOCAB), VECTORIZED),
    "a stranger": drafting(llama(3, VOCAB), VECTORIZED),
    "prompt lookup": lambda batch_size, capacity: PromptLookupDraft(),
}
DISTRIBUTIONS = {
    "temperature 1": Distribution(),
    "top-k and top-p": Distribution(
        LogitsProcessorList([TopKLogitsWarper(5), TopPLogitsWarper(0.8)])
    ),
}


@functools.cache
def exact(distribution: str) -> torch.Tensor:
    """[V * V]: the probability of each first and second token, by brute force."""
    second = torch.arange(VOCAB)[:, None]
    ids = torch.cat([torch.tensor([PROMPT]).expand(VOCAB, -1), second], 1)
    with torch.no_grad():
        probs = DISTRIBUTIONS[distribution](llama(0, VOCAB)(ids).logits[:, -2:]).double()
    return (probs[0, 0][:, None] * probs[:, 1]).flatten()


def pairs(draft, sample, distribution, spec_length=2):
    """First and second token of many runs, as one number each."""
    speculative = Decoder(
        llama(0, VOCAB),
        draft,
        sample,
        spec_length=spec_length,
        max_length=len(PROMPT) + 3,
        batch_size=RUNS,
        distribution=DISTRIBUTIONS.get(distribution, distribution),
    )
    rows = speculative.generate([PROMPT] * RUNS, 3, seeds=range(RUNS)).token_ids
    return [VOCAB * row[0] + row[1] for row in rows]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_tokens_follow_the_target(draft, distribution):
    tokens = pairs(DRAFTS[draft], VECTORIZED, distribution)
    assert chi_square(tokens, exact(distribution)) > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plain_sampled_tokens_follow_the_target(distribution):
    assert chi_square(pairs(None, VECTORIZED, distribution, 0), exact(distribution)) > 1e-3


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("draft", ["a relative", "prompt lookup", None])
def test_tokens_sampled_from_logits_follow_the_target(draft, verification):
    sampler = from_logits.get("vectorized").load()
    logits = FromLogits(sampler, temperature=1, top_k=5, top_p=0.8, verification=verification)
    maker = DRAFTS.get(draft)
    if draft == "a relative":
        maker = drafting(relative(0, 0.5, VOCAB), logits.sample)
    tokens = pairs(maker, logits.sample, logits, 2 if draft else 0)
    assert chi_square(tokens, exact("top-k and top-p")) > 1e-3


def accept_always(draft_token_ids, draft_probs, target_probs, **random):
    agreeing = torch.cat([draft_probs, target_probs[:, -1:]], 1)
    return VECTORIZED(draft_token_ids, draft_probs, agreeing, **random)


def same_uniforms_for_draft_and_acceptance(draft_token_ids, draft_probs, target_probs, **random):
    offsets = random["offsets"] - draft_token_ids.shape[1]
    return VECTORIZED(
        draft_token_ids, draft_probs, target_probs, seeds=random["seeds"], offsets=offsets
    )


def recover_from_target(draft_token_ids, draft_probs, target_probs, *, seeds, offsets):
    output = VECTORIZED(draft_token_ids, draft_probs, target_probs, seeds=seeds, offsets=offsets)
    rows = torch.arange(len(seeds))
    last = output.num_accepted.long()
    nothing = draft_token_ids[:, :0]
    p = target_probs[rows, last][:, None]
    drawn = VECTORIZED(nothing, None, p, seeds=seeds + 7, offsets=offsets).token_ids
    return SamplerOutput(output.token_ids.scatter(1, last[:, None], drawn), output.num_accepted)


@pytest.mark.parametrize(
    "fault", [accept_always, recover_from_target, same_uniforms_for_draft_and_acceptance]
)
def test_a_planted_fault_does_not_follow_the_target(fault):
    tokens = pairs(DRAFTS["a relative"], fault, "temperature 1")
    assert chi_square(tokens, exact("temperature 1")) < 1e-6


def test_verifying_against_another_q_than_was_drawn_from_does_not_follow_the_target():
    def sharper(draft_token_ids, draft_probs, target_probs, **random):
        q = draft_probs**2
        return VECTORIZED(draft_token_ids, q / q.sum(-1, keepdim=True), target_probs, **random)

    tokens = pairs(DRAFTS["a relative"], sharper, "temperature 1")
    assert chi_square(tokens, exact("temperature 1")) < 1e-6


def test_greedy_tokens_are_the_argmax_of_the_logits_that_verified_them():
    def decode(sample):
        draft = drafting(relative(0), VECTORIZED)
        decoder = Decoder(llama(0), draft, sample, spec_length=3, max_length=40, check=True)
        return decoder.generate([[5, 6, 7]], 24).stats.not_argmax

    def off_by_one(*args, **kwargs):
        output = VECTORIZED(*args, **kwargs)
        return output._replace(token_ids=(output.token_ids + 1) % 61)

    assert decode(VECTORIZED) == 0
    assert decode(off_by_one) == 24


def test_bfloat16_tokens_are_the_argmax_of_their_own_logits_too():
    target, draft = (copy.deepcopy(m).bfloat16() for m in (llama(0), relative(0)))
    decoder = Decoder(
        target,
        drafting(draft, VECTORIZED),
        VECTORIZED,
        spec_length=3,
        max_length=40,
        batch_size=2,
        check=True,
    )
    stats = decoder.generate([[5, 6, 7], [1, 2]], 24).stats
    assert stats.tokens == 48 and stats.not_argmax == 0


def test_a_divergence_is_reported_with_its_margin():
    model = llama(0)
    with torch.no_grad():
        first, second = model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(2).values.tolist()
    assert first_divergence(model, [5, 6], [7, 8, 9], [7, 8, 9, 10]) is None
    divergence = first_divergence(model, [5, 6], [7, 8], [7, 9])
    assert divergence.position == 1
    assert divergence.margin == pytest.approx(first - second, abs=1e-4)
