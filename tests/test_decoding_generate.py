"""model.generate(…, custom_generate=speculative_generate) against model.generate."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from src.decoding.generate import speculative_generate
from tests.tiny import llama, relative

IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 3, 9, 3, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def generate(**options):
    options = {"max_new_tokens": 16, "attention_mask": MASK, "pad_token_id": 0, **options}
    return llama(0).generate(IDS, **options)


@pytest.mark.parametrize("draft", ["model", "prompt-lookup"])
@pytest.mark.parametrize("eos", [None, 35])
def test_greedy_ids_are_those_of_generate(draft, eos):
    draft = relative(0) if draft == "model" else draft
    wanted = generate(do_sample=False, eos_token_id=eos)
    ids = generate(
        do_sample=False, eos_token_id=eos, custom_generate=speculative_generate, draft=draft
    )
    assert torch.equal(ids, wanted)


def test_sampling_obeys_the_seed_and_the_processors():
    def sampled(**options):
        options = {"do_sample": True, "draft": relative(0), "spec_length": 3, **options}
        return generate(custom_generate=speculative_generate, **options)

    torch.manual_seed(3)
    first = sampled(temperature=0.8, top_p=0.9)
    torch.manual_seed(3)
    assert torch.equal(sampled(temperature=0.8, top_p=0.9), first)
    assert not torch.equal(sampled(temperature=0.8, top_p=0.9), first)
    assert torch.equal(sampled(top_k=1, seeds=[1, 2]), generate(do_sample=False))


class _Never(StoppingCriteria):
    def __call__(self, *args, **kwargs):
        return False


@pytest.mark.parametrize(
    "options, message",
    [
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor is not supported"),
        ({"stopping_criteria": StoppingCriteriaList([_Never()])}, "_Never is not supported"),
        ({"num_beams": 2}, "num_beams is 2; speculative_generate wants 1"),
    ],
)
def test_what_would_not_be_exact_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(custom_generate=speculative_generate, draft=relative(0), **options)
