"""Tokens verified from logits follow the target's distribution; planted faults do not."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from src import from_logits, oracle
from tests.cases import on_every

DRAWS, VOCAB = 20_000, 12
ALPHA = 1e-4
FILTERS = {
    "plain": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
}
on_every_device = on_every(from_logits.names("cpu"), from_logits.names("cuda"))


def logits(spec_length, dtype):
    g = torch.Generator().manual_seed(5)
    target = 1.5 * torch.randn(spec_length + 1, VOCAB, generator=g)
    draft = target[:spec_length] + torch.randn(spec_length, VOCAB, generator=g)
    return target.to(dtype), draft.to(dtype)


def p_values(module, device, spec_length, dtype, drafts="logits", fault=None, **parameters):
    target, draft = logits(spec_length, dtype)
    rows = {
        name: torch.full((DRAWS,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in parameters.items()
    }
    one = {name: values[:1] for name, values in rows.items()}
    p = oracle.probabilities(target[None], **one)[0]
    q = torch.from_numpy(oracle.probabilities(draft[None], **one)[0])
    g = torch.Generator().manual_seed(6)
    ids = torch.stack([torch.multinomial(row, DRAWS, True, generator=g) for row in q], dim=1)
    if drafts == "one-hot":
        ids = q.argmax(-1).expand(DRAWS, -1)
    case = {
        "draft_token_ids": ids,
        "target_logits": target.expand(DRAWS, -1, -1),
        "draft_logits": draft.expand(DRAWS, -1, -1) if drafts == "logits" else None,
        "uniforms": torch.rand(DRAWS, spec_length + 1, generator=g),
        **rows,
    }
    if fault:
        fault(case)
    case = {name: v if v is None else v.to(device) for name, v in case.items()}
    tokens = module.rejection_sample_from_logits(**case).token_ids.cpu().numpy()
    result = []
    for column in range(min(2, spec_length + 1)):
        emitted = tokens[:, column][tokens[:, column] >= 0]
        counts = np.bincount(emitted, minlength=VOCAB)
        possible = p[column] > 0
        assert not counts[~possible].any()
        if possible.sum() > 1:
            wanted = p[column][possible] * counts.sum() / p[column].sum()
            result.append(chisquare(counts[possible], wanted).pvalue)
    return result


@pytest.mark.parametrize("drafts", ["logits", "one-hot"])
@pytest.mark.parametrize("which", FILTERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("spec_length, dtype", [(1, torch.float32), (3, torch.bfloat16)], ids=str)
@on_every_device
def test_the_first_two_tokens_follow_the_target(
    name, device, spec_length, dtype, temperature, which, drafts
):
    module = from_logits.get(name).load(device)
    options = {"temperature": temperature, **FILTERS[which]}
    assert min(p_values(module, device, spec_length, dtype, drafts, **options)) > ALPHA


@on_every_device
def test_five_drafts(name, device):
    module = from_logits.get(name).load(device)
    assert min(p_values(module, device, 5, torch.float32)) > ALPHA


def accept_always(case):
    case["uniforms"][:, :-1] = 0


def forget_the_temperature_of_the_draft(case):
    case["draft_logits"] = case["draft_logits"] * 0.5


def filter_only_the_draft(case):
    case["draft_logits"] = torch.where(case["draft_logits"] < 0, -torch.inf, case["draft_logits"])


@pytest.mark.parametrize(
    "fault", [accept_always, forget_the_temperature_of_the_draft, filter_only_the_draft]
)
def test_a_planted_fault_fails_the_chi_square(fault):
    module = from_logits.get("vectorized").load()
    assert min(p_values(module, "cpu", 1, torch.float32, fault=fault)) < ALPHA
