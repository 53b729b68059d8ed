"""The CUDA kernels of a decoder layer for a few query tokens, one by one, against float64."""

import pytest
import torch

from src.cuda.fused_sampler import require

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
EPSILON = 1e-5
# One chunk for a block of 16 warps, less than one a warp, two a warp, and more than four.
WIDTHS = (64, 896, 2048, 4160)
TOKENS = (1, 3, 8, 9, 16)


@pytest.fixture(scope="module", autouse=True)
def extension():
    require("cuda")


def operators():
    return torch.ops.decoder_layer


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).bfloat16().cuda()


def normalized(x, norm):
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * norm.double()


def assert_near(got, exact, terms):
    """terms: the sum of absolute terms, each of which was rounded to bfloat16."""
    assert (got.double() - exact).abs().le(exact.abs() * 2**-8 + terms * 2**-8 + 1e-6).all()


def product(x, weights):
    """(x times the weights, transposed, the sum of absolute terms), in float64."""
    return x @ weights.double().t(), x.abs() @ weights.double().abs().t()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_added_to_the_residual(width, tokens):
    x, weights, residual = random(tokens, width), random(192, width), random(tokens, 192)
    exact, terms = product(x.double(), weights)
    exact += residual.double()
    operators().add(x, weights, residual)
    assert_near(residual, exact, terms)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_are_of_the_normalized_row(width, tokens):
    x, weights, norm = random(tokens, width, scale=3), random(320, width), random(width)
    logits = x.new_full((tokens, 320), torch.nan)
    operators().logits(x, norm, EPSILON, weights, logits)
    assert_near(logits, *product(normalized(x, norm), weights))


@pytest.mark.parametrize("later_bytes", [0, 1 << 30])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_half_of_the_rows_gates_the_other(width, tokens, later_bytes):
    x, norm = random(tokens, width, scale=3), random(width)
    weights = random(384, width, scale=width**-0.5)
    gated = x.new_full((tokens, 192), torch.nan)
    operators().gated(x, norm, EPSILON, weights, gated, weights, later_bytes)
    exact, terms = product(normalized(x, norm), weights)
    (gate, up), (gate_terms, up_terms) = exact.chunk(2, -1), terms.chunk(2, -1)
    # The slope of silu is at most 1.1.
    both = 1.1 * gate_terms * up.abs() + gate.abs() * up_terms
    assert_near(gated, torch.nn.functional.silu(gate) * up, both)


@pytest.mark.parametrize("ahead", [-1, 0, 5])
def test_tokens_are_embedded_at_their_positions(ahead):
    table, rotation = random(100, 192), random(64, 2, 128)
    ids = torch.arange(12).view(3, 4).cuda()[:, 1:3] * 9  # rows and columns are apart
    start = torch.tensor([0, 7, 40]).cuda()
    x, rotated = table.new_empty(6, 192), table.new_empty(6, 2, 128)
    positions = torch.empty((3, 2), dtype=torch.int64).cuda()
    operators().embed(ids, start, ahead, table, rotation, x, positions, rotated)
    wanted = (start[:, None] + ahead + torch.arange(2).cuda()).clamp(min=0)
    assert torch.equal(positions, wanted)
    assert torch.equal(x, table[ids.flatten()])
    assert torch.equal(rotated, rotation[wanted.flatten()])


def attention_inputs(batch_size, queries, heads, kv_heads, head_dim, capacity):
    query = random(batch_size * queries, heads * head_dim)
    cache = random(batch_size, capacity, 2 * kv_heads, head_dim)
    start = torch.arange(batch_size) * 37 + capacity // 3
    positions = (start[:, None] + torch.arange(queries)).cuda()
    return query, cache, positions


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("batch_size, queries", [(1, 1), (1, 4), (2, 3), (1, 16), (8, 2)])
def test_queries_keys_and_values_are_rotated_into_their_places(
    batch_size, queries, head_dim, has_bias
):
    heads, kv_heads, width, capacity = 6, 2, 384, 512
    query, cache, positions = attention_inputs(
        batch_size, queries, heads, kv_heads, head_dim, capacity
    )
    before = cache.clone()
    x, norm = random(len(query), width, scale=2), random(width)
    weights = random((heads + 2 * kv_heads) * head_dim, width, scale=width**-0.5)
    bias = random(len(weights)) if has_bias else None
    angle = torch.rand(capacity, head_dim // 2).repeat(1, 2).cuda()
    sign = torch.ones(head_dim).cuda()
    sign[: head_dim // 2] = -1
    rotation = torch.stack((angle.cos(), angle.sin() * sign), 1).bfloat16()
    rotated = rotation[positions.flatten()]
    operators().qkv(x, norm, EPSILON, weights, bias, rotated, positions, query, cache)

    exact, terms = product(normalized(x, norm), weights)
    if has_bias:
        exact += bias.double()
    exact, terms = (t.unflatten(-1, (-1, head_dim)) for t in (exact, terms))
    cos, sin = rotated.double().unsqueeze(2).unbind(1)

    def turn(values, sine):
        return values * cos + values.roll(head_dim // 2, -1) * sine

    turned = heads + kv_heads
    exact[:, :turned] = turn(exact[:, :turned], sin)
    terms[:, :turned] = turn(terms[:, :turned], sin.abs())
    assert_near(query.unflatten(-1, (heads, head_dim)), exact[:, :heads], terms[:, :heads])
    row = torch.arange(batch_size).cuda()[:, None]
    stored = cache[row, positions].flatten(0, 1)
    assert_near(stored, exact[:, heads:], terms[:, heads:])
    cache[row, positions] = before[row, positions]
    assert torch.equal(cache, before)  # no other slot was written


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "batch_size, queries, heads, kv_heads, capacity",
    [(1, 1, 3, 1, 3), (1, 1, 14, 2, 160), (2, 4, 6, 2, 300), (1, 16, 6, 1, 700), (4, 3, 8, 8, 192)],
)
def test_attention_is_over_the_slots_up_to_each_position(
    batch_size, queries, heads, kv_heads, capacity, head_dim
):
    query, cache, positions = attention_inputs(
        batch_size, queries, heads, kv_heads, head_dim, capacity
    )
    for row, ends in enumerate(positions):
        cache[row, int(ends[-1]) + 1 :] = torch.nan  # what is behind the last query is not read
    attended = torch.full_like(query, torch.nan)
    operators().attention(query, cache, positions, head_dim**-0.5, attended)

    q = query.double().view(batch_size, queries, heads, head_dim).transpose(1, 2)
    key, value = cache.double().nan_to_num().repeat_interleave(heads // kv_heads, 2).chunk(2, 2)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    seen = torch.arange(capacity).cuda() <= positions[:, None, :, None]
    score = (q @ key.transpose(2, 3) * head_dim**-0.5).masked_fill(~seen, -torch.inf)
    weight = score.softmax(-1)

    def flat(values):
        return values.transpose(1, 2).reshape(query.shape)

    assert_near(attended, flat(weight @ value), flat(weight @ value.abs()))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_gets_the_same_bits_whatever_is_beside_it(width):
    x, norm = random(16, width), random(width)
    weights, down = random(384, width, scale=width**-0.5), random(192, width)

    def results(x):
        logits, gated, residual = x.new_empty(len(x), 384), x.new_empty(len(x), 192), x[:, :192]
        residual = residual.repeat(1, 3)[:, :192].contiguous()
        operators().logits(x, norm, EPSILON, weights, logits)
        operators().gated(x, norm, EPSILON, weights, gated, weights, 0)
        operators().add(x, down, residual)
        return torch.cat((logits, gated, residual), 1)

    together = results(x)
    for first, count in ((0, 1), (5, 1), (3, 4), (8, 8), (2, 9)):
        alone = results(x[first : first + count].contiguous())
        assert torch.equal(alone, together[first : first + count])


def test_bad_arguments_are_named():
    x, weights, residual = random(2, 64), random(64, 64), random(2, 64)
    add = operators().add.default
    for arguments, name in (
        ((x.float(), weights, residual), "x does"),
        ((random(17, 64), weights, random(17, 64)), "x does"),
        ((x, random(64, 128), residual), "weights does"),
        ((x, random(65, 64), residual), "weights does"),
        ((x, weights, random(3, 64)), "residual does"),
        ((x, weights, random(64, 2).t()), "residual does"),
        ((x, weights, residual.cpu()), "residual does"),
    ):
        with pytest.raises(ValueError, match=name):
            add(*arguments)
