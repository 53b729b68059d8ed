"""Block verification and the samplers of logits over inputs that nobody would write down
(tests/strategies.py, tests/logits_strategies.py): invariants, and the oracle's tokens."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src import from_logits, oracle, samplers
from src.contract import MAX_WEIGHT, SampledTokens, SamplerOutput
from tests import emulation, logits_strategies, strategies
from tests.cases import on_every
from tests.logits_strategies import PARAMETERS, sampling_cases
from tests.strategies import bits
from tests.test_block import EPSILON as BLOCK_EPSILON
from tests.test_properties import assert_invariants, run

on_every_block_device = on_every(["vectorized", "cpp"], ["vectorized", "cuda"])
on_every_device = on_every(from_logits.names("cpu"), from_logits.names("cuda"))
LEAST_FLOAT = 2.0**-126  # samplers' probabilities are float32: smaller ones may be 0 there
LEAST_DOUBLE = 1e-300  # and the oracle's float64
# The kernels know a row by its logsumexp in float64, which has no digits left for what is beside so
# large a logit, an infinite one among them: a draft is then accepted too often, or never.
LARGEST_LOGIT = 2.0**30
KERNELS = ("cpp", "cuda")
MANY = 40  # times the few requests of a case: more positions than a card has multiprocessors


class Truth(NamedTuple):
    """What the oracle makes of a case from logits, with what a test of it has to know."""

    p: np.ndarray  # [B, K+1, V]
    q: np.ndarray | None  # [B, K, V]
    kept_p: np.ndarray  # bool: what the filters leave, also where p underflows
    kept_q: np.ndarray | None
    edge: np.ndarray  # [B] bool: a filter's edge is within rounding of a token
    huge: np.ndarray  # [B, K] bool: a logit of either side is beyond LARGEST_LOGIT
    output: oracle.OracleOutput


def truth_of(case, verification):
    options = {name: case[name] for name in PARAMETERS}
    rows, q = [case["target_logits"]], None
    if case["draft_probs"] is not None:
        q = case["draft_probs"].double().numpy()
    if case["draft_logits"] is not None:
        q = oracle.probabilities(case["draft_logits"], **options)
        rows.append(case["draft_logits"])
    p = oracle.probabilities(case["target_logits"], **options)
    loose = [kept(x, options, oracle.CDF_EPSILON) for x in rows]
    tight = [kept(x, options, -oracle.CDF_EPSILON) for x in rows]
    edge = sum((a != b).any((1, 2)) for a, b in zip(loose, tight, strict=True)) > 0
    rest = {"num_draft_tokens": case["num_draft_tokens"], "verification": verification}
    with np.errstate(invalid="ignore"):  # 0 * inf
        output = oracle.rejection_sample(
            case["draft_token_ids"], q, p, uniforms=case["uniforms"], **rest
        )
    kept_q = loose[1] if len(loose) > 1 else None
    return Truth(p, q, loose[0], kept_q, edge, huge_logits(case), output)


def huge_logits(case):
    sides = [case["target_logits"][:, : case["draft_token_ids"].shape[1]]]
    if case["draft_logits"] is not None:
        sides.append(case["draft_logits"])
    t = torch.ones(len(case["uniforms"]))
    if case["temperature"] is not None:
        t = torch.where(case["temperature"] > 0, case["temperature"], 1.0)
    largest = torch.stack([x.double().nan_to_num(0, math.inf, 0).amax(-1) for x in sides])
    return (largest.abs().amax(0) / t[:, None] > LARGEST_LOGIT).numpy()


def kept(logits, options, looser):
    """[B, N, V] bool: what oracle.probabilities gives a share, however small, where the edges of
    top-p and min-p are moved outwards by a share `looser`."""
    x = logits.double().nan_to_num(-math.inf, torch.finfo(torch.float32).max, -math.inf)
    largest = x.amax(-1, keepdim=True)
    x = torch.where(largest > -math.inf, x - largest, -math.inf)
    if options["temperature"] is None:
        floor = torch.full_like(largest, -600.0)
    else:
        t = options["temperature"].double()[:, None, None]
        floor = -600.0 * torch.where(t > 0, t, 1.0)
    x = torch.where(x > -math.inf, x.maximum(floor), x)
    moved = dict(options)
    if options["top_p"] is not None:
        p = options["top_p"].double()
        moved["top_p"] = torch.where(p < 1, p * (1 + looser), p)
    if options["min_p"] is not None:
        p = options["min_p"].double()
        moved["min_p"] = (p * (1 - looser)).clamp(max=1)
    return oracle.probabilities(x, **moved) > 0


def length_of(case, b):
    """How many drafts request b has."""
    ids = case["draft_token_ids"][b].tolist()
    length = len(ids)
    if case["num_draft_tokens"] is not None:
        length = min(max(int(case["num_draft_tokens"][b]), 0), length)
    return ids.index(-1, 0, length) if -1 in ids[:length] else length


def one_hot(ids, vocab_size):
    return (np.arange(vocab_size) == ids[..., None]).astype(np.float64)


def assert_support(case, output, p, q=None):
    """Of assert_invariants what does not depend on how drafts are verified. q: where it is negative
    the contract takes p - q as it comes."""
    q = torch.zeros(p.shape)[:, :-1] if q is None else q.clamp(max=0)
    u = torch.ones(case["uniforms"].shape)
    assert_invariants({**case, "target_probs": p, "draft_probs": q, "uniforms": u}, output)


def least_and_most(low, high, p, q, share):
    """The total of max(reach p - q, 0) between reach `low` and `high`, where each of p and q may be
    off by a share, and each weight by the least float32."""
    with np.errstate(invalid="ignore"):
        least = low * p * (1 - share) - q * (1 + share) - 2.0**-149
        most = high * p * (1 + share) - q * (1 - share)
    most = np.where(most > 0, most + 2.0**-149, 0.0)
    return tuple(np.where(x > 0, np.minimum(x, MAX_WEIGHT), 0.0).sum() for x in (least, most))


def slack(least, most, epsilon):
    """How far the edges of a draw may move, as a share of the total: a residual that is as small as
    what p and q are off by has no edges, and one that may be 0 leaves p to draw from."""
    if most == 0:
        return epsilon
    return max(epsilon, (most - least) / least) if least > 0 else math.inf


def slack_of_block(ids, q, p, u, share, of_quotients, epsilon):
    """The slack of the draw that block verification ends with, or None where the verdict on a
    prefix is the other one if each of p and q is off by a share, and p / q by another."""
    low, high = [1.0], [1.0]
    for k, x in enumerate(ids):
        p_x, q_x = (row[x] if 0 <= x < len(row) else np.nan for row in (p[k], q[k]))
        for reach, by in ((low, 1 - of_quotients), (high, 1 + of_quotients)):
            with np.errstate(invalid="ignore"):  # 0 * inf
                step = reach[-1] * p_x * by
            reach.append(0.0 if not step > 0 else 1.0 if not q_x > 0 else min(step / q_x, 1.0))
    for i in range(len(ids), -1, -1):
        least, most = low[i], high[i]
        if i < len(ids):
            totals = least, most = least_and_most(low[i], high[i], p[i], q[i], share)
            least = 1.0 if low[i] == 1 else least / (least + 1 - low[i])
            most = 1.0 if high[i] == 1 else most / (most + 1 - high[i])
        if i == 0 or u[i - 1] < least * (1 - epsilon):
            return slack(*totals, epsilon) if i < len(ids) else epsilon
        if not u[i - 1] >= most * (1 + epsilon):
            return None
    raise AssertionError("the empty prefix is always accepted")


def disagreements(output, expected, slacks):
    """oracle.disagreements of the requests that have a slack, with it, whatever the margin."""
    problems = []
    for b, epsilon in enumerate(slacks):
        if epsilon is not None:
            row = oracle.OracleOutput(*(values[b : b + 1] for values in expected))
            row = row._replace(accept_margins=[math.inf])
            found = oracle.disagreements(*(x[b : b + 1] for x in output), row, epsilon)
            problems += [f"{b}: {line} (slack {epsilon})" for line in found]
    return problems


# ---- Block verification from probabilities.


def block_slacks(case):
    """What of a case the oracle is sure of. From probabilities every sampler has the quotients in
    float64, but in an order of its own. A draft row is a distribution: where an entry is negative,
    a prefix that the target gives nothing has a residual, and may pass; where it is infinite, a
    quotient is NaN."""
    ids, u, p = (
        case[name].double().numpy() for name in ("draft_token_ids", "uniforms", "target_probs")
    )
    q = one_hot(ids, p.shape[2])
    if case["draft_probs"] is not None:
        q = case["draft_probs"].double().numpy()
    for b in range(len(ids)):
        length = length_of(case, b)
        if (q[b, :length] < 0).any() or np.isinf(q[b, :length]).any():
            yield None
        else:
            yield slack_of_block(
                ids[b, :length].astype(np.int64), q[b], p[b], u[b], 0, 1e-12, BLOCK_EPSILON
            )


def p_is_not_less(case, b, k):
    x, (p, q) = int(case["draft_token_ids"][b, k]), (case["target_probs"], case["draft_probs"])
    if not 0 <= x < p.shape[2]:
        return False
    q_x = 1.0 if q is None else q[b, k, x].item()
    return p[b, k, x].item() >= q_x > 0 and math.isfinite(q_x)


@on_every_block_device
@given(drawn=strategies.cases())
def test_block_verification_keeps_the_invariants_and_emits_the_oracles_tokens(name, device, drawn):
    case, layouts = drawn

    def sample(**arguments):
        return samplers.get(name).load(device)(**arguments, verification="block")

    output = run(sample, case, layouts, device)
    p, q = case["target_probs"].double(), case["draft_probs"]
    assert_support(case, output, p, None if q is None else q.double())
    for b, accepted in enumerate(output.num_accepted.tolist()):
        length = length_of(case, b)
        passes = (p_is_not_less(case, b, k) for k in range(length))
        assert accepted == length or not all(passes), "rejected although p >= q at every draft"
    names = ("draft_token_ids", "draft_probs", "target_probs", "num_draft_tokens", "uniforms")
    with np.errstate(invalid="ignore"):
        expected = oracle.rejection_sample(
            **{name: case[name] for name in names}, verification="block"
        )
    slacks = list(block_slacks(case))
    problems = disagreements(output, expected, slacks)
    assert not problems, "\n".join(problems)


@on_every_block_device
@given(drawn=strategies.cases(max_batch_size=6), order=st.randoms(use_true_random=False))
def test_a_row_of_block_verification_depends_neither_on_its_batch_mates_nor_on_its_place(
    name, device, drawn, order
):
    case, layouts = drawn

    def sample(**arguments):
        return samplers.get(name).load(device)(**arguments, verification="block")

    assert_rows_stand_alone(lambda part: run(sample, part, layouts, device), case, order)


def assert_rows_stand_alone(sample, case, order, floats_differ_by=0.0):
    """floats_differ_by: relative; 0 is to the bit."""
    batch_size = len(case["uniforms"])
    if batch_size == 0:
        return
    whole = sample(case)
    rows = [order.randrange(batch_size) for _ in range(order.randint(1, 7))]
    part = {key: None if value is None else value[rows] for key, value in case.items()}
    for ours, wanted in zip(sample(part), whole, strict=True):
        if floats_differ_by and ours.is_floating_point():
            assert np.allclose(ours, wanted[rows], rtol=floats_differ_by, atol=floats_differ_by)
        else:
            assert torch.equal(bits(ours), bits(wanted[rows]))


@pytest.mark.parametrize("q", [math.nan, math.inf, -1.0])
@on_every_block_device
def test_no_draft_passes_behind_one_outside_the_vocabulary_whatever_its_q(name, device, q):
    # Found by the properties: NaN in the quotients once let every prefix pass.
    ids, p = torch.tensor([[0, 1, 0]]), torch.ones(1, 4, 1)
    rows = torch.tensor([[[q], [1.0], [1.0]]])
    u = torch.full((1, 4), 0.5)
    arguments = (x.to(device) for x in (ids, rows, p))
    sample = samplers.get(name).load(device)
    output = sample(*arguments, uniforms=u.to(device), verification="block")
    assert output.num_accepted.item() <= 1


# ---- Verification from logits.


def verify(name, device, case, layouts, drafts, verification):
    """run, with the drafts' logsumexp where they come with it: what the sampler gave for them."""
    module = from_logits.get(name).load(device)
    if drafts == "sums":
        case = {**case, "draft_logsumexp": sums_of(module, case, device)}

    def sample(**arguments):
        return module.rejection_sample_from_logits(**arguments, verification=verification)

    return run(sample, case, layouts, device)


def sums_of(module, case, device):
    batch_size, spec_length, vocab_size = case["draft_logits"].shape
    options = {name: case[name] for name in PARAMETERS if case[name] is not None}
    options = {name: x.repeat_interleave(spec_length).to(device) for name, x in options.items()}
    rows = case["draft_logits"].reshape(batch_size * spec_length, vocab_size).to(device)
    return module.sample_from_logits(rows, **options).logsumexp.cpu().view(batch_size, spec_length)


def must_pass(case, truth, b, k, knows_huge):
    """Whether the test of draft k must pass, whatever the uniform: p >= q > 0, by more than p and q
    may be off by, or because the rows are the same."""
    x = int(case["draft_token_ids"][b, k])
    if not 0 <= x < truth.p.shape[2] or truth.edge[b] or not truth.kept_p[b, k, x]:
        return False
    p_x = truth.p[b, k, x]
    if p_x < LEAST_FLOAT:
        return False
    if case["draft_logits"] is not None:
        p, q = case["target_logits"][b, k], case["draft_logits"][b, k]
        if torch.equal(bits(p), bits(q)):
            return True
    if truth.huge[b, k] and not knows_huge:
        return False
    q_x = 1.0 if truth.q is None else truth.q[b, k, x]
    return bool(p_x * (1 - oracle.LOGITS_EPSILON) >= q_x)


def assert_logits_invariants(name, case, output, truth, verification):
    knows = name not in KERNELS
    assert_support(case, output, torch.from_numpy(truth.kept_p).double())
    for b, accepted in enumerate(output.num_accepted.tolist()):
        length = length_of(case, b)
        assert accepted <= length
        if accepted < length and verification == "token":
            assert not must_pass(case, truth, b, accepted, knows), "rejected although p >= q"
        if accepted < length and verification == "block":
            passes = (must_pass(case, truth, b, k, knows) for k in range(length))
            assert not all(passes), "rejected although p >= q at every draft"


def logits_slacks(name, case, truth, verification):
    """What of a case the oracle is sure of, given that samplers' probabilities are of float32
    exponentials."""
    ids = case["draft_token_ids"].long().numpy()
    q = one_hot(ids, truth.p.shape[2]) if truth.q is None else truth.q
    u = case["uniforms"].double().numpy()
    slack_of = {"token": slack_of_tokens, "block": slack_of_block_from_logits}[verification]
    for b in range(len(ids)):
        length = length_of(case, b)
        tested = length
        if verification == "token":
            tested = min(length, int(truth.output.num_accepted[b]) + 1)
        unsure = truth.edge[b] or is_odd_for_greedy(case, b, q[b, :tested])
        if unsure or (name in KERNELS and truth.huge[b, :tested].any()):
            yield None
        else:
            yield slack_of(case, truth, b, ids[b, :length], q[b], u[b])


def is_odd_for_greedy(case, b, q):
    """A greedy request's tokens are its rows' first argmax, whatever the draft: a q that is no
    probability can reject one by the oracle, which then draws the same token."""
    greedy = case["temperature"] is not None and case["temperature"][b] <= 0
    return greedy and case["draft_probs"] is not None and not ((q >= 0) & (q <= 1)).all()


def is_far_down(case, truth, b, k, x, least):
    """Whether p or q of draft k is so small that a sampler, or the oracle, may have 0 for it."""
    sides = [(truth.kept_p, truth.p)]
    if case["draft_logits"] is not None:
        sides.append((truth.kept_q, truth.q))
    inside = 0 <= x < truth.p.shape[2]
    return inside and any(rows[b, k, x] and p[b, k, x] < least for rows, p in sides)


def slack_of_tokens(case, truth, b, ids, q, u):
    output = truth.output
    accepted, margin = int(output.num_accepted[b]), output.accept_margins[b]
    tested = ids[: accepted + 1]
    # With logits on both sides the test is in log space, whose float32 are off by a share of it.
    least = LEAST_DOUBLE if case["draft_logits"] is not None else LEAST_FLOAT
    if any(is_far_down(case, truth, b, k, x, least) for k, x in enumerate(tested)):
        return None
    inside = [(k, x) for k, x in enumerate(tested) if 0 <= x < truth.p.shape[2]]
    smallest = [p[k, x] for k, x in inside for p in (truth.p[b], q) if p[k, x] > 0]
    exponent = -math.log(min([1.0, *smallest]))
    if margin < oracle.LOGITS_EPSILON * max(1.0, exponent / 88):
        return None
    if accepted == len(ids) or is_same_row(case, b, accepted):
        return oracle.LOGITS_EPSILON
    rows = truth.p[b, accepted], q[accepted]
    return slack(*least_and_most(1.0, 1.0, *rows, oracle.CDF_EPSILON), oracle.LOGITS_EPSILON)


def is_same_row(case, b, k):
    """Whether both sides have the same logits: there is no residual then, to the bit."""
    if case["draft_logits"] is None:
        return False
    return torch.equal(bits(case["target_logits"][b, k]), bits(case["draft_logits"][b, k]))


def slack_of_block_from_logits(case, truth, b, ids, q, u):
    if any(is_far_down(case, truth, b, k, x, LEAST_FLOAT) for k, x in enumerate(ids)):
        return None
    if np.isinf(q[: len(ids)]).any():
        return None
    share = oracle.CDF_EPSILON
    return slack_of_block(ids, q, truth.p[b], u, share, 2 * share, BLOCK_EPSILON)


@pytest.mark.parametrize("verification", ["token", "block"])
@on_every_device
@given(drawn=logits_strategies.cases())
def test_verification_keeps_the_invariants_and_emits_the_oracles_tokens(
    name, device, verification, drawn
):
    case, layouts, drafts = drawn
    output = verify(name, device, case, layouts, drafts, verification)
    truth = truth_of(case, verification)
    assert_logits_invariants(name, case, output, truth, verification)
    slacks = list(logits_slacks(name, case, truth, verification))
    problems = disagreements(output, truth.output, slacks)
    assert not problems, "\n".join(problems)


@on_every_device
@given(
    drawn=logits_strategies.cases(max_batch_size=6),
    verification=st.sampled_from(("token", "block")),
    order=st.randoms(use_true_random=False),
)
def test_a_row_depends_neither_on_its_batch_mates_nor_on_its_place(
    name, device, drawn, verification, order
):
    case, layouts, drafts = drawn

    def sample(part):
        return verify(name, device, part, layouts, drafts, verification)

    assert_rows_stand_alone(sample, case, order)


@on_every_device
@given(
    drawn=logits_strategies.cases(drafts=("sums",)),
    verification=st.sampled_from(("token", "block")),
)
def test_a_drafts_own_logsumexp_changes_nothing(name, device, drawn, verification):
    case, layouts, _ = drawn
    outputs = [
        verify(name, device, case, layouts, drafts, verification) for drafts in ("sums", "logits")
    ]
    for given_sums, without in zip(*outputs, strict=True):
        assert torch.equal(given_sums, without)


@on_every(["cpp"], ["cuda"])
@given(
    drawn=logits_strategies.cases(),
    verification=st.sampled_from(("token", "block")),
    ranks=st.booleans(),
)
def test_many_requests_get_what_few_get(name, device, drawn, verification, ranks):
    """So many that a launch takes other kernels, which top-k chooses among too."""
    case, layouts, drafts = drawn
    if not ranks:
        case["top_k"] = None
    few = verify(name, device, case, layouts, drafts, verification)
    many = {key: x if x is None else torch.cat([x] * MANY) for key, x in case.items()}
    output = verify(name, device, many, layouts, drafts, verification)
    for one, all_of_them in zip(few, output, strict=True):
        assert torch.equal(all_of_them, torch.cat([one] * MANY))


@pytest.mark.skipif(
    emulation.compiler() is None, reason="the emulation wants Linux and a C++ compiler"
)
@pytest.mark.parametrize("blocks, early_exit", [(1, False), (1, True), (2, True), (4, True)])
@given(drawn=logits_strategies.cases(max_batch_size=2, max_spec_length=3), ranks=st.booleans())
def test_the_emulated_kernels_emit_the_cpp_kernels_tokens(blocks, early_exit, drawn, ranks):
    case, layouts, drafts = drawn
    if not ranks:
        case["top_k"] = None
    cpp = from_logits.get("cpp").load("cpu")
    if drafts == "sums":
        case["draft_logsumexp"] = sums_of(cpp, case, "cpu")
    layouts = {**layouts, "draft_token_ids": "contiguous"}  # the binding makes it so
    emulated = emulation.from_logits("cluster", blocks, early_exit=early_exit)
    output = run(lambda **arguments: emulated(**arguments)[0], case, layouts, "cpu")
    expected = run(cpp.rejection_sample_from_logits, case, layouts, "cpu")
    for ours, theirs in zip(output, expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- Sampling from logits.


@on_every_device
@given(drawn=sampling_cases(), order=st.randoms(use_true_random=False))
def test_sampling_emits_the_oracles_tokens_and_logsumexp_wherever_a_row_stands(
    name, device, drawn, order
):
    case, layouts = drawn
    module = from_logits.get(name).load(device)

    def sample(part):
        return SampledTokens(*run(module.sample_from_logits, part, layouts, device))

    output = sample(case)
    options = {name: case[name] for name in PARAMETERS}
    # It is a verification without drafts.
    no_drafts = {
        "draft_token_ids": torch.empty((len(case["logits"]), 0), dtype=torch.int64),
        "target_logits": case["logits"][:, None],
        "draft_logits": None,
        "draft_probs": None,
        "num_draft_tokens": None,
        "uniforms": case["uniforms"][:, None],
        **options,
    }
    truth = truth_of(no_drafts, "token")
    verified = SamplerOutput(output.token_ids[:, None], torch.zeros(len(output.token_ids)).int())
    assert_support(no_drafts, verified, torch.from_numpy(truth.kept_p).double())
    slacks = [None if edge else oracle.LOGITS_EPSILON for edge in truth.edge]
    problems = disagreements(verified, truth.output, slacks)
    assert not problems, "\n".join(problems)
    _, expected = oracle.sample_from_logits(case["logits"], uniforms=case["uniforms"], **options)
    sure = ~truth.edge
    assert np.allclose(output.logsumexp.numpy()[sure], expected[sure], rtol=1e-6, atol=1e-6)
    # On a card PyTorch chooses the order of a sum by the shape of the whole tensor.
    is_pytorch_on_a_card = name == "vectorized" and device == "cuda"
    rounding = 8 * np.finfo(np.float64).eps if is_pytorch_on_a_card else 0.0
    assert_rows_stand_alone(sample, case, order, rounding)
