"""Our operator behind the peers' signatures: the oracle's tokens, and each stated difference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import oracle, philox
from src.peers import compat
from tests.cases import flatten, make_case, more_drafts_than_most, ragged, to_device

U_MAX = 1 - 2**-24


def flashinfer_arguments(case):
    return case["draft_probs"], case["draft_token_ids"], case["target_probs"]


def expect(tokens, counts, **case):
    problems = oracle.disagreements(tokens, counts, oracle.rejection_sample(**case))
    assert not problems, "\n".join(problems)


# ---- FlashInfer


@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chain_sampling_emits_the_oracles_tokens_for_a_stream_a_row(dtype, ids_dtype):
    case = make_case(7, 4, 1000, dtype=dtype)
    case["draft_token_ids"] = case["draft_token_ids"].to(ids_dtype)
    seeds, offsets = torch.arange(7) * 2**50 - 3, torch.arange(7) * 9
    case["uniforms"] = philox.uniforms(seeds.numpy(), offsets.numpy(), 5)
    tokens, accepted, emitted = compat.chain_speculative_sampling(
        *flashinfer_arguments(case), seed=seeds, offset=offsets
    )
    assert tokens.dtype == accepted.dtype == emitted.dtype == torch.int32
    expect(tokens, emitted, **case)


def test_one_seed_and_offset_give_each_row_its_part_of_one_stream():
    case = make_case(5, 3, 200)
    for seed in (42, 2**64 - 5):
        signed = np.array([seed], dtype=np.uint64).view(np.int64)
        offsets = 8 + np.arange(5, dtype=np.int64) * 2**40
        case["uniforms"] = philox.uniforms(signed.repeat(5), offsets, 4)
        tokens, _, emitted = compat.chain_speculative_sampling(
            *flashinfer_arguments(case), seed=seed, offset=8
        )
        expect(tokens, emitted, **case)
        one_entry = [torch.from_numpy(signed), torch.tensor([8])]
        for dtype in (torch.int64, torch.uint64):
            seed_tensor, offset_tensor = (t.view(dtype) for t in one_entry)
            again = compat.chain_speculative_sampling(
                *flashinfer_arguments(case), seed=seed_tensor, offset=offset_tensor
            )
            assert torch.equal(again[0], tokens)


def test_the_generator_and_the_global_seed_govern_chain_sampling():
    case = make_case(9, 3, 300)
    arguments = flashinfer_arguments(case)
    torch.manual_seed(3)
    first = compat.chain_speculative_sampling(*arguments)[0]
    second = compat.chain_speculative_sampling(*arguments)[0]
    torch.manual_seed(3)
    assert torch.equal(compat.chain_speculative_sampling(*arguments)[0], first)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(3)
    given = compat.chain_speculative_sampling(*arguments, generator=generator)
    assert torch.equal(given[0], first)


def test_the_counts_are_added_to_the_tensors_given_whatever_their_dtype():
    case = make_case(6, 3, 50)
    arguments, randomness = flashinfer_arguments(case), {"seed": 1, "offset": 0}
    _, accepted, emitted = compat.chain_speculative_sampling(*arguments, **randomness)
    assert (accepted >= emitted).all()
    for dtype in (torch.int32, torch.int64):
        totals = torch.full((6,), 100, dtype=dtype), torch.full((6,), 200, dtype=dtype)
        result = compat.chain_speculative_sampling(*arguments, *totals, **randomness)
        assert result[1] is totals[0] and result[2] is totals[1]
        assert torch.equal(totals[0] - 100, accepted.to(dtype))
        assert torch.equal(totals[1] - 200, emitted.to(dtype))


def test_accepted_counts_each_draft_alone_and_never_the_rejected_one():
    # Target 0 at the first draft, everything at the two after it.
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]).repeat(50, 1, 1)
    q = torch.full((50, 3, 2), 0.5)
    ids = torch.zeros(50, 3, dtype=torch.int32)
    tokens, accepted, emitted = compat.chain_speculative_sampling(q, ids, p)
    assert tokens.tolist() == [[1, -1, -1, -1]] * 50
    assert (accepted == 2).all() and (emitted == 0).all()


def test_flashinfers_published_example():
    q = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    p = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    tokens, accepted, emitted = compat.chain_speculative_sampling(q, torch.tensor([[2, 1]]), p)
    assert (tokens.tolist(), accepted.tolist(), emitted.tolist()) == ([[2, 0, -1]], [1], [1])


def test_bad_drafts_zero_residuals_and_nan_give_tokens_of_the_target():
    case = make_case(5, 2, 20)
    p, q, ids = (case[k] for k in ("target_probs", "draft_probs", "draft_token_ids"))
    ids[0, 0], ids[1, 0] = -1, 20
    p[2, 0], p[2, 0, 3] = 0, 0.5
    q[2, 0] = 1.0
    ids[2, 0] = 4  # rejected, and p - q is nowhere positive
    p[3] = float("nan")
    p[4] = q[4, :1]  # p == q to the bit: accepted whatever u is
    q[4] = q[4, :1].clone()
    p[4] = q[4, :1]
    for seed in range(30):
        tokens, _, emitted = compat.chain_speculative_sampling(q, ids, p, seed=seed, offset=0)
        assert emitted.tolist()[:4] == [0, 0, 0, 0] and emitted[4] == 2
        assert ((tokens[:, 0] >= 0) & (tokens < 20).all(1)).all()
        assert tokens[2, 0] == 3 and tokens[3, 0] == 0


def test_chain_sampling_names_a_bad_seed():
    arguments = flashinfer_arguments(make_case(3, 2, 10))
    with pytest.raises(ValueError, match="offset is None; wanted seed and offset both"):
        compat.chain_speculative_sampling(*arguments, seed=1)
    with pytest.raises(TypeError, match="seed has dtype torch.int32"):
        compat.chain_speculative_sampling(*arguments, seed=torch.zeros(1).int(), offset=0)
    with pytest.raises(ValueError, match=r"offset has shape \[2\]; wanted \[1\] or \[3\]"):
        compat.chain_speculative_sampling(*arguments, seed=0, offset=torch.zeros(2).long())


# ---- vLLM V1


def metadata(temperature=None, generators=None, all_greedy=False):
    all_random = not all_greedy and (temperature is None or bool((temperature > 0).all()))
    return SimpleNamespace(
        all_greedy=all_greedy,
        all_random=all_random,
        temperature=temperature,
        generators=generators or {},
    )


def v1_arguments(flat, bonus):
    ends = flat["cu_num_draft_tokens"]
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return {
        "draft_token_ids": flat["draft_token_ids"].int(),
        "num_draft_tokens": lengths,
        "max_spec_len": flat["max_spec_length"],
        "cu_num_draft_tokens": ends,
        "draft_probs": flat["draft_probs"],
        "target_probs": flat["target_probs"],
        "bonus_token_ids": bonus,
    }


@pytest.mark.parametrize("column", [True, False], ids=["bonus-column", "bonus-row"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_v1_emits_the_oracles_tokens_and_the_callers_bonus(one_hot, column):
    case = ragged(make_case(7, 5, 300))
    case["num_draft_tokens"] = case["num_draft_tokens"].clamp(max=5)
    case["target_probs"][6, :5].scatter_(-1, case["draft_token_ids"][6, :, None], 2.0)
    if one_hot:
        case["draft_probs"] = None
    torch.manual_seed(11)
    case["uniforms"] = torch.rand(7, 6)
    expected = oracle.rejection_sample(**case)
    bonus = torch.arange(7) + 200
    flat = v1_arguments(flatten(case), bonus[:, None] if column else bonus)
    torch.manual_seed(11)
    tokens = compat.vllm_rejection_sample_from_probs(**flat, sampling_metadata=metadata())
    assert tokens.dtype == torch.int32 and tokens.shape == (7, 6)
    complete = torch.from_numpy(expected.num_accepted) == case["num_draft_tokens"]
    assert complete[0] and complete[6] and not complete.all()
    rows = complete.nonzero().flatten()
    at = case["num_draft_tokens"][rows].long()
    assert torch.equal(tokens[rows, at].long(), bonus[rows])
    tokens[rows, at] = torch.from_numpy(expected.token_ids)[rows, at].int()
    problems = oracle.disagreements(tokens, expected.num_accepted, expected)
    assert not problems, "\n".join(problems)


def test_v1_from_logits_is_v1_from_their_softmax():
    case = make_case(6, 3, 100)
    case["num_draft_tokens"] = torch.tensor([3, 0, 1, 2, 3, 3], dtype=torch.int32)
    flat = v1_arguments(flatten(case), torch.arange(6))
    logits = 4 * torch.randn(12, 100)
    flat["target_probs"] = logits.softmax(-1)
    torch.manual_seed(2)
    from_probs = compat.vllm_rejection_sample_from_probs(**flat, sampling_metadata=metadata())
    del flat["target_probs"]
    torch.manual_seed(2)
    tokens = compat.vllm_rejection_sample(
        **flat, target_logits=logits, sampling_metadata=metadata()
    )
    assert torch.equal(tokens, from_probs)


def test_v1_without_a_single_draft_emits_the_bonus_tokens():
    tokens = compat.vllm_rejection_sample(
        torch.zeros(0, dtype=torch.int32),
        [0, 0],
        3,
        torch.zeros(2, dtype=torch.int32),
        None,
        torch.zeros(0, 10),
        torch.tensor([[4], [7]]),
        metadata(),
    )
    assert tokens.tolist() == [[4, -1, -1, -1], [7, -1, -1, -1]]


def test_v1_gives_no_bonus_where_max_spec_len_leaves_a_draft_out():
    flat = v1_arguments(more_drafts_than_most(), torch.tensor([2, 2]))
    tokens = compat.vllm_rejection_sample_from_probs(**flat, sampling_metadata=metadata())
    assert tokens.tolist() == [[0, 1], [3, 2]]


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("from_probs", [False, True])
def test_v1_greedy_rows_follow_the_largest_logit_among_random_ones(from_probs, one_hot):
    ids = torch.tensor([1, 2, 3, 1, 5, 1, 2], dtype=torch.int32)
    logits = torch.full((7, 6), -3.0)
    for row, largest in enumerate([1, 2, 3, 1, 2, 4, 4]):
        logits[row, largest] = 5.0
    draft = torch.zeros(7, 6)
    draft[:, 2] = 1.0  # q is 1 on a token that is not the target's choice
    arguments = {
        "draft_token_ids": ids,
        "num_draft_tokens": [3, 2, 2],
        "max_spec_len": 3,
        "cu_num_draft_tokens": torch.tensor([3, 5, 7], dtype=torch.int32),
        "draft_probs": None if one_hot else draft,
        "bonus_token_ids": torch.tensor([0, 0, 0]),
    }
    if from_probs:
        sample, arguments["target_probs"] = compat.vllm_rejection_sample_from_probs, logits
    else:
        sample, arguments["target_logits"] = compat.vllm_rejection_sample, logits
    for _ in range(10):
        tokens = sample(**arguments, sampling_metadata=metadata(all_greedy=True))
        assert tokens.tolist() == [[1, 2, 3, 0], [1, 2, -1, -1], [4, -1, -1, -1]]
        if from_probs:
            arguments["target_probs"] = logits.softmax(-1)
        some = metadata(temperature=torch.tensor([0.0, -1.0, 1.0]))
        assert sample(**arguments, sampling_metadata=some).tolist()[:2] == tokens.tolist()[:2]


def test_v1_a_seeded_request_depends_on_its_generator_alone():
    case = make_case(4, 3, 200)
    case["num_draft_tokens"] = torch.full((4,), 3, dtype=torch.int32)
    flat = v1_arguments(flatten(case), torch.zeros(4))
    rows = []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)  # the others' numbers differ
        generators = {2: torch.Generator().manual_seed(9)}
        rows.append(
            compat.vllm_rejection_sample_from_probs(
                **flat, sampling_metadata=metadata(generators=generators)
            )[2].tolist()
        )
    assert rows[0] == rows[1] == rows[2]
    generator = torch.Generator().manual_seed(9)
    flat["num_draft_tokens"] = [3, 3, 0, 3]
    compat.vllm_rejection_sample_from_probs(
        **flat, sampling_metadata=metadata(generators={2: generator})
    )
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(9).get_state())


def test_v1_never_accepts_zero_or_reads_outside_and_refuses_other_acceptance():
    case = make_case(3, 2, 30)
    case["num_draft_tokens"] = torch.full((3,), 2, dtype=torch.int32)
    flat = v1_arguments(flatten(case), torch.full((3,), 7))
    flat["draft_token_ids"][0], flat["draft_token_ids"][2] = -1, 2**31 - 1
    flat["target_probs"][4].scatter_(0, flat["draft_token_ids"][4].long(), 0.0)
    for _ in range(20):
        tokens = compat.vllm_rejection_sample_from_probs(**flat, sampling_metadata=metadata())
        assert (tokens[:, 1] == -1).all() and (tokens[:, 0] >= 0).all() and tokens.max() < 30
        assert tokens[2, 0] != flat["draft_token_ids"][4]
    flat["target_logits"] = flat.pop("target_probs")
    for option, value in (("synthetic_mode", True), ("fly_window_size", 2)):
        with pytest.raises(NotImplementedError, match=option):
            compat.vllm_rejection_sample(**flat, sampling_metadata=metadata(), **{option: value})
    # As vLLM's RejectionSampler calls it where neither is on.
    off = {"fly_window_size": None, "fly_entropy_threshold": None, "fly_entropy_top_k": 3}
    compat.vllm_rejection_sample(**flat, sampling_metadata=metadata(), **off)


# ---- vLLM V2


def v2_case(one_hot=False, steps=3, vocab_size=200):
    """Requests with 3, 0, 1 and 2 drafts, whose state is in entries 5, 2, 0 and 3 of six."""
    g = torch.Generator().manual_seed(4)
    lengths, entries = torch.tensor([3, 0, 1, 2]), torch.tensor([5, 2, 0, 3])
    counts = lengths + 1
    total = int(counts.sum())
    cu = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    local = torch.cat([torch.arange(n) for n in counts])
    target = 3 * torch.randn(total, vocab_size, generator=g)
    draft = 3 * torch.randn(6, steps, vocab_size, generator=g)
    expanded = entries.repeat_interleave(counts)
    for row in range(total):  # alike enough that some drafts are accepted
        target[row] = draft[expanded[row], min(local[row], steps - 1)] + 0.3 * target[row]
    sampled = torch.multinomial(target.softmax(-1), 1, generator=g).flatten()
    return {
        "target_logits": target,
        "draft_logits": None if one_hot else draft,
        "draft_sampled": sampled.roll(1),
        "cu_num_logits": cu.int(),
        "pos": 100 + torch.arange(total) * 3,
        "idx_mapping": entries.int(),
        "expanded_idx_mapping": expanded.int(),
        "expanded_local_pos": local.int(),
        "temperature": torch.ones(6),
        "seed": torch.arange(6) * 1000 - 7,
        "num_speculative_steps": steps,
    }


def v2_oracle(case):
    """The oracle's arguments for the same requests, padded."""
    steps, cu = case["num_speculative_steps"], case["cu_num_logits"].tolist()
    entries = case["idx_mapping"].tolist()
    requests, temperature = len(entries), case["temperature"]
    with_logits = "target_logits" if case["draft_logits"] is None else "draft_logits"
    vocab_size = case[with_logits].shape[-1]
    ids = torch.full((requests, steps), -1)
    target = torch.ones(requests, steps + 1, vocab_size)
    q = torch.ones(requests, steps, vocab_size)
    for r, (begin, end) in enumerate(zip(cu, cu[1:], strict=False)):
        ids[r, : end - begin - 1] = case["draft_sampled"][begin + 1 : end]
        target[r, : end - begin] = case["target_logits"][begin:end, :vocab_size].softmax(-1)
        if case["draft_logits"] is not None:
            q[r] = (case["draft_logits"][entries[r]].float() / temperature[entries[r]]).softmax(-1)
    first = case["pos"][case["cu_num_logits"][:-1].long()]
    seeds = case["seed"][case["idx_mapping"].long()]
    u = philox.uniforms(seeds.numpy(), (first * (steps + 2)).numpy(), steps + 2)
    return {
        "draft_token_ids": ids,
        "draft_probs": None if case["draft_logits"] is None else q,
        "target_probs": target,
        # K + 1 drafts a request by the layout used, so the recovery's uniform is the last of them.
        "uniforms": np.concatenate([u[:, :steps], u[:, -1:]], axis=1),
    }


@pytest.mark.parametrize("one_hot", [False, True])
def test_v2_emits_the_oracles_tokens_by_the_index_maps(one_hot):
    case = v2_case(one_hot)
    accepted = 0
    for seed in range(20):
        case["seed"] = torch.arange(6) * 1000 + seed
        sampled, num_sampled = compat.vllm_v2_rejection_sample(**case, use_block_verification=True)
        expect(sampled, num_sampled - 1, **v2_oracle(case), verification="block")
        sampled, num_sampled = compat.vllm_v2_rejection_sample(**case)
        assert sampled.shape == (4, 4) and sampled.dtype == torch.int64
        assert num_sampled.dtype == torch.int32
        expect(sampled, num_sampled - 1, **v2_oracle(case))
        accepted += int((num_sampled - 1).sum())
    assert accepted > (4 if one_hot else 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_v2_applies_the_temperature_to_the_draft_alone_and_cuts_the_targets_padding(dtype):
    case = v2_case()
    case["temperature"] = torch.tensor([0.6, 9.0, 1.0, 1.7, 9.0, 0.3])
    case["draft_logits"] = case["draft_logits"].to(dtype)
    padding = torch.full((len(case["target_logits"]), 7), 50.0)
    case["target_logits"] = torch.cat([case["target_logits"], padding], dim=1)
    for seed in range(20):
        case["seed"] = torch.arange(6) * 1000 + seed
        sampled, num_sampled = compat.vllm_v2_rejection_sample(**case)
        expect(sampled, num_sampled - 1, **v2_oracle(case))


def test_v2_greedy_requests_and_placeholders_among_random_ones():
    case = v2_case()
    case["temperature"][5] = 0.0
    case["draft_sampled"][2] = case["target_logits"][1].argmax()  # request 0, draft 1
    case["draft_sampled"][1] = case["target_logits"][0].argmax()
    case["draft_sampled"][3] = (case["target_logits"][2].argmax() + 1) % 200
    case["draft_sampled"][6] = -1  # request 2's only draft
    best = case["target_logits"].argmax(-1)
    for seed in range(5):
        case["seed"] = torch.full((6,), seed)
        sampled, num_sampled = compat.vllm_v2_rejection_sample(**case)
        assert sampled[0].tolist() == [*best[:3].tolist(), -1] and num_sampled[0] == 3
        assert num_sampled[2] == 1 and sampled[2, 0] >= 0
        assert (sampled[2, 1:] == -1).all()
        expect(
            sampled[2:3],
            num_sampled[2:3] - 1,
            **{
                key: None if value is None else value[2:3] for key, value in v2_oracle(case).items()
            },
        )


def test_v2_a_request_depends_on_its_seed_and_position_alone():
    case = v2_case()
    whole, _ = compat.vllm_v2_rejection_sample(**case)
    first, last = case["cu_num_logits"][3], case["cu_num_logits"][4]
    alone = {**case, "cu_num_logits": torch.tensor([0, last - first], dtype=torch.int32)}
    for key in ("target_logits", "draft_sampled", "pos", "expanded_idx_mapping"):
        alone[key] = case[key][first:last]
    alone["expanded_local_pos"] = case["expanded_local_pos"][first:last]
    alone["idx_mapping"] = case["idx_mapping"][3:]
    assert torch.equal(compat.vllm_v2_rejection_sample(**alone)[0], whole[3:])


def test_v2_refuses_what_it_does_not_do():
    for argument, value in (
        ("synthetic_conditional_rates", torch.ones(3)),
        ("fly_window_size", 2),
        ("contexts", torch.zeros(10, 4)),
    ):
        with pytest.raises(NotImplementedError, match=argument):
            compat.vllm_v2_rejection_sample(**v2_case(), **{argument: value})
    with pytest.raises(ValueError, match=r"draft_sampled has shape \[3\]; wanted \[10\]"):
        compat.vllm_v2_rejection_sample(**{**v2_case(), "draft_sampled": torch.zeros(3)})


# ---- SGLang


def sglang_arguments(case, extra_coins=0):
    """A case as the chain's arguments, the tokens' places in no order."""
    (batch_size, spec_length), u = case["draft_token_ids"].shape, case["uniforms"]
    rows = spec_length + 1
    places = torch.randperm(batch_size * rows, generator=torch.Generator().manual_seed(1))
    unread = torch.zeros(batch_size, extra_coins)
    return {
        "predicts": torch.full((batch_size * rows,), -9, dtype=torch.int32),
        "accept_index": torch.full((batch_size, rows), -8, dtype=torch.int32),
        "accept_token_num": torch.full((batch_size,), -7, dtype=torch.int32),
        "candidates": torch.cat([torch.full((batch_size, 1), 3), case["draft_token_ids"]], dim=1),
        "retrive_index": places.view(batch_size, rows),
        "retrive_next_token": None,
        "retrive_next_sibling": None,
        "uniform_samples": torch.cat([u[:, :spec_length], unread], dim=1),
        "uniform_samples_for_final_sampling": u[:, spec_length].contiguous(),
        "target_probs": case["target_probs"],
        "draft_probs": case["draft_probs"],
        "threshold_single": 1.0,
        "threshold_acc": 1.0,
        "deterministic": True,
    }


def sglang_chain(case, extra_coins=0, **options):
    """token_ids [B, K+1] padded with -1 and the accepted drafts, the buffers checked."""
    arguments = sglang_arguments(case, extra_coins)
    assert compat.sglang_chain_speculative_sampling(**arguments, **options) is None
    counts, places = arguments["accept_token_num"], arguments["retrive_index"]
    emitted = torch.arange(places.shape[1]) <= counts[:, None]
    assert torch.equal(arguments["accept_index"], torch.where(emitted, places, -8).int())
    tokens = arguments["predicts"][places]
    assert (tokens[~emitted] == -9).all(), "written where no token is"
    return torch.where(emitted, tokens, -1), counts


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sglangs_chain_emits_the_oracles_tokens_for_its_uniforms(dtype, verification):
    options = {"block_verification": True} if verification == "block" else {}
    accepted = 0
    for seed in range(10):
        case = make_case(7, 4, 1000, dtype=dtype, seed=seed)
        tokens, counts = sglang_chain(case, seed % 2, **options)
        expect(tokens, counts, **case, verification=verification)
        accepted += int(counts.sum())
    assert accepted > 70


def test_sglangs_chain_with_bad_drafts_and_zero_residuals():
    case = make_case(5, 2, 20)
    p, q, ids = (case[k] for k in ("target_probs", "draft_probs", "draft_token_ids"))
    ids[0, 0], ids[1, 0] = -1, 20
    p[2, 0], p[2, 0, 3], q[2, 0], ids[2, 0] = 0, 0.5, 1.0, 4  # rejected, and p - q is nowhere > 0
    q[3, 0, ids[3, 0]] = 0.0  # p, but no q
    p[4, 0, ids[4, 0]], q[4, 0, ids[4, 0]], case["uniforms"][4, 0] = 0.9, 1.5, 0.5  # 0.5 q < p
    for seed in range(30):
        case["uniforms"][:, -1] = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        tokens, counts = sglang_chain(case)
        assert counts.tolist()[:3] == [0, 0, 0] and counts[3] > 0 and counts[4] > 0
        assert tokens[2, 0] == 3
        assert ((tokens[:2, 0] >= 0) & (tokens[:2, 0] < 20)).all()


def blockwise_case(dtype=torch.float32, draft_vocab=200):
    """Arguments of sglang_blockwise_rejection: 5 requests, 3 drafts (a row of logits more), 200
    tokens."""
    g = torch.Generator().manual_seed(2)
    target = 3 * torch.randn(5, 4, 200, generator=g)
    draft = target[..., :draft_vocab] + torch.randn(5, 4, draft_vocab, generator=g)
    q = draft.softmax(-1).reshape(-1, draft_vocab)
    return {
        "candidates": torch.multinomial(q, 1, generator=g).view(5, 4).roll(1, dims=1),
        "target_logits": target.to(dtype).view(20, 200),
        "draft_logits": draft.to(dtype),
        "target_temperatures": torch.tensor([[1.0], [0.7], [1.5], [1.0], [0.4]]),
        "draft_temperatures": torch.tensor([0.8, 1.0, 1.0, 2.0, 0.5]),
        "noise": SimpleNamespace(key=2**63 - 40, counter=torch.tensor([5])),
    }


def blockwise_oracle(case):
    """oracle.rejection_sample's arguments for the step that the counter stands before."""

    def softmax(logits, temperatures):
        return (logits.float() / temperatures.view(-1, 1, 1)).softmax(-1)

    q = None
    if case["draft_logits"] is not None:
        q = softmax(case["draft_logits"][:, :3], case["draft_temperatures"])
        q = torch.cat([q, torch.zeros(5, 3, 200 - q.shape[-1])], dim=-1)
    seeds = np.full(5, case["noise"].key) + case["noise"].counter.numpy()
    return {
        "draft_token_ids": case["candidates"][:, 1:],
        "draft_probs": q,
        "target_probs": softmax(case["target_logits"].view(5, 4, 200), case["target_temperatures"]),
        "uniforms": philox.uniforms(seeds, np.arange(5) * 4, 4),
    }


def emitted_by(case, kept, last):
    """token_ids [B, K+1] of what block-wise rejection returns."""
    drafts = torch.cat([case["candidates"][:, 1:], torch.full((len(kept), 1), -1)], dim=1)
    columns, end = torch.arange(drafts.shape[1]), kept[:, None]
    return torch.where(columns == end, last[:, None], torch.where(columns < end, drafts, -1))


@pytest.mark.parametrize("draft", ["same", "narrow", "one-hot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sglangs_blockwise_emits_the_oracles_tokens_step_by_step(dtype, draft):
    case = blockwise_case(dtype, 150 if draft == "narrow" else 200)
    if draft == "one-hot":
        case["draft_logits"] = None
    accepted = 0
    for step in range(50):
        assert case["noise"].counter.tolist() == [5 + step]
        wanted = blockwise_oracle(case)
        kept, last, cut = compat.sglang_blockwise_rejection(**case)
        assert (kept.dtype, last.dtype, cut.dtype) == (torch.int32, torch.int64, torch.int32)
        expect(emitted_by(case, kept, last), kept, **wanted)
        assert not cut.any()
        accepted += int(kept.sum())
    assert accepted > (20 if draft == "one-hot" else 50)


def test_sglangs_blockwise_cutoff_ends_a_row_with_the_draft_after_it():
    case = blockwise_case()
    case["draft_logits"] = case["target_logits"].view(5, 4, 200)
    case["draft_temperatures"] = case["target_temperatures"]  # p == q: every draft is accepted
    kept, last, cut = compat.sglang_blockwise_rejection(
        **case, cutoff_verify_lens=torch.tensor([1, 2, 3, 4, 4])
    )
    assert (kept.tolist(), cut.tolist()) == ([0, 1, 2, 3, 3], [3, 2, 1, 0, 0])
    assert last.tolist()[:3] == [int(case["candidates"][b, b + 1]) for b in range(3)]


def test_sglangs_blockwise_placeholder_gives_a_token_of_the_target():
    case = blockwise_case()
    case["candidates"][:, 1] = -1
    for _ in range(20):
        wanted = blockwise_oracle(case)
        kept, last, _ = compat.sglang_blockwise_rejection(**case)
        assert not kept.any()
        expect(emitted_by(case, kept, last), kept, **wanted)
    case["candidates"][:, 1] = 200
    assert not compat.sglang_blockwise_rejection(**case)[0].any()


# ---- On a card


@pytest.mark.gpu
def test_on_a_gpu_the_tokens_are_the_oracles_too():
    case = make_case(7, 4, 1000)
    seeds, offsets = torch.arange(7) * 2**50 - 3, torch.arange(7) * 9
    tokens, accepted, emitted = compat.chain_speculative_sampling(
        *(tensor.cuda() for tensor in flashinfer_arguments(case)),
        seed=seeds.cuda(),
        offset=offsets.cuda(),
    )
    on_cpu = compat.chain_speculative_sampling(
        *flashinfer_arguments(case), seed=seeds, offset=offsets
    )
    for ours, expected in zip((tokens, accepted, emitted), on_cpu, strict=True):
        assert torch.equal(ours.cpu(), expected)
    for one_hot in (False, True):
        case = v2_case(one_hot)
        sampled, num_sampled = compat.vllm_v2_rejection_sample(**to_device(case, "cuda"))
        expect(sampled.cpu(), num_sampled.cpu() - 1, **v2_oracle(case))


@pytest.mark.gpu
def test_on_a_gpu_sglangs_tokens_are_the_oracles_too():
    case = make_case(7, 4, 1000)
    on_cpu = sglang_arguments(case)
    on_gpu = to_device(on_cpu, "cuda")
    for arguments in (on_cpu, on_gpu):
        compat.sglang_chain_speculative_sampling(**arguments)
    for name in ("predicts", "accept_index", "accept_token_num"):
        assert torch.equal(on_gpu[name].cpu(), on_cpu[name]), name
    case = blockwise_case()
    there = to_device(case, "cuda")
    counter = case["noise"].counter.cuda()
    there["noise"] = SimpleNamespace(key=case["noise"].key, counter=counter)
    kept, last, _ = (tensor.cpu() for tensor in compat.sglang_blockwise_rejection(**there))
    expect(emitted_by(case, kept, last), kept, **blockwise_oracle(case))
    assert counter.tolist() == [6]


@pytest.mark.gpu
def test_on_a_gpu_v1_mixes_greedy_seeded_and_other_requests():
    case = make_case(3, 3, 50)
    case["num_draft_tokens"] = torch.full((3,), 3, dtype=torch.int32)
    flat = to_device(v1_arguments(flatten(case), torch.arange(3)), "cuda")
    flat["target_logits"] = flat.pop("target_probs").log()
    best = flat["target_logits"].argmax(-1)[:3].tolist()
    flat["draft_token_ids"][:2] = torch.tensor(best[:2])
    rows = []
    for _ in range(3):
        some = metadata(
            temperature=torch.tensor([0.0, 1.0, 1.0], device="cuda"),
            generators={1: torch.Generator("cuda").manual_seed(5)},
        )
        rows.append(compat.vllm_rejection_sample(**flat, sampling_metadata=some).tolist())
        assert rows[-1][0][:3] == best and rows[-1][1] == rows[0][1]
