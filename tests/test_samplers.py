import pytest
import torch

from src import philox, samplers
from tests.cases import (
    COMPILED,
    check,
    degenerate_case,
    make_case,
    on_every_device,
    ragged,
    to_device,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("scale", [4.0, 0.1], ids=["peaked", "flat"])
@pytest.mark.parametrize("vocab_size", [2, 7, 128, 1000, 32003])
@pytest.mark.parametrize("spec_length", [1, 2, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
@on_every_device()
def test_every_sampler_emits_the_oracles_tokens(
    name, device, batch_size, spec_length, vocab_size, scale
):
    if vocab_size == 32003 and batch_size * spec_length > 35:
        batch_size = 3  # the oracle's float64 copies of the largest shapes cost seconds each
    check(name, device, make_case(batch_size, spec_length, vocab_size, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@on_every_device()
def test_every_dtype_ragged_and_one_hot_emit_the_oracles_tokens(name, device, dtype, ids_dtype):
    case = make_case(7, 5, 1000, dtype=dtype)
    case["draft_token_ids"] = case["draft_token_ids"].to(ids_dtype)
    check(name, device, case)
    case = ragged(case)
    check(name, device, case)
    check(name, device, {**case, "draft_probs": None})


@pytest.mark.parametrize("one_hot", [False, True])
@on_every_device()
def test_degenerate_rows_stay_inside_the_vocabulary(name, device, one_hot):
    case = degenerate_case(vocab_size=100)
    if one_hot:
        case["draft_probs"] = None
    output = check(name, device, case)
    assert output.token_ids.max() < 100
    assert (output.token_ids[0, 0], output.token_ids[1, 0]) == (0, 0)


@on_every_device()
def test_p_equal_to_q_is_always_accepted_and_zero_target_never(name, device):
    case = make_case(4, 3, 50)
    case["uniforms"][:, :3] = 1 - 2**-24
    case["draft_probs"] = case["target_probs"][:, :3].clone() * 1e-42  # denormal
    case["target_probs"] = case["target_probs"] * 1e-42
    ids = case["draft_token_ids"] = case["draft_probs"].argmax(-1)
    assert check(name, device, case).num_accepted.tolist() == [3] * 4
    case["uniforms"][:] = 0
    case["target_probs"][:, :3].scatter_(-1, ids[..., None], 0.0)
    assert check(name, device, case).num_accepted.tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(0, 3, 10), (3, 0, 10), (2, 2, 1)])
@on_every_device()
def test_empty_batch_no_drafts_and_one_word_vocabulary(name, device, shape):
    output = check(name, device, make_case(*shape))
    assert output.token_ids.shape == (shape[0], shape[1] + 1)


@on_every_device()
def test_strided_inputs_give_the_tokens_of_contiguous_ones(name, device):
    case = make_case(6, 4, 64)
    strided = dict(case)
    strided["draft_token_ids"] = case["draft_token_ids"].t().contiguous().t()
    strided["uniforms"] = case["uniforms"].t().contiguous().t()
    strided["target_probs"] = case["target_probs"].transpose(0, 1).contiguous().transpose(0, 1)
    expected = check(name, device, case)
    assert torch.equal(check(name, device, strided).token_ids, expected.token_ids)
    strided["target_probs"] = case["target_probs"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"target_probs.contiguous\(\)"):
        samplers.get(name).load(device)(**to_device(strided, device))


@on_every_device()
def test_a_seeded_row_depends_neither_on_its_batch_mates_nor_on_its_place(name, device):
    case = make_case(9, 4, 3000)
    del case["uniforms"]
    case["seeds"], case["offsets"] = torch.arange(9) - 2, torch.arange(9) * 3
    sample = samplers.get(name).load(device)
    case = to_device(case, device)
    whole = sample(**case).token_ids
    for rows in ([0], [8], [3, 4], [8, 7, 6, 5, 4, 3, 2, 1, 0], [2] * 40):
        part = sample(**{key: value[rows] for key, value in case.items()}).token_ids
        assert torch.equal(part, whole[rows])


@on_every_device()
def test_the_generator_governs_and_advances(name, device):
    case = make_case(16, 4, 500)
    del case["uniforms"]
    case = to_device(case, device)
    sample = samplers.get(name).load(device)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append((sample(**case).token_ids, sample(**case).token_ids))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    generator = torch.Generator(device).manual_seed(7)
    assert torch.equal(sample(**case, generator=generator).token_ids, draws[0][0])


@on_every_device(cpu=[], cuda=[COMPILED])
def test_the_compiled_sampler_emits_the_oracles_tokens_on_a_gpu(name, device):
    check(name, device, make_case(7, 5, 1000))


def test_the_compiled_sampler_emits_the_oracles_tokens():
    for shape in [(3, 2, 128), (7, 5, 1000)]:
        check(COMPILED, "cpu", make_case(*shape))
    check(COMPILED, "cpu", {**make_case(3, 2, 128), "draft_probs": None})


@on_every_device()
def test_every_sampler_draws_the_published_stream(name, device):
    case = make_case(6, 4, 3000)
    seeds, offsets = torch.arange(6) * 2**33 - 5, torch.arange(6) * 7
    case["uniforms"] = torch.from_numpy(philox.uniforms(seeds.numpy(), offsets.numpy(), 5))
    given = check(name, device, case)
    del case["uniforms"]
    case = to_device({**case, "seeds": seeds, "offsets": offsets}, device)
    assert torch.equal(samplers.get(name).load(device)(**case).token_ids.cpu(), given.token_ids)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
@on_every_device()
def test_the_ends_of_the_cdf_draw_the_first_and_last_index_with_weight(name, device, u):
    case = make_case(1, 1, 40_000)
    case["draft_token_ids"][:] = 39_999
    case["target_probs"][:, 0, :100] = 0
    case["target_probs"][:, 0, 39_000:] = 0
    case["uniforms"][:] = u
    check(name, device, case)
