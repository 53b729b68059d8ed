"""On a CUDA card: graphed rounds emit what eager rounds do."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from src import from_logits, samplers
from src.decoding.cache import CachedModel
from src.decoding.drafts import PromptLookupDraft
from src.decoding.from_logits import FromLogits
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


def make(draft, mode, sampler="vectorized", sample=None, **options):
    draw = sample or samplers.get("vectorized").load("cuda")
    drafts = {
        None: None,
        "model": lambda: drafting(on_card(relative(0)), draw),
        "lookup": lambda: lambda batch_size, capacity: PromptLookupDraft(),
    }
    return Decoder(
        on_card(llama(0)),
        drafts[draft]() if draft else None,
        sample or samplers.get(sampler).load("cuda"),
        spec_length=4 if draft else 0,
        max_length=60,
        batch_size=3,
        mode=mode,
        capturable=sampler != "baseline",
        **options,
    )


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("draft", [None, "model", "lookup"])
def test_rounds_from_logits_emit_what_the_vectorized_sampler_does(draft, temperature):
    def decode(name, mode):
        logits = FromLogits(from_logits.get(name).load("cuda"), temperature=temperature, top_k=20)
        made = make(draft, mode, sample=logits.sample, distribution=logits)
        return [made.generate(PROMPTS, NEW, seeds=seeds).token_ids for seeds in (SEEDS, [4, 5, 6])]

    wanted = decode("vectorized", "eager")
    assert decode("cuda", "eager") == decode("cuda", "graphed") == wanted
    assert (wanted[0] == wanted[1]) == (temperature == 0)


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


@functools.cache
def wide(kind: str):
    """A random model of a size that the kernels take, with normalizations of its own."""
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](
        vocab_size=1024,
        hidden_size=896,
        intermediate_size=1216,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn_like(parameter) / 4 + (0 if "bias" in name else 1))
    return model


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_few_token_layers_are_as_near_to_float32_as_pytorchs_own(kind, batch_size):
    capacity = 160
    exact = CachedModel(on_card(wide(kind)), batch_size, capacity)
    plain, kernels = (
        CachedModel(on_card(wide(kind)).bfloat16(), batch_size, capacity) for _ in range(2)
    )
    assert exact.engine.few is None and kernels.engine.few is not None
    plain.engine.few = None
    generator = torch.Generator().manual_seed(1)
    start = torch.zeros(batch_size, dtype=torch.int64)
    for queries, keep in ((70, 0), (1, 0), (2, 1), (2, 0), (3, 0), (4, 0), (5, 0), (9, 0), (16, 0)):
        ids = torch.randint(0, 1024, (batch_size, queries), generator=generator).cuda()
        wanted, theirs, ours = (
            model.forward(ids, start.cuda(), keep).float() for model in (exact, plain, kernels)
        )
        assert ours.shape == wanted.shape
        allowed = 1.3 * (theirs - wanted).square().mean().sqrt()
        assert (ours - wanted).square().mean().sqrt() <= allowed, (queries, keep)
        # Ragged: the second row goes back two tokens of every longer query.
        start += torch.tensor([queries, max(1, queries - 2)])[:batch_size]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tokens_verified_together_have_the_bits_of_tokens_decoded_one_by_one(kind):
    """So that greedy speculative decoding emits what plain decoding does, to the last token."""
    one, all_at_once, rows = (
        CachedModel(on_card(wide(kind)).bfloat16(), count, 256) for count in (1, 1, 2)
    )
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 1024, (1, 150), generator=generator).cuda()
    for model in (one, all_at_once, rows):
        model.prefill(prompt.expand(model.batch_size, -1))
    start = prompt.shape[1]
    for queries in (2, 4, 8, 9, 16):
        ids = torch.randint(0, 1024, (1, queries), generator=generator).cuda()
        at = [torch.tensor([start + i]).cuda() for i in range(queries)]
        wanted = torch.cat([one.forward(ids[:, i : i + 1], at[i]) for i in range(queries)], 1)
        assert torch.equal(all_at_once.forward(ids, at[0]), wanted)
        if queries <= 8:
            mates = torch.cat((ids, ids.flip(1)))
            beside = rows.forward(mates, at[0].repeat(2))
            assert torch.equal(beside[:1], wanted)
        start += queries


def test_few_token_layers_do_not_write_outside_their_rows():
    kernels = CachedModel(on_card(wide("llama")).bfloat16(), 2, 64)
    for _, cache in kernels.engine.layers:
        cache.fill_(7)
    ids, start = torch.ones((2, 3), dtype=torch.int64).cuda(), torch.tensor([5, 40]).cuda()
    kernels.forward(ids, start)
    for _, cache in kernels.engine.layers:
        untouched = torch.ones(2, 64, dtype=torch.bool)
        untouched[0, 5:8] = untouched[1, 40:43] = False
        assert (cache[untouched.cuda()] == 7).all()
        assert (cache[~untouched.cuda()] != 7).float().mean() > 0.9
