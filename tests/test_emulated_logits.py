"""The logits kernels' own source on the CPU, against the C++ kernel bit for bit."""

import pytest
import torch

from src import from_logits
from tests import emulation
from tests.cases import make_logits_case
from tests.test_from_logits import PARAMETERS, parameters

pytestmark = pytest.mark.skipif(
    emulation.compiler() is None, reason="the emulation wants Linux and a C++ compiler"
)
# kernel, blocks, early exit
LAUNCHES = [("cluster", 1, False), ("cluster", 4, True), ("workspace", 1, False)]
LAUNCHES += [("workspace", 3, False)]
CLUSTERS = [("cluster", n, early_exit) for n in (1, 2, 4) for early_exit in (False, True)]


def check(case, launches=LAUNCHES, **options):
    expected = from_logits.get("cpp").load().rejection_sample_from_logits(**case, **options)
    for schedule, (kernel, blocks, early_exit) in enumerate(launches):
        launch = emulation.from_logits(kernel, blocks, schedule, early_exit)
        output, _ = launch(**case, **options)
        for ours, cpp in zip(output, expected, strict=True):
            assert torch.equal(ours, cpp), (kernel, blocks, early_exit)


def check_positions(case, **options):
    """A cluster a position, with and without early exit."""
    check(case, CLUSTERS, **options)


def check_positions_of_every_draft(case, **options):
    """Draft logits, the same with their sums, probabilities, and one-hot drafts."""
    check_positions(case, **options)
    temperature = options.get("temperature", torch.ones(1))
    scale = temperature.clamp(min=0.01)[:, None, None]
    scaled = case["draft_logits"].double() / scale
    check_positions({**case, "draft_logsumexp": scaled.logsumexp(-1)}, **options)
    without = {**case, "draft_logits": None}
    check_positions(without, **options)
    probs = scaled.softmax(-1).to(case["target_logits"].dtype)
    check_positions({**without, "draft_probs": probs}, **options)


@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("vocab_size", [2, 7, 1024, 2503])
def test_verification_emits_the_cpp_kernels_tokens_bit_for_bit(vocab_size, which):
    case = make_logits_case(4, 3, vocab_size)
    check(case, **parameters(which))
    check(case, **parameters(which), verification="block")
    check({**case, "draft_logits": None}, **parameters(which))


@pytest.mark.parametrize("dtype", emulation.DTYPES, ids=str)
def test_every_dtype_ragged_given_probabilities_and_given_sums(dtype):
    case = make_logits_case(4, 5, 1000, dtype=dtype)
    case["num_draft_tokens"] = torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    case["draft_token_ids"][2, 3] = -1
    case["draft_token_ids"][1, 0] = 1000
    sums = case["draft_logits"].double().logsumexp(-1)
    check({**case, "draft_logsumexp": sums})
    check({**case, "draft_logsumexp": sums, "top_k": torch.full((4,), 9, dtype=torch.int32)})
    probs = case.pop("draft_logits").softmax(-1)
    check({**case, "draft_probs": probs})


# Clusters of one and of four blocks walk with top-p.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [2, 1000, 2504])
@pytest.mark.parametrize("which", PARAMETERS)
def test_positions_emit_the_cpp_kernels_tokens_bit_for_bit(which, vocab_size, dtype):
    case = make_logits_case(4, 4, vocab_size, dtype=dtype)
    check_positions_of_every_draft(case, **parameters(which))


def test_positions_of_more_drafts_than_a_warp_has_lanes():
    case = make_logits_case(4, 70, 7)
    for b, equal in enumerate((0, 20, 50, 70)):  # drafts that are accepted whatever is drawn
        case["draft_logits"][b, :equal] = case["target_logits"][b, :equal]
    check_positions(case)
    check_positions(case, top_p=torch.full((4,), 0.9))


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_positions_whose_drafts_are_on_the_edge_of_what_filters_accept(factor):
    """Uniforms a little below and above p / q, drafts just inside and outside of the share kept:
    where the sums of whole rows would accept, and where what the filters leave does not."""
    size, length = 8, 2
    case = make_logits_case(size, length, 2504, dtype=torch.bfloat16)
    top_p = torch.tensor([0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1.0])
    rows = [case["target_logits"][:, :length], case["draft_logits"]]
    p, q = (from_logits.get("vectorized").load().log_probabilities(x, top_p=top_p) for x in rows)
    ranked, kept = rows[0].float().argsort(-1, descending=True), (p > -torch.inf).sum(-1)
    for outside in (0, 1):
        at = (kept - 1 + outside).clamp(max=2503)
        ids = ranked.gather(-1, at[..., None])[..., 0]
        ratio = (p - q).exp().gather(-1, ids[..., None])[..., 0]
        uniforms = case["uniforms"].clone()
        uniforms[:, :length] = (factor * ratio.nan_to_num(0.5)).clamp(1e-6, 1 - 2**-24)
        if outside:
            uniforms[:, :length] = 1e-6
        edge = {**case, "draft_token_ids": ids, "uniforms": uniforms, "top_p": top_p}
        launches = [("cluster", blocks, True) for blocks in (1, 2, 4)]
        check(edge, launches)
        check({**edge, "draft_logsumexp": kept_logsumexp(case["draft_logits"], top_p)}, launches)


def kept_logsumexp(logits, top_p):
    size, length, vocab_size = logits.shape
    drawn = (
        from_logits.get("cpp")
        .load()
        .sample_from_logits(
            logits.view(-1, vocab_size),
            uniforms=torch.zeros(size * length),
            top_p=top_p.repeat_interleave(length),
        )
    )
    return drawn.logsumexp.view(size, length)


@pytest.mark.parametrize("dtype", emulation.DTYPES, ids=str)
def test_positions_of_every_dtype_ragged_and_unaligned(dtype):
    case = make_logits_case(4, 5, 1003, dtype=dtype)
    case["num_draft_tokens"] = torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    case["draft_token_ids"][2, 3] = -1
    case["draft_token_ids"][3, 4] = -7
    case["draft_token_ids"][1, 0] = 1003
    check_positions_of_every_draft(case)
    # Drafts that are sure to be accepted, so that the later positions are reached.
    case["target_logits"][:, :5] = case["draft_logits"]
    check_positions_of_every_draft(case, temperature=torch.tensor([1.0, 0.7, 1.0, 1.3]))


def test_positions_whose_drafts_end_with_a_placeholder():
    """They draw from the target's row; a residual of draft and target would give another token."""
    case = make_logits_case(8, 3, 1000)
    case["draft_token_ids"][:, 1] = -1
    case["draft_token_ids"][0, 0] = -1
    check_positions_of_every_draft(case)


def test_positions_of_more_drafts_than_lanes_and_of_none():
    case = make_logits_case(2, 40, 600)
    case["target_logits"][:, :36] = case["draft_logits"][:, :36]
    check_positions(case)
    no_drafts = make_logits_case(3, 0, 1500)
    check_positions(no_drafts)


def nan_and_infinite_case():
    case = make_logits_case(6, 2, 700)
    p, q = case["target_logits"], case["draft_logits"]
    p[0] = float("nan")
    p[1] = -float("inf")
    p[2, :, 5] = float("inf")
    q[3] = float("nan")
    p[4, :, ::2] = float("nan")
    q[5] = p[5, :2]
    return case


def test_positions_of_nan_and_infinite_logits():
    temperature = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    check_positions_of_every_draft(nan_and_infinite_case())
    check_positions_of_every_draft(nan_and_infinite_case(), temperature=temperature)
    check_positions_of_every_draft(nan_and_infinite_case(), temperature=temperature.flip(0))


def test_positions_where_top_k_is_more_than_there_is():
    case = make_logits_case(4, 2, 1100)
    for rows in (case["target_logits"][1:], case["draft_logits"][::2]):
        rows[..., 9:] = -float("inf")  # then the filter drops nothing
    case["draft_token_ids"].clamp_(max=8)
    check_positions(case, top_k=torch.full((4,), 20, dtype=torch.int32))
    check_positions(
        case, top_k=torch.full((4,), 20, dtype=torch.int32), top_p=torch.full((4,), 0.8)
    )


def test_nan_and_infinite_logits():
    case = nan_and_infinite_case()
    check(case)
    check(
        case, **{**parameters("all"), **{k: v.repeat(2)[:6] for k, v in parameters("all").items()}}
    )


@pytest.mark.parametrize("which", PARAMETERS)
def test_sampling_gives_the_cpp_kernels_tokens_and_logsumexp(which):
    logits = make_logits_case(4, 0, 1500)["target_logits"]
    options, uniforms = parameters(which), torch.tensor([0.0, 0.3, 0.7, 1 - 2**-24])
    tokens, logsumexp = (
        from_logits.get("cpp").load().sample_from_logits(logits[:, 0], uniforms=uniforms, **options)
    )
    no_drafts = torch.empty((4, 0), dtype=torch.int64)
    for kernel, blocks, _ in LAUNCHES:
        output, ours = emulation.from_logits(kernel, blocks, sampling=True)(
            no_drafts, logits, uniforms=uniforms[:, None], **options
        )
        assert torch.equal(output.token_ids[:, 0], tokens), (kernel, blocks)
        assert torch.equal(ours, logsumexp), (kernel, blocks)


# top_k, top_p, min_p of a row; -1 stands for V - 1 and -2 for V.
FILTERS = [
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (-1, 1.0, 0.0),
    (-2, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 1 - 2**-20, 0.0),
    (50, 0.9, 0.02),
    (400, 0.7, 0.3),
    (0, 0.95, 0.05),
    (0, 1.0, 0.1),
]


def check_thresholds(logits, launch=("workspace", 1), temperature=1.0):
    """Every filter on one row; a row's logsumexp tells what was kept, to the bit."""
    vocab_size, count = len(logits), len(FILTERS)
    ranks = [{-1: vocab_size - 1, -2: vocab_size}.get(k, k) for k, _, _ in FILTERS]
    options = {
        "temperature": torch.full((count,), temperature),
        "top_k": torch.tensor(ranks, dtype=torch.int32),
        "top_p": torch.tensor([p for _, p, _ in FILTERS]),
        "min_p": torch.tensor([m for _, _, m in FILTERS]),
    }
    rows, uniforms = logits.repeat(count, 1), torch.linspace(0, 1 - 2**-24, count)
    tokens, logsumexp = (
        from_logits.get("cpp").load().sample_from_logits(rows, uniforms=uniforms, **options)
    )
    output, ours = emulation.from_logits(*launch, schedule=vocab_size, sampling=True)(
        torch.empty((count, 0), dtype=torch.int64),
        rows[:, None],
        uniforms=uniforms[:, None],
        **options,
    )
    assert ours.tolist() == logsumexp.tolist()
    assert torch.equal(output.token_ids[:, 0], tokens)


def filtered_row(kind, vocab_size):
    x = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    nan, infinity = float("nan"), float("inf")
    return {
        "peaked": lambda: 4 * x,
        "flat": lambda: 0.1 * x,
        "equal": lambda: torch.full((vocab_size,), 1.5),
        "around zero": lambda: x.round().clamp(-1, 1),
        "ties": lambda: (2 * x).round(),
        "coarse": lambda: (4 * x + 12).bfloat16(),
        "half": lambda: (3 * x).half(),
        "few": lambda: torch.where(x > 1.5, x, -infinity),
        "nan": lambda: torch.where(x > 0, x, nan),
        "nothing": lambda: torch.full((vocab_size,), nan),
        "infinite": lambda: torch.where(x > 2, infinity, x),
        "far apart": lambda: torch.where(x > 0, 3e38, -3e38) * x.abs().clamp(max=1),
        # Less than a share of 0.01, and nothing beside it where a search for that looks first.
        "one above": lambda: torch.cat([torch.tensor([3.0]), 0.2 * x[1:]]),
    }[kind]()


KINDS = ["peaked", "flat", "equal", "around zero", "ties", "coarse", "half", "few"]
KINDS += ["nan", "nothing", "infinite", "far apart", "one above"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [300, 4003])
def test_thresholds_keep_what_the_cpp_kernel_keeps(vocab_size, kind):
    check_thresholds(filtered_row(kind, vocab_size))


@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "ties", "coarse"])
def test_thresholds_of_rows_that_overflow_the_list(kind):
    check_thresholds(filtered_row(kind, 20008))


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("kind", ["peaked", "ties"])
def test_thresholds_found_by_the_blocks_of_a_cluster(kind, blocks):
    check_thresholds(filtered_row(kind, 4003), launch=("cluster", blocks))


@pytest.mark.parametrize("temperature", [0.01, 0.7, 50.0])
def test_thresholds_at_other_temperatures(temperature):
    check_thresholds(filtered_row("peaked", 4003), temperature=temperature)


@pytest.mark.parametrize("count", [3, 8, 32])
def test_weights_kept_of_a_tile_are_added_in_its_order(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        places = torch.randperm(512, generator=generator)[:count].int()
        weights = torch.rand(count, generator=generator).exp()
        sums = torch.zeros(512)
        sums[places.long()] = weights
        sums = sums[:256] + sums[256:]
        while sums.numel() > 1:
            sums = sums[0::2] + sums[1::2]
        assert torch.equal(emulation.sum_of_leaves(weights, places), sums[0])


def test_positions_that_keep_more_than_a_warps_list_has_room_for():
    case = make_logits_case(2, 1, 20000, dtype=torch.bfloat16)
    for name in ("target_logits", "draft_logits"):
        case[name] *= 0.1
    check(case, [("cluster", 1, False)], top_p=torch.full((2,), 0.95))
