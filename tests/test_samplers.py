import pytest
import torch

from src import oracle, philox, samplers
from tests.cases import make_case

EAGER = ["baseline", "vectorized", "cpp"]


def check(name, case):
    before = {key: value.clone() for key, value in case.items() if value is not None}
    output = samplers.get(name).load()(**case)
    problems = oracle.disagreements(*output, oracle.rejection_sample(**case))
    assert not problems, "\n".join(problems)
    assert output.token_ids.dtype == case["draft_token_ids"].dtype
    assert output.num_accepted.dtype == torch.int32
    for key, value in before.items():
        assert torch.equal(value, case[key]) or value.isnan().any(), f"{key} was changed"
    return output


@pytest.mark.parametrize("scale", [4.0, 0.1], ids=["peaked", "flat"])
@pytest.mark.parametrize("vocab_size", [2, 7, 128, 1000, 32003])
@pytest.mark.parametrize("spec_length", [1, 2, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_eager_samplers_emit_the_oracles_tokens(batch_size, spec_length, vocab_size, scale):
    if vocab_size == 32003 and batch_size * spec_length > 35:
        batch_size = 3  # the oracle's float64 copies of the largest shapes cost seconds each
    case = make_case(batch_size, spec_length, vocab_size, scale=scale)
    for name in EAGER:
        check(name, case)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_every_dtype_ragged_and_one_hot_emit_the_oracles_tokens(name, dtype, ids_dtype):
    case = make_case(7, 5, 1000, dtype=dtype)
    case["draft_token_ids"] = case["draft_token_ids"].to(ids_dtype)
    check(name, case)
    case["num_draft_tokens"] = torch.tensor([0, 1, 2, 3, 4, 5, 9], dtype=torch.int32)
    check(name, case)
    case["draft_token_ids"][5, 1] = -1
    case["draft_token_ids"][4, 0] = 1000
    case["draft_token_ids"][3, 1] = -7
    check(name, case)
    check(name, {**case, "draft_probs": None})


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("one_hot", [False, True])
def test_degenerate_rows_stay_inside_the_vocabulary(name, one_hot):
    case = make_case(8, 2, 100)
    p, q = case["target_probs"], case["draft_probs"]
    p[0] = 0
    p[1] = float("nan")
    p[2] = float("inf")
    q[3] = float("nan")
    p[4, :2] = q[4]  # the residual is zero, and every draft is accepted
    p[5] *= 1e-38
    q[5] *= 1e-38  # denormals
    p[6, :, 50:] = 0
    q[6, :, :50] = 0  # disjoint supports
    p[7] *= 1e20
    if one_hot:
        case["draft_probs"] = None
    output = check(name, case)
    assert output.token_ids.max() < 100
    assert (output.token_ids[0, 0], output.token_ids[1, 0]) == (0, 0)


@pytest.mark.parametrize("name", EAGER)
def test_p_equal_to_q_is_always_accepted_and_zero_target_never(name):
    case = make_case(4, 3, 50)
    case["uniforms"][:, :3] = 1 - 2**-24
    case["draft_probs"] = case["target_probs"][:, :3].clone() * 1e-42  # denormal
    case["target_probs"] = case["target_probs"] * 1e-42
    ids = case["draft_token_ids"] = case["draft_probs"].argmax(-1)
    assert check(name, case).num_accepted.tolist() == [3] * 4
    case["uniforms"][:] = 0
    case["target_probs"][:, :3].scatter_(-1, ids[..., None], 0.0)
    assert check(name, case).num_accepted.tolist() == [0] * 4


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("shape", [(0, 3, 10), (3, 0, 10), (2, 2, 1)])
def test_empty_batch_no_drafts_and_one_word_vocabulary(name, shape):
    output = check(name, make_case(*shape))
    assert output.token_ids.shape == (shape[0], shape[1] + 1)


@pytest.mark.parametrize("name", EAGER)
def test_strided_inputs_give_the_tokens_of_contiguous_ones(name):
    case = make_case(6, 4, 64)
    strided = dict(case)
    strided["draft_token_ids"] = case["draft_token_ids"].t().contiguous().t()
    strided["target_probs"] = case["target_probs"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(check(name, strided).token_ids, check(name, case).token_ids)
    strided["target_probs"] = case["target_probs"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"target_probs.contiguous\(\)"):
        samplers.get(name).load()(**strided)


@pytest.mark.parametrize("name", EAGER)
def test_a_seeded_row_does_not_depend_on_its_batch_mates(name):
    case = make_case(5, 4, 500)
    del case["uniforms"]
    case["seeds"], case["offsets"] = torch.arange(5) - 2, torch.arange(5) * 3
    sample = samplers.get(name).load()
    whole = sample(**case).token_ids
    for b in range(5):
        alone = sample(**{key: value[b : b + 1] for key, value in case.items()}).token_ids
        assert torch.equal(alone[0], whole[b])


@pytest.mark.parametrize("name", EAGER)
def test_the_generator_governs_and_advances(name):
    case = make_case(16, 4, 500)
    del case["uniforms"]
    sample = samplers.get(name).load()
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append((sample(**case).token_ids, sample(**case).token_ids))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_the_compiled_sampler_emits_the_oracles_tokens():
    for shape in [(3, 2, 128), (7, 5, 1000)]:
        check("vectorized-compiled", make_case(*shape))
    check("vectorized-compiled", {**make_case(3, 2, 128), "draft_probs": None})


def test_the_cpp_kernel_draws_the_published_stream():
    case = make_case(6, 4, 3000)
    seeds, offsets = torch.arange(6) * 2**33 - 5, torch.arange(6) * 7
    case["uniforms"] = torch.from_numpy(philox.uniforms(seeds.numpy(), offsets.numpy(), 5))
    given = check("cpp", case)
    del case["uniforms"]
    streamed = samplers.get("cpp").load()(**case, seeds=seeds, offsets=offsets)
    assert torch.equal(given.token_ids, streamed.token_ids)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_the_ends_of_the_cdf_draw_the_first_and_last_index_with_weight(u):
    case = make_case(1, 1, 40_000)
    case["draft_token_ids"][:] = 39_999
    case["target_probs"][:, 0, :100] = 0
    case["target_probs"][:, 0, 39_000:] = 0
    case["uniforms"][:] = u
    for name in EAGER:
        check(name, case)
