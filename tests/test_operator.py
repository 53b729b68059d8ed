"""The extension as a PyTorch operator: schema, fake kernel, torch.compile, missing builds."""

import pytest
import torch

from src import from_logits, samplers
from src.contract import VERIFICATIONS, SamplerOutput
from src.cuda import fused_sampler
from tests.cases import (
    flatten,
    make_case,
    make_logits_case,
    more_drafts_than_most,
    on_every_device,
    ragged,
    to_device,
)

OPERATORS = {
    "cpp": "rejection_sample",
    "cuda": "rejection_sample",
    "cuda-thread-per-row": "rejection_sample_thread_per_row",
}
on_every_extension = on_every_device(cpu=["cpp"], cuda=["cuda", "cuda-thread-per-row"])
EXTENSION = {"cpu": "cpp", "cuda": "cuda"}
on_both_layouts = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def positional(case):
    names = ("draft_token_ids", "draft_probs", "target_probs", "num_draft_tokens", "uniforms")
    return (*(case.get(name) for name in names), None, None, None)


@on_every_extension
def test_opcheck_passes(name, device):
    operator = getattr(torch.ops.fused_rejection, OPERATORS[name]).default
    for case in (make_case(3, 4, 600), ragged(make_case(7, 5, 100, dtype=torch.bfloat16))):
        torch.library.opcheck(operator, positional(to_device(case, device)))


@on_both_layouts
def test_opcheck_passes_for_out_and_the_flattened_layout(device):
    case = to_device(make_case(3, 4, 600), device)
    out = samplers.get(EXTENSION[device]).load(device)(**case)
    operators = torch.ops.fused_rejection
    torch.library.opcheck(operators.rejection_sample_out.default, (*positional(case), False, *out))
    flat = to_device(flatten(ragged(make_case(7, 5, 100))), device)
    arguments = (*flat.values(), None, None, None)
    torch.library.opcheck(operators.rejection_sample_flattened.default, arguments)


@on_both_layouts
def test_opcheck_passes_for_logits(device):
    from_logits.get(EXTENSION[device]).load(device)
    case = to_device(make_logits_case(3, 4, 600), device)
    temperature = torch.tensor([0.0, 1.0, 0.7], device=device)
    top_k = torch.tensor([0, 5, 50], dtype=torch.int32, device=device)
    ids, target, draft, uniforms = case.values()
    parameters = (temperature, top_k, None, None)
    operators = torch.ops.fused_rejection
    torch.library.opcheck(
        operators.rejection_sample_from_logits.default,
        (ids, target, draft, None, None, *parameters, None, uniforms, None, None, None),
    )
    torch.library.opcheck(
        operators.sample_from_logits.default,
        (target[:, 0], *parameters, uniforms[:, 0], None, None, None),
    )


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_both_layouts
def test_the_flattened_layout_gives_the_padded_ones_tokens(device, dtype, one_hot):
    samplers.get(EXTENSION[device]).load(device)
    case = ragged(make_case(7, 5, 1000, dtype=dtype))
    if one_hot:
        case["draft_probs"] = None
    padded = samplers.get("cpp").load()(**case)
    flat = fused_sampler.rejection_sample_flattened(**to_device(flatten(case), device))
    for ours, expected in zip(flat, padded, strict=True):
        assert torch.equal(ours.cpu(), expected)


@on_both_layouts
def test_the_flattened_layout_survives_ends_that_are_wrong(device):
    samplers.get(EXTENSION[device]).load(device)
    flat = flatten(ragged(make_case(7, 5, 100)))
    for ends in ([-5, 1, 900, 3, -1, 10_000, 2], [2**31 - 1] * 7, [-(2**31)] * 7, [0] * 7):
        flat["cu_num_draft_tokens"] = torch.tensor(ends, dtype=torch.int32)
        output = fused_sampler.rejection_sample_flattened(**to_device(flat, device))
        assert output.token_ids.max() < 100 and output.token_ids[:, 0].min() >= 0
    with pytest.raises(ValueError, match=r"bonus_probs has shape \[7, 100\]; wanted \[6, 100\]"):
        flat["cu_num_draft_tokens"] = flat["cu_num_draft_tokens"][:6]
        fused_sampler.rejection_sample_flattened(**{**to_device(flat, device), "uniforms": None})


@pytest.mark.parametrize("verification", VERIFICATIONS)
@on_both_layouts
def test_of_more_drafts_than_the_most_the_extra_token_is_the_targets(device, verification):
    samplers.get(EXTENSION[device]).load(device)
    flat = to_device(more_drafts_than_most(), device)
    output = fused_sampler.rejection_sample_flattened(**flat, verification=verification)
    assert output.token_ids.tolist() == [[0, 1], [3, 2]]
    assert output.num_accepted.tolist() == [1, 1]
    flat.update(max_spec_length=0, uniforms=flat["uniforms"][:, :1])
    output = fused_sampler.rejection_sample_flattened(**flat, verification=verification)
    assert output.token_ids.tolist() == [[0], [3]]


@on_both_layouts
def test_out_is_written_in_place_and_checked(device):
    sample = samplers.get(EXTENSION[device]).load(device)
    case = to_device(make_case(3, 4, 600), device)
    expected = sample(**case)
    out = SamplerOutput(*(torch.full_like(tensor, -77) for tensor in expected))
    result = sample(**case, out=out)
    assert result.token_ids is out.token_ids and torch.equal(out.token_ids, expected.token_ids)
    assert torch.equal(out.num_accepted, expected.num_accepted)
    wrong = out._replace(token_ids=out.token_ids[:, :4])
    with pytest.raises(ValueError, match=r"out has token_ids \[3, 4\] .*; wanted .* \[3, 5\]"):
        sample(**case, out=wrong)


@on_every_extension
def test_a_compiled_caller_gets_the_eager_tokens_without_a_graph_break(name, device):
    sample = samplers.get(name).load(device)

    def step(ids, q, logits, uniforms):
        output = sample(ids, q, logits.softmax(-1), uniforms=uniforms)
        return output.token_ids + 1, output.num_accepted

    case = to_device(make_case(3, 4, 600), device)
    arguments = (case["draft_token_ids"], case["draft_probs"], case["target_probs"].log())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        compiled(*arguments, case["uniforms"]), step(*arguments, case["uniforms"]), strict=True
    ):
        assert torch.equal(ours, eager)


@on_every_extension
def test_a_bad_argument_gets_the_contracts_sentence(name, device):
    sample = samplers.get(name).load(device)
    case = to_device(make_case(2, 3, 10), device)
    bad = {
        "draft_probs": case["draft_probs"][:, :, :9],
        "uniforms": case["uniforms"].double(),
        "num_draft_tokens": torch.zeros(3, dtype=torch.int32, device=device),
        "seeds": torch.zeros(2, dtype=torch.int64, device=device),
        "target_probs": case["target_probs"].double(),
        "draft_token_ids": case["draft_token_ids"].float(),
    }
    for argument, value in bad.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{argument} .*; wanted"):
            sample(**{**case, argument: value})
    with pytest.raises(TypeError, match="target_probs is a list; wanted a torch.Tensor"):
        sample(**{**case, "target_probs": [0.5]})


def test_a_sampler_that_cannot_run_here_says_why_and_what_mends_it(monkeypatch):
    with pytest.raises(samplers.SamplerUnavailable, match="cpp runs on cpu, not on cuda"):
        samplers.get("cpp").load("cuda")
    if not torch.cuda.is_available():
        with pytest.raises(samplers.SamplerUnavailable, match="CUDA") as error:
            samplers.get("cuda").load("cuda")
        assert error.value.command
    monkeypatch.setattr(fused_sampler, "_MODULE", None)
    monkeypatch.setattr(fused_sampler, "_REASON", "the extension was built for torch 1.0.0")
    with pytest.raises(samplers.SamplerUnavailable, match="torch 1.0.0") as error:
        samplers.get("cpp").load("cpu")
    assert "setup.py build_ext --inplace" in error.value.command
