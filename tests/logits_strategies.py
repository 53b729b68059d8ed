"""Arguments of the samplers of logits that nobody would write down, as hypothesis strategies: those
of strategies.py, and per-request parameters."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests import strategies
from tests.strategies import DTYPES, INT_MAX, LAYOUTS, UNIFORMS, VOCAB_SIZES, stream

INFINITY, NAN = float("inf"), float("nan")


def _masked(values, g, share, filler):
    return torch.where(torch.rand(values.shape, generator=g) < share, filler, values)


def _one_left(v, g):
    row = torch.full((v,), -INFINITY)
    row[torch.randint(v, (), generator=g)] = 3.0
    return row


ROWS = {
    "peaked": lambda v, g: 4 * torch.randn(v, generator=g),
    "flat": lambda v, g: 0.1 * torch.randn(v, generator=g),
    "down to 1e-30": lambda v, g: -69 * torch.rand(v, generator=g),
    "equal": lambda v, g: torch.full((v,), 1.5),
    "ties": lambda v, g: (2 * torch.randn(v, generator=g)).round(),
    "around zero": lambda v, g: torch.randn(v, generator=g).round().clamp(-1, 1),  # 0 and -0
    "far up": lambda v, g: 1e4 + torch.randn(v, generator=g),
    "half -inf": lambda v, g: _masked(4 * torch.randn(v, generator=g), g, 0.5, -INFINITY),
    "one left": _one_left,
    "denormal": lambda v, g: torch.randn(v, generator=g) * 1e-41,
    "-inf": lambda v, g: torch.full((v,), -INFINITY),
    "nan": lambda v, g: torch.full((v,), NAN),
    "some nan": lambda v, g: _masked(torch.randn(v, generator=g), g, 0.3, NAN),
    "inf": lambda v, g: torch.full((v,), INFINITY),
    "some inf": lambda v, g: _masked(torch.randn(v, generator=g), g, 0.1, INFINITY),
    "far apart": lambda v, g: 6e38 * (torch.rand(v, generator=g) - 0.5),
    "sharp": lambda v, g: 1000 * torch.randn(v, generator=g),  # probabilities that underflow
}
# What a target row has to do with its draft row; "shifted" is the same distribution.
RELATIONS = ("near", "equal", "shifted", "own", "disjoint")
TAME = 10  # of ROWS, and 4 of RELATIONS: rows of this sort get past the first draft
# What the drafts come with; "sums" are logits with their logsumexp.
DRAFTS = ("logits", "sums", "probs", "none")
# Of draft rows in probabilities. A draft row is a distribution: none is negative.
PROBS = ("softmax",) * 8 + ("half zero", "one-hot", "down to 1e-30", "denormal", "unnormalised")
PROBS += ("huge", "zero", "minus zero", "some nan", "some inf")
PARAMETERS = {
    "temperature": lambda v: (1.0, 0.0, 0.7, 1.7, 0.05, 100.0, -1.0),
    "top_k": lambda v: (0, 1, 2, 40, v, v + 1, INT_MAX, -3),
    "top_p": lambda v: (1.0, 0.9, 0.5, 0.999, 1e-30, 0.0, 2.0),
    "min_p": lambda v: (0.0, 0.05, 0.5, 1.0, 1e-30, -1.0),
}


@st.composite
def cases(draw, vocab_sizes=VOCAB_SIZES, max_batch_size=4, max_spec_length=5, drafts=DRAFTS):
    """(case, layouts, drafts): rejection_sample_from_logits' arguments as contiguous CPU tensors,
    with `uniforms`, without the logsumexp, which the sampler that is tested gives; the layout that
    each is to have, for `place`; which of `drafts` they are."""
    batch_size = draw(st.sampled_from((*range(1, max_batch_size + 1), 0)))
    spec_length = max_spec_length - draw(st.integers(0, max_spec_length))
    v = draw(st.sampled_from(vocab_sizes))
    dtype = draw(st.sampled_from(DTYPES))
    ids_dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tame, kind = draw(st.booleans()), draw(st.sampled_from(drafts))
    kinds = st.sampled_from(tuple(ROWS)[: TAME if tame else None])
    relations = st.sampled_from(RELATIONS[: 4 if tame else None])
    some = ("likely",) * 6 + ("any",) * 3
    choices = st.sampled_from(some + strategies.DRAFTS if tame else strategies.DRAFTS + some[-3:])
    p = torch.zeros(batch_size, spec_length + 1, v)
    q = torch.zeros(batch_size, spec_length, v)
    ids = torch.zeros(batch_size, spec_length, dtype=torch.int64)
    for b in range(batch_size):
        for k in range(spec_length + 1):
            p[b, k] = ROWS[draw(kinds)](v, g)
            if k < spec_length:
                q[b, k] = ROWS[draw(kinds)](v, g)
                p[b, k] = _related(draw(relations), p[b, k], q[b, k], g)
                if kind == "probs":
                    q[b, k] = _probs(draw(st.sampled_from(PROBS)), q[b, k], g)
                ids[b, k] = _draft(draw(choices), p[b, k], q[b, k], g, ids_dtype)
    case = {
        "draft_token_ids": ids.to(ids_dtype),
        "target_logits": p.to(dtype),
        "draft_logits": q.to(dtype) if kind in ("logits", "sums") else None,
        "draft_probs": q.to(dtype) if kind == "probs" else None,
        **draw(parameters(batch_size, v)),
        "num_draft_tokens": None,
        "uniforms": draw(uniforms(batch_size, spec_length + 1, g)),
    }
    if draw(st.booleans()):
        lengths = st.integers(spec_length - 1 if tame else -2, spec_length + 2)
        lengths = draw(st.lists(lengths, min_size=batch_size, max_size=batch_size))
        case["num_draft_tokens"] = torch.tensor(lengths, dtype=torch.int32)
    if draw(st.integers(0, 3)) == 0:
        case.update(stream(draw, batch_size, spec_length))
    names = (*case, "draft_logsumexp")
    return case, {name: draw(st.sampled_from(LAYOUTS)) for name in names}, kind


@st.composite
def sampling_cases(draw, max_batch_size=4):
    """(case, layouts) of sample_from_logits in the same way."""
    batch_size = draw(st.sampled_from((*range(1, max_batch_size + 1), 0)))
    v = draw(st.sampled_from(VOCAB_SIZES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.zeros(batch_size, v)
    for b in range(batch_size):
        logits[b] = ROWS[draw(st.sampled_from(tuple(ROWS)))](v, g)
    case = {
        "logits": logits.to(draw(st.sampled_from(DTYPES))),
        **draw(parameters(batch_size, v)),
        "uniforms": draw(uniforms(batch_size, 1, g))[:, 0],
    }
    if draw(st.integers(0, 3)) == 0:
        case.update(stream(draw, batch_size, 0))
        case["uniforms"] = case["uniforms"][:, 0]
    # The last of LAYOUTS would be strides along the vocabulary here, which no sampler takes.
    return case, {name: draw(st.sampled_from(LAYOUTS[:2])) for name in case}


@st.composite
def parameters(draw, batch_size, v):
    """Each of PARAMETERS for every request, or None."""
    given, result = draw(st.sets(st.sampled_from(tuple(PARAMETERS)))), {}
    for name, values in PARAMETERS.items():
        result[name] = None
        if name in given:
            rows = st.lists(st.sampled_from(values(v)), min_size=batch_size, max_size=batch_size)
            dtype = torch.int32 if name == "top_k" else torch.float32
            result[name] = torch.tensor(draw(rows), dtype=dtype)
    return result


@st.composite
def uniforms(draw, rows, columns, g):
    u = torch.randint(2**24, (rows, columns), generator=g).float() * 2**-24
    for index in range(rows * columns):
        uniform = draw(st.sampled_from(UNIFORMS))
        if uniform != "any":
            u.view(-1)[index] = uniform
    return u


def _related(relation, p, q, g):
    if relation == "equal":
        return q.clone()
    if relation == "near":
        return q * (1 + 2e-7 * torch.randn(q.shape, generator=g))
    if relation == "shifted":
        return q + 2.0
    if relation == "disjoint":
        half = torch.rand(q.shape, generator=g) < 0.5
        q[half] = -INFINITY
        return torch.where(half, p, -INFINITY)
    return p


def _probs(choice, q, g):
    return q.softmax(-1) if choice == "softmax" else strategies.ROWS[choice](len(q), g)


def _draft(choice, p, q, g, dtype):
    if choice == "any":
        return int(torch.randint(len(p), (), generator=g))
    if choice == "likely":
        return int(q.nan_to_num(-INFINITY, neginf=-INFINITY).argmax())
    if choice == "zero in target":
        return int(p.nan_to_num(-INFINITY, neginf=-INFINITY).argmin())
    if choice == "V":
        return len(p)
    return INT_MAX if choice > INT_MAX and dtype == torch.int32 else choice
