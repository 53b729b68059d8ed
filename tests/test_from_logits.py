import numpy as np
import pytest
import torch

from src import from_logits, oracle
from tests.cases import make_logits_case, on_every, to_device

on_every_device = on_every(from_logits.names("cpu"), from_logits.names("cuda"))
PARAMETERS = {
    "plain": {},
    "temperatures": {"temperature": [0.6, 1.0, 1.7, 0.05]},
    "greedy rows among sampled": {"temperature": [0.0, 1.0, 0.0, 0.7]},
    "top-k": {"top_k": [1, 5, 0, 1000]},
    "top-p": {"top_p": [0.5, 0.9, 1.0, 0.0]},
    "min-p": {"min_p": [0.1, 0.0, 0.5, 1.0]},
    "all": {
        "temperature": [0.8, 1.3, 0.0, 1.0],
        "top_k": [40, 0, 5, 7],
        "top_p": [0.9, 0.8, 0.5, 0.95],
        "min_p": [0.01, 0.05, 0.0, 0.02],
    },
}


def parameters(name, device="cpu"):
    dtypes = {"top_k": torch.int32}
    return {
        key: torch.tensor(values, dtype=dtypes.get(key, torch.float32), device=device)
        for key, values in PARAMETERS[name].items()
    }


def verify(name, device, case, **options):
    arguments = to_device({**case, **options}, device)
    output = from_logits.get(name).load(device).rejection_sample_from_logits(**arguments)
    return type(output)(*(tensor.cpu() for tensor in output))


def check(name, device, case, **options):
    output = verify(name, device, case, **options)
    expected = oracle.rejection_sample_from_logits(**case, **options)
    problems = oracle.disagreements(*output, expected, oracle.LOGITS_EPSILON)
    assert not problems, "\n".join(problems)
    assert sum(margin < oracle.LOGITS_EPSILON for margin in expected.accept_margins) <= 1
    return output


@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("vocab_size", [2, 7, 600, 5003])
@pytest.mark.parametrize("spec_length", [1, 5])
@on_every_device
def test_verification_emits_the_oracles_tokens(name, device, spec_length, vocab_size, which):
    case = make_logits_case(4, spec_length, vocab_size)
    check(name, device, case, **parameters(which))
    check(name, device, {**case, "draft_logits": None}, **parameters(which))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_device
def test_every_dtype_ragged_and_given_probabilities(name, device, dtype):
    case = make_logits_case(4, 5, 1000, dtype=dtype)
    case["num_draft_tokens"] = torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    case["draft_token_ids"][2, 3] = -1
    case["draft_token_ids"][1, 0] = 1000
    check(name, device, case)
    probs = case.pop("draft_logits").softmax(-1)
    check(name, device, {**case, "draft_probs": probs})


@on_every_device
def test_nan_and_infinite_logits_stay_in_range(name, device):
    case = make_logits_case(6, 2, 700)
    p, q = case["target_logits"], case["draft_logits"]
    p[0] = float("nan")
    p[1] = -float("inf")
    p[2, :, 5] = float("inf")
    q[3] = float("nan")
    p[4, :, ::2] = float("nan")
    q[5] = p[5, :2]
    expected = oracle.rejection_sample_from_logits(**case)
    output = verify(name, device, case)
    problems = oracle.disagreements(*output, expected, oracle.LOGITS_EPSILON)
    assert not problems, "\n".join(problems)
    assert output.token_ids.max() < 700
    assert (output.token_ids[0, 0], output.token_ids[1, 0]) == (0, 0)


@on_every_device
def test_equal_logits_are_always_accepted(name, device):
    case = make_logits_case(6, 3, 700)
    case["draft_logits"] = case["target_logits"][:, :3].clone()
    case["uniforms"][:, :3] = 1 - 2**-24
    output = verify(name, device, case)
    assert output.num_accepted.tolist() == [3] * 6


@on_every_device
def test_a_draft_that_q_filters_out_is_accepted_and_uses_up_its_uniform(name, device):
    case = make_logits_case(64, 4, 200)
    rows = torch.arange(64)
    first = case["draft_token_ids"][:, 0]
    case["draft_logits"][rows, 0, first] = -20.0
    case["target_logits"][rows, 0, first] = 20.0
    output = check(name, device, case, min_p=torch.full((64,), 0.05))
    assert output.num_accepted.min() >= 1 and output.num_accepted.float().mean() < 4


@on_every_device
@pytest.mark.parametrize("vocab_size", [61, 5000])
def test_without_drafts_nothing_is_accepted(name, device, vocab_size):
    case = make_logits_case(3, 0, vocab_size)
    for _ in range(4):
        # What the outputs' memory holds is not what they should be.
        poison = [torch.full((n,), 77, dtype=torch.int32, device=device) for n in (3, 6, 64)]
        del poison
        output = check(name, device, case, temperature=torch.tensor([0.0, 0.8, 1.0]))
        assert output.num_accepted.tolist() == [0, 0, 0]


@on_every_device
def test_greedy_rows_are_the_first_argmax_whatever_the_draft(name, device):
    case = make_logits_case(8, 3, 1200)
    target = case["target_logits"].round(decimals=0)  # ties
    first = target.argmax(-1)
    case["target_logits"] = target
    case["draft_token_ids"] = first[:, :3].clone()
    case["draft_token_ids"][4:, 1] += 1
    options = {"temperature": torch.zeros(8)}
    output = check(name, device, case, **options)
    assert output.num_accepted.tolist() == [3] * 4 + [1] * 4
    assert torch.equal(output.token_ids[:4], first[:4])
    assert torch.equal(output.token_ids[4:, :2], first[4:, :2])


@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("vocab_size", [1, 7, 512, 5003])
@on_every_device
def test_sampling_emits_the_oracles_tokens_and_logsumexp(name, device, vocab_size, which):
    logits = make_logits_case(4, 0, vocab_size)["target_logits"][:, 0]
    uniforms = torch.tensor([0.0, 0.3, 0.7, 1 - 2**-24])
    options = parameters(which)
    sample = from_logits.get(name).load(device).sample_from_logits
    arguments = to_device({"logits": logits, "uniforms": uniforms, **options}, device)
    tokens, logsumexp = (tensor.cpu() for tensor in sample(**arguments))
    expected, total = oracle.sample_from_logits(logits, uniforms=uniforms, **options)
    assert tokens.tolist() == expected.tolist()
    assert np.allclose(logsumexp.numpy(), total, rtol=1e-6, atol=1e-6)


# Where the scale of the exponents, log2(e) / temperature, is 1: weights of whole logits are exact.
OCTAVES = {"temperature": torch.tensor([1.4426950408889634])}


def draw_where_it_is_rejected(name, device, target, draft, token, uniform):
    """The token drawn after `token`, which the target excludes, at this uniform. By index, {index:
    logit} of one row of 1,024, whose other logits are -inf."""
    rows = torch.full((2, 1024), -torch.inf)
    for row, logits in zip(rows, (target, draft), strict=True):
        row[list(logits)] = torch.tensor(list(logits.values()))
    case = {
        "draft_token_ids": torch.tensor([[token]]),
        "target_logits": rows[0].expand(1, 2, -1).contiguous(),
        "draft_logits": rows[1].view(1, 1, -1),
        "uniforms": torch.tensor([[0.5, uniform]]),
    }
    output = verify(name, device, case, **OCTAVES)
    assert output.num_accepted.tolist() == [0]
    return int(output.token_ids[0, 0])


# Rows that differ by less than float32 tells, by index, and the drawn tokens by uniform. Token 600
# is the draft's alone. In the first it takes 2^-25 of the draft's sum, which float32 does not tell
# from 1, and token 1 has 2^-26 octaves less there: the residuals of 0 and 1 are about 2 to 3; in
# float32 token 0 would have none. In the second a difference of logits is about -8, where float32's
# are 2^-20 apart: without what the subtraction lost both residuals would be equal; they are about
# 1 to 2.
NEAR_ROWS = {
    "equal sums in float32": (
        {0: 0.0, 1: 0.0},
        {0: 0.0, 1: -(2.0**-26), 600: -24.0},
        {0.1: 0, 0.3: 0, 0.6: 1, 0.9: 1},
    ),
    "eight octaves apart": (
        {0: 8.0, 1: 8.0},
        {0: 0.0, 1: -(2.0**-23), 600: -22.0},
        {0.1: 0, 0.2: 0, 0.4: 1, 0.9: 1},
    ),
}


@pytest.mark.parametrize("target, draft, drawn", NEAR_ROWS.values(), ids=NEAR_ROWS)
@on_every(["cpp"], ["cuda"])
def test_a_residual_keeps_what_float32_loses_of_near_rows(name, device, target, draft, drawn):
    tokens = {u: draw_where_it_is_rejected(name, device, target, draft, 600, u) for u in drawn}
    assert tokens == drawn


@on_every_device
def test_what_both_rows_exclude_has_no_weight_where_they_are_equal(name, device):
    logits, drawn = {7: 0.0, 900: -1.0}, {0.0: 7, 0.5: 7, 0.99: 900}
    tokens = {u: draw_where_it_is_rejected(name, device, logits, logits, 1024, u) for u in drawn}
    assert tokens == drawn


@pytest.mark.parametrize("which", ["plain", "temperatures", "all"])
@on_every_device
def test_a_drafts_own_logsumexp_changes_nothing(name, device, which):
    module = from_logits.get(name).load(device)
    case = make_logits_case(4, 5, 3000)
    options = parameters(which)
    there = to_device(options, device)
    steps = [
        module.sample_from_logits(row.contiguous().to(device), **there)
        for row in case["draft_logits"].unbind(1)
    ]
    given = torch.stack([step.logsumexp.cpu() for step in steps], dim=1)
    without = check(name, device, case, **options)
    with_sums = check(name, device, case, draft_logsumexp=given, **options)
    assert torch.equal(without.token_ids, with_sums.token_ids)


@on_every_device
def test_a_seeded_row_depends_neither_on_its_batch_mates_nor_on_its_place(name, device):
    module = from_logits.get(name).load(device)
    case = make_logits_case(5, 4, 3000)
    del case["uniforms"]
    case = to_device(case | {"seeds": torch.arange(5) - 2, "offsets": torch.arange(5) * 3}, device)
    whole = module.rejection_sample_from_logits(**case).token_ids
    for rows in ([0], [3, 4], [4, 3, 2, 1, 0], [2] * 9):
        part = {key: value[rows] for key, value in case.items()}
        assert torch.equal(module.rejection_sample_from_logits(**part).token_ids, whole[rows])


@on_every_device
def test_bad_arguments_are_named(name, device):
    module = from_logits.get(name).load(device)
    case = to_device(make_logits_case(2, 3, 10), device)
    with pytest.raises(TypeError, match="temperature has dtype torch.float64; wanted"):
        module.rejection_sample_from_logits(
            **case, temperature=torch.ones(2, device=device).double()
        )
    with pytest.raises(ValueError, match="draft_logits and draft_probs were given"):
        module.rejection_sample_from_logits(**case, draft_probs=case["draft_logits"])
    with pytest.raises(ValueError, match="draft_logsumexp came without draft_logits"):
        bare = {**case, "draft_logits": None}
        module.rejection_sample_from_logits(
            **bare, draft_logsumexp=torch.zeros(2, 3, device=device).double()
        )
    with pytest.raises(ValueError, match=r"top_k has shape \[3\]; wanted \[2\]"):
        module.sample_from_logits(
            case["target_logits"][:, 0], top_k=torch.zeros(3, dtype=torch.int32, device=device)
        )
