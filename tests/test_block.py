"""Block verification (Sun et al. 2024, arXiv:2403.10444)."""

import pytest
import torch
from scipy.stats import chisquare

from src import from_logits, oracle, samplers
from tests.cases import make_case, make_logits_case, on_every, ragged, to_device

on_every_device = on_every(["vectorized", "cpp"], ["vectorized", "cuda"])
# h is a quotient of float32 sums here, of float64 sums in the oracle.
EPSILON = 1e-5


def check(name, device, case):
    output = samplers.get(name).load(device)(**to_device(case, device), verification="block")
    output = type(output)(*(tensor.cpu() for tensor in output))
    expected = oracle.rejection_sample(**case, verification="block")
    problems = oracle.disagreements(*output, expected, EPSILON)
    assert not problems, "\n".join(problems)
    assert sum(margin < EPSILON for margin in expected.accept_margins) <= 1
    return output


@pytest.mark.parametrize("vocab_size", [2, 7, 600, 5003])
@pytest.mark.parametrize("batch_size, spec_length", [(1, 1), (7, 2), (16, 5), (4, 0), (3, 40)])
@on_every_device
def test_the_oracles_tokens(name, device, batch_size, spec_length, vocab_size):
    case = make_case(batch_size, spec_length, vocab_size)
    check(name, device, case)
    check(name, device, {**case, "draft_probs": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_device
def test_every_dtype_ragged_and_one_hot(name, device, dtype):
    case = ragged(make_case(7, 5, 1000, dtype=dtype))
    check(name, device, case)
    check(name, device, {**case, "draft_probs": None})


@on_every_device
def test_p_equal_to_q_is_always_accepted(name, device):
    case = make_case(4, 3, 50)
    case["uniforms"][:, :3] = 1 - 2**-24
    case["draft_probs"] = case["target_probs"][:, :3].clone()
    output = samplers.get(name).load(device)(**to_device(case, device), verification="block")
    assert output.num_accepted.tolist() == [3] * 4


@on_every_device
def test_a_prefix_that_the_target_gives_nothing_never_passes(name, device):
    case = make_case(1, 2, 3)
    case["draft_token_ids"][0] = torch.tensor([0, 1])
    case["target_probs"][0] = torch.tensor([0.0, 0.5, 0.5])
    case["draft_probs"][0] = torch.tensor([-5.0, 0.5, 0.5])  # its negative leaves a residual
    case["uniforms"][0] = 0.5
    output = check(name, device, case)
    assert output.num_accepted.tolist() == [0]


@on_every_device
def test_one_draft_is_verified_as_a_token_is(name, device):
    case = to_device(make_case(200, 1, 100), device)
    sample = samplers.get(name).load(device)
    for ours, token in zip(sample(**case, verification="block"), sample(**case), strict=True):
        assert torch.equal(ours, token)


@on_every_device
def test_no_fewer_drafts_are_accepted_than_token_by_token(name, device):
    case = to_device(make_case(2000, 6, 30), device)
    sample = samplers.get(name).load(device)
    block = sample(**case, verification="block").num_accepted.double()
    token = sample(**case).num_accepted.double()
    assert block.mean() > token.mean() + 0.05


@on_every_device
def test_the_papers_two_token_example(name, device):
    # Target (1/3, 2/3), draft (2/3, 1/3), two drafts: 10/9 accepted by token, 11/9 by block.
    draws = 40_000
    p, q = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3])
    g = torch.Generator().manual_seed(0)
    case = {
        "draft_token_ids": torch.multinomial(q, 2 * draws, True, generator=g).reshape(draws, 2),
        "draft_probs": q.expand(draws, 2, 2),
        "target_probs": p.expand(draws, 3, 2),
        "uniforms": torch.rand(draws, 3, generator=g),
    }
    case = to_device(case, device)
    sample = samplers.get(name).load(device)
    for verification, mean in (("token", 10 / 9), ("block", 11 / 9)):
        accepted = sample(**case, verification=verification).num_accepted.double()
        assert abs(accepted.mean().item() - mean) < 5 * accepted.std().item() / draws**0.5


def p_values(name, device, one_hot=False, fault=None):
    draws, vocab = 40_000, 6
    g = torch.Generator().manual_seed(1)
    p = torch.randn(4, vocab, generator=g).softmax(-1)
    q = (p[:3].log() + torch.randn(3, vocab, generator=g)).softmax(-1)
    ids = torch.stack([torch.multinomial(row, draws, True, generator=g) for row in q], dim=1)
    case = {
        "draft_token_ids": q.argmax(-1).expand(draws, 3) if one_hot else ids,
        "draft_probs": None if one_hot else q.expand(draws, 3, vocab),
        "target_probs": p.expand(draws, 4, vocab),
        "uniforms": torch.rand(draws, 4, generator=g),
    }
    if fault:
        fault(case)
    case = to_device(case, device)
    output = samplers.get(name).load(device)(**case, verification="block")
    tokens, result = output.token_ids.cpu(), []
    for column in range(3):
        counts = torch.bincount(tokens[:, column][tokens[:, column] >= 0], minlength=vocab)
        wanted = p[column].double() / p[column].double().sum() * counts.sum()
        result.append(chisquare(counts.double().numpy(), wanted.numpy()).pvalue)
    return result


@pytest.mark.parametrize("one_hot", [False, True])
@on_every_device
def test_the_first_three_tokens_follow_the_target(name, device, one_hot):
    assert min(p_values(name, device, one_hot)) > 1e-4


def one_uniform_for_all(case):
    case["uniforms"][:, :-1] = case["uniforms"][:, :1]


def pass_too_often(case):
    case["uniforms"][:, :-1] *= 0.9


@pytest.mark.parametrize("fault", [one_uniform_for_all, pass_too_often])
def test_a_planted_fault_fails_the_chi_square(fault):
    assert min(p_values("vectorized", "cpu", fault=fault)) < 1e-4


@pytest.mark.parametrize("drafts", ["logits", "one-hot"])
@on_every_device
def test_from_logits(name, device, drafts):
    case = make_logits_case(6, 5, 1500)
    if drafts == "one-hot":
        case["draft_logits"] = None
    temperature = torch.tensor([0.0, 1.0, 0.6, 1.7, 1.0, 0.8])
    top_k = torch.tensor([0, 0, 50, 9, 0, 1000], dtype=torch.int32)
    case |= {"temperature": temperature, "top_k": top_k}
    module = from_logits.get(name).load(device)
    arguments = to_device(case, device)
    output = module.rejection_sample_from_logits(**arguments, verification="block")
    expected = oracle.rejection_sample_from_logits(**case, verification="block")
    problems = oracle.disagreements(*(t.cpu() for t in output), expected, 3e-5)
    assert not problems, "\n".join(problems)


@on_every_device
def test_an_unknown_verification_is_named(name, device):
    with pytest.raises(ValueError, match="verification is 'chunk'; wanted 'token' or 'block'"):
        case = to_device(make_case(1, 1, 4), device)
        samplers.get(name).load(device)(**case, verification="chunk")
