"""On a CUDA card: graphed rounds emit what eager rounds do."""

import copy

import pytest
import torch

from src import samplers
from src.decoding.drafts import PromptLookupDraft
from src.decoding.speculative import Decoder, Distribution
from tests.tiny import drafting, llama, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
PROMPTS = [[5, 6, 7, 8], [1], [9, 3, 9, 3, 9, 3, 2]]
SEEDS = [1, 2, 3]
NEW = 24


def on_card(model):
    return copy.deepcopy(model).cuda()


def make(draft, mode, sampler="vectorized", **options):
    draw = samplers.get("vectorized").load("cuda")
    drafts = {
        None: None,
        "model": lambda: drafting(on_card(relative(0)), draw),
        "lookup": lambda: lambda batch_size, capacity: PromptLookupDraft(),
    }
    return Decoder(
        on_card(llama(0)),
        drafts[draft]() if draft else None,
        samplers.get(sampler).load("cuda"),
        spec_length=4 if draft else 0,
        max_length=60,
        batch_size=3,
        mode=mode,
        capturable=sampler != "baseline",
        **options,
    )


@pytest.mark.parametrize("sampler", ["vectorized", "baseline"])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("draft", [None, "model", "lookup"])
def test_graphed_rounds_emit_what_eager_rounds_do(draft, greedy, sampler):
    options = {"sampler": sampler, "distribution": Distribution(greedy=greedy)}
    wanted = make(draft, "eager", **options).generate(PROMPTS, NEW, seeds=SEEDS)
    graphed = make(draft, "graphed", **options)
    for profile in (False, True, False):  # the two ways to capture do not disturb each other
        result = graphed.generate(PROMPTS, NEW, seeds=SEEDS, profile=profile)
        assert result.token_ids == wanted.token_ids
        assert result.stats.accepted == wanted.stats.accepted
    assert graphed.generate(PROMPTS[:1], NEW, seeds=SEEDS[:1]).token_ids == wanted.token_ids[:1]


def test_an_eos_ends_a_graphed_row_though_a_round_is_already_in_flight():
    free = make(None, "eager").generate(PROMPTS[:1], NEW).token_ids[0]
    result = make("model", "graphed", eos_token_ids=[free[9]]).generate(PROMPTS[:1], NEW)
    assert result.token_ids == [free[: free.index(free[9]) + 1]]


def test_replays_with_other_seeds_draw_other_tokens():
    graphed = make("model", "graphed", distribution=Distribution())
    first = graphed.generate(PROMPTS, NEW, seeds=[1, 2, 3]).token_ids
    assert graphed.generate(PROMPTS, NEW, seeds=[4, 5, 6]).token_ids != first
    assert graphed.generate(PROMPTS, NEW, seeds=[1, 2, 3]).token_ids == first
