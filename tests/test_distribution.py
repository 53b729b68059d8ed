"""The emitted tokens follow the target's distribution; planted faults do not."""

import pytest
import torch
from scipy.stats import chisquare

from src import samplers
from tests.cases import COMPILED, on_every_device

DRAWS, VOCAB = 40_000, 8
ALPHA = 1e-4


def draw_tokens(sample, device="cpu", draws=DRAWS):
    g = torch.Generator().manual_seed(1)
    p = torch.tensor([0.30, 0.05, 0.20, 0.02, 0.18, 0.10, 0.12, 0.03])
    q = torch.tensor([0.10, 0.25, 0.05, 0.20, 0.10, 0.10, 0.05, 0.15])
    second = p.flip(0)
    ids = torch.multinomial(q, 2 * draws, replacement=True, generator=g).reshape(draws, 2)
    target = torch.stack([p, second, p]).expand(draws, 3, VOCAB)
    uniforms = torch.rand(draws, 3, generator=g)
    q = q.expand(draws, 2, VOCAB)
    output = sample(*(t.to(device) for t in (ids, q, target)), uniforms=uniforms.to(device))
    return output.token_ids.cpu(), p, second


def p_values(sample, device="cpu", draws=DRAWS):
    tokens, p, second = draw_tokens(sample, device, draws)
    result = []
    for column, expected in ((0, p), (1, second)):
        emitted = tokens[:, column][tokens[:, column] >= 0]
        counts = torch.bincount(emitted, minlength=VOCAB).double()
        wanted = expected.double() / expected.double().sum() * counts.sum()
        result.append(chisquare(counts.numpy(), wanted.numpy()).pvalue)
    return result


@on_every_device(COMPILED)
def test_the_first_two_tokens_follow_the_target(name, device):
    # The loop waits for the card several times a token.
    draws = DRAWS // 10 if (name, device) == ("baseline", "cuda") else DRAWS
    assert min(p_values(samplers.get(name).load(device), device, draws)) > ALPHA


def accept_always(ids, q, p, *, uniforms):
    uniforms = uniforms.clone()
    uniforms[:, :-1] = 0
    return samplers.get("vectorized").load()(ids, q, p, uniforms=uniforms)


def swap_p_and_q(ids, q, p, *, uniforms):
    swapped = torch.cat([q, p[:, 2:]], dim=1)
    return samplers.get("vectorized").load()(ids, p[:, :2], swapped, uniforms=uniforms)


def recover_from_p(ids, q, p, *, uniforms):
    output = samplers.get("vectorized").load()(ids, q, p, uniforms=uniforms)
    last = output.num_accepted.long()[:, None]
    rows = p[torch.arange(len(p)), last[:, 0]].double().cumsum(-1)
    drawn = torch.searchsorted(rows, uniforms[:, -1:].double() * rows[:, -1:], right=True)
    return output._replace(token_ids=output.token_ids.scatter(1, last, drawn))


@pytest.mark.parametrize("fault", [accept_always, swap_p_and_q, recover_from_p])
def test_a_planted_fault_fails_the_chi_square(fault):
    assert min(p_values(fault)) < ALPHA
