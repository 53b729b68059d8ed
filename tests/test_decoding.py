"""The decoding loop on tiny models: greedy losslessness, rows, stopping, seeds."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from src import decoding, from_logits, samplers
from src.decoding.cache import CachedModel
from src.decoding.drafts import PromptLookupDraft, forced_acceptance
from src.decoding.forwards import FusedForward
from src.decoding.from_logits import FromLogits
from src.decoding.speculative import Decoder, Distribution
from tests.tiny import VOCAB_SIZE, drafting, llama, relative

VECTORIZED = samplers.get("vectorized").load()
PROMPTS = [[5, 6, 7, 8], [1], [9, 3, 9, 3, 9, 3, 2]]
NEW = 24
DRAFTS = {
    "the target itself": drafting(llama(0), VECTORIZED),
    "a relative": drafting(relative(0), VECTORIZED),
    "a stranger": drafting(llama(3), VECTORIZED),
    "prompt lookup": lambda batch_size, capacity: PromptLookupDraft(),
}


def decoder(draft=None, spec_length=0, sample=VECTORIZED, **options):
    options = {"max_length": 40, "batch_size": 3, **options}
    return Decoder(llama(0), draft, sample, spec_length=spec_length, **options)


def by_generate(prompt, new=NEW, **options):
    """What transformers' own greedy decoding emits."""
    ids = torch.tensor([prompt])
    output = llama(0).generate(ids, max_new_tokens=new, do_sample=False, **options)
    return output[0, len(prompt) :].tolist()


def test_plain_decoding_emits_what_transformers_does():
    assert decoder().generate(PROMPTS, NEW).token_ids == [by_generate(p) for p in PROMPTS]


@pytest.mark.parametrize("sampler", ["vectorized", "baseline"])
@pytest.mark.parametrize("spec_length", [1, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_speculative_decoding_emits_what_plain_decoding_does(draft, spec_length, sampler):
    sample = samplers.get(sampler).load()
    result = decoder(DRAFTS[draft], spec_length, sample).generate(PROMPTS, NEW)
    assert result.token_ids == [by_generate(p) for p in PROMPTS]


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_decoding_from_logits_emits_what_plain_decoding_does(draft):
    logits = FromLogits(from_logits.get("vectorized").load())
    result = decoder(DRAFTS[draft], 4, logits.sample, distribution=logits, check=True).generate(
        PROMPTS, NEW
    )
    assert result.token_ids == [by_generate(p) for p in PROMPTS]
    assert result.stats.not_argmax == 0


def test_rounds_from_logits_accept_what_those_from_probabilities_do():
    def run(sample, distribution):
        made = decoder(drafting(relative(0), sample), 4, sample, distribution=distribution)
        return made.generate(PROMPTS, NEW, seeds=[1, 2, 3])

    logits = FromLogits(from_logits.get("vectorized").load(), temperature=1)
    ours, theirs = run(logits.sample, logits), run(VECTORIZED, Distribution())
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.accepted == theirs.stats.accepted


def test_the_target_as_its_own_draft_is_always_accepted_and_a_relative_sometimes():
    own = decoder(DRAFTS["the target itself"], 3).generate(PROMPTS, NEW).stats
    assert own.acceptance == 1 and own.mean_accepted_length == 4
    assert own.rounds == 3 * NEW / 4
    some = decoder(DRAFTS["a relative"], 3).generate(PROMPTS, NEW).stats
    assert 0 < some.acceptance < 1, "rollback and full acceptance are both exercised"
    assert some.acceptance_by_position == sorted(some.acceptance_by_position, reverse=True)
    assert sum(some.accepted) + some.rounds >= some.tokens == 3 * NEW


@pytest.mark.parametrize("draft", DRAFTS)
def test_an_eos_inside_a_round_ends_its_row_only(draft):
    free = [by_generate(p) for p in PROMPTS]

    def ends(eos):
        return [min([row.index(e) + 1 for e in eos if e in row], default=NEW) for row in free]

    pairs = itertools.combinations(range(VOCAB_SIZE), 2)
    eos = next(pair for pair in pairs if len(set(ends(pair))) == 3 and min(ends(pair)) > 2)
    result = decoder(DRAFTS[draft], 4, eos_token_ids=eos).generate(PROMPTS, NEW)
    assert result.token_ids == [row[:end] for row, end in zip(free, ends(eos), strict=True)]


def test_a_decoder_starts_afresh_with_every_call():
    speculative = decoder(DRAFTS["a relative"], 4)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:2]):
        assert speculative.generate(prompts, NEW).token_ids == [by_generate(p) for p in prompts]


def test_an_explicit_stopping_length_is_met_exactly():
    for new in (1, 2, 3, 5):
        result = decoder(DRAFTS["the target itself"], 4).generate(PROMPTS, new)
        assert result.token_ids == [by_generate(p, new) for p in PROMPTS]


@pytest.mark.parametrize("greedy, proposed", [(True, [4, 4, 1]), (False, [4, 4, 4])])
def test_greedy_rounds_draft_nothing_beyond_the_last_token(greedy, proposed):
    """The target is its own draft: a round emits 5 of 12 tokens. A sampled one drafts on, so that
    its tokens do not depend on where it ends."""
    speculative = decoder(DRAFTS["the target itself"], 4, distribution=Distribution(greedy=greedy))
    lengths, propose = [], speculative.draft.propose

    def counted(state, spec_length, distribution):
        lengths.append(spec_length)
        return propose(state, spec_length, distribution)

    speculative.draft.propose = counted
    result = speculative.generate([PROMPTS[0]], 12, seeds=[3])
    assert len(result.token_ids[0]) == 12 and lengths == proposed
    assert sum(result.stats.drafted) == sum(proposed)
    assert result.stats.accepted == [proposed.count(4) + (k < proposed[-1] < 4) for k in range(4)]


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_request_with_a_seed_does_not_depend_on_its_batch(draft):
    def run(prompts, seeds):
        sampled = Distribution()
        speculative = decoder(DRAFTS[draft], 3, distribution=sampled)
        return speculative.generate(prompts, NEW, seeds=seeds).token_ids

    together = run(PROMPTS, [11, 12, 13])
    assert run(PROMPTS[::-1], [13, 12, 11]) == together[::-1]
    assert [run([p], [11 + i])[0] for i, p in enumerate(PROMPTS)] == together
    assert run(PROMPTS, [21, 22, 23]) != together


class _NoHost(TorchDispatchMode):
    READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_round_never_reads_the_device(draft, greedy):
    speculative = decoder(DRAFTS[draft], 3, distribution=Distribution(greedy=greedy))
    speculative.generate(PROMPTS, 4)
    with torch.no_grad(), _NoHost():
        for one_round in speculative._rounds.values():
            for phase in one_round.functions(profile=True):
                phase()


def test_a_sampler_that_emits_nothing_is_an_error_and_no_endless_loop():
    def nothing(draft_token_ids, draft_probs, target_probs, **random):
        output = VECTORIZED(draft_token_ids, draft_probs, target_probs, **random)
        return output._replace(num_accepted=output.num_accepted - 9)

    with pytest.raises(RuntimeError, match="emits no tokens"):
        decoder(sample=nothing).generate(PROMPTS, NEW)


def test_new_tokens_are_reported_as_they_come():
    rows = [[], [], []]
    result = decoder(DRAFTS["a relative"], 3).generate(
        PROMPTS, NEW, on_tokens=lambda row, tokens: rows[row].extend(tokens)
    )
    assert rows == result.token_ids


def test_the_phases_of_a_profiled_run_add_up():
    result = decoder(DRAFTS["a relative"], 3).generate(PROMPTS, NEW, profile=True)
    assert set(result.stats.seconds) == {"draft", "verify", "sample"}
    total = sum(result.stats.seconds.values()) + result.prefill_seconds
    assert 0.8 * result.seconds < total <= result.seconds


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_forced_acceptance_accepts_at_its_rate(rate):
    sample = forced_acceptance(VECTORIZED, rate)
    speculative = decoder(
        DRAFTS["a stranger"], 3, sample, batch_size=64, distribution=Distribution()
    )
    stats = speculative.generate([[1, 2]] * 64, NEW, seeds=range(64)).stats
    assert abs(stats.acceptance - rate) < 0.05


def test_prompt_lookup_proposes_what_followed_the_longest_then_latest_match():
    prompt = [1, 2, 3, 50, 9, 2, 3, 51, 52, 53, 7, 3, 54, 1, 2, 3]
    lookup = decoder(DRAFTS["prompt lookup"], 3)
    lookup._state.fill([prompt, [4, 5, 6], [8, 8, 8, 8]], NEW, [0, 1, 2])
    draft, probs = lookup.draft.propose(lookup._state, 3, None)
    assert probs is None
    assert draft.tolist() == [[50, 9, 2], [-1, -1, -1], [8, -1, -1]]


def test_only_two_files_know_transformers():
    folder = Path(decoding.__file__).parent
    pattern = re.compile(r"^\s*(from|import) transformers", re.MULTILINE)
    files = {path.name for path in folder.glob("*.py") if pattern.search(path.read_text("utf-8"))}
    assert files == {"forwards.py", "models.py"}


def test_decoders_can_share_a_cache_and_a_small_one_is_refused():
    shared = CachedModel(llama(0), batch_size=3, capacity=64)
    for spec_length, draft in ((0, None), (4, DRAFTS["a relative"]), (2, DRAFTS["a stranger"])):
        sharing = Decoder(shared, draft, VECTORIZED, spec_length=spec_length, max_length=40,
                          batch_size=3)  # fmt: skip
        assert sharing.generate(PROMPTS, NEW).token_ids == [by_generate(p) for p in PROMPTS]
    with pytest.raises(ValueError, match="is for 3 rows of 64 tokens; wanted 2 of at least 40"):
        Decoder(shared, None, VECTORIZED, spec_length=0, max_length=40, batch_size=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spec_length": 2}, "spec_length is 2 and draft None"),
        ({"mode": "fast"}, "mode is 'fast'; wanted one of eager, graphed"),
        ({"mode": "graphed"}, "graphed mode wants a CUDA device and this is cpu; use eager mode"),
        (
            {"draft": drafting(llama(0, vocab_size=50), VECTORIZED), "spec_length": 2},
            "draft's vocabulary has 50 tokens and the target's 61",
        ),
    ],
)
def test_a_bad_decoder_says_what_was_wanted(arguments, message):
    with pytest.raises(ValueError, match=message):
        decoder(**arguments)


@pytest.mark.parametrize(
    "prompts, new, message",
    [
        ([[]], 4, "prompt 0 has 0 tokens; wanted 1 to max_length - max_new_tokens = 36"),
        ([[1] * 37], 4, "prompt 0 has 37 tokens"),
        ([[1]] * 4, 4, "4 prompts came; wanted 1 to 3"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_a_bad_prompt_says_what_was_wanted(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        decoder().generate(prompts, new)


def qwen(**options):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB_SIZE, **shape, **options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("model", [llama(3), qwen(), qwen(tie_word_embeddings=True)], ids=str)
def test_the_fused_forward_is_transformers_forward(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    own, fused = (CachedModel(model, 2, 64, fused=fused) for fused in (False, True))
    assert type(own.engine).__name__ == "ModelForward"
    assert type(fused.engine).__name__ == "FusedForward"
    g = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCAB_SIZE, (2, 9), generator=g)
    for cached in (own, fused):
        cached.prefill(prompt)
    for start, length, keep in (([9, 4], 3, 0), ([12, 5], 1, 0), ([0, 63], 1, 0), ([7, 9], 5, 2)):
        query = torch.randint(VOCAB_SIZE, (2, length), generator=g)
        logits = [cached.forward(query, torch.tensor(start), keep) for cached in (own, fused)]
        assert logits[0].shape == logits[1].shape == (2, keep or length, VOCAB_SIZE)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("model", [llama(3), qwen()], ids=["llama", "qwen"])
def test_compiled_forwards_are_the_same(model):
    query, start = torch.tensor([[5, 6], [7, 8]]), torch.tensor([3, 0])
    wanted = CachedModel(model, 2, 64, fused=False).forward(query, start)
    compiled = CachedModel(model, 2, 64, compiled=True).forward(query, start)
    torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [1, 61, 96, 512, 1536])
def test_the_best_token_is_the_first_of_equals(vocab_size):
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(4, (3, 5, vocab_size), generator=g).float()
    best = Distribution(greedy=True).best(logits)
    assert torch.equal(best, torch.from_numpy(logits.numpy().argmax(-1)))


def test_the_fused_forwards_weights_are_the_models_own():
    model = qwen()
    first, second = (FusedForward(model, 1, 32).layers[0][0].qkv for _ in range(2))
    attention = model.model.layers[0].self_attn
    assert first.data_ptr() == second.data_ptr() == attention.q_proj.weight.data_ptr()
    with torch.no_grad():
        attention.v_proj.weight.fill_(3)
    assert (second[-attention.v_proj.out_features :] == 3).all()


def test_a_model_that_is_not_as_the_fused_forward_expects_runs_its_own():
    model = qwen()
    assert FusedForward.fits(model)
    assert not FusedForward.fits(qwen(hidden_act="gelu"))
    wrapped = model.model.layers[1].mlp
    wrapped.up_proj = type("PackedLinear", (torch.nn.Linear,), {})(32, 48, bias=False)
    assert not FusedForward.fits(model)
    assert not FusedForward.fits(object())
