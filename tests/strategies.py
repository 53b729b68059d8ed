"""Arguments of rejection_sample that nobody would write down, as hypothesis strategies: shapes,
dtypes, layouts, rows of every kind. Choices shrink; the numbers inside a row come from a seed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from src import philox

VOCAB_SIZES = (1, 2, 3, 16, 17, 255, 511, 512, 513, 1024, 1100, 2050)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST_UNIFORM = 1 - 2**-24
INT_MAX = 2**31 - 1
RED_ZONE = 96  # elements before and after each tensor


def _masked(values, g, share, filler):
    return torch.where(torch.rand(values.shape, generator=g) < share, filler, values)


def _one_hot(v, g):
    return torch.nn.functional.one_hot(torch.randint(v, (), generator=g), v).float()


ROWS = {
    "flat": lambda v, g: (0.1 * torch.randn(v, generator=g)).softmax(-1),
    "peaked": lambda v, g: (40 * torch.randn(v, generator=g)).softmax(-1),
    "down to 1e-30": lambda v, g: 10 ** (-30 * torch.rand(v, generator=g)),
    "half zero": lambda v, g: _masked(torch.randn(v, generator=g).softmax(-1), g, 0.5, 0.0),
    "one-hot": _one_hot,
    "denormal": lambda v, g: torch.rand(v, generator=g) * 1e-41,
    "unnormalised": lambda v, g: torch.rand(v, generator=g) * 1e6,
    "huge": lambda v, g: torch.rand(v, generator=g) * 3e38,
    "negative": lambda v, g: torch.randn(v, generator=g),
    "zero": lambda v, g: torch.zeros(v),
    "minus zero": lambda v, g: -torch.zeros(v),
    "some nan": lambda v, g: _masked(torch.rand(v, generator=g), g, 0.3, float("nan")),
    "nan": lambda v, g: torch.full((v,), float("nan")),
    "some inf": lambda v, g: _masked(torch.rand(v, generator=g), g, 0.1, float("inf")),
    "inf": lambda v, g: torch.full((v,), float("inf")),
    "-inf": lambda v, g: torch.full((v,), float("-inf")),
}
# What a target row has to do with its draft row.
RELATIONS = ("near", "equal", "own", "disjoint")
DRAFTS = ("likely", "zero in target", -1, "V", INT_MAX, -7, -(2**31), 2**40)
UNIFORMS = ("any", "any", "any", 0.0, LAST_UNIFORM, 1e-45)
TAME = 6  # of ROWS, and 2 of RELATIONS: rows of this sort get past the first draft
LAYOUTS = ("contiguous", "padded rows", "positions first")


@st.composite
def cases(draw, vocab_sizes=VOCAB_SIZES, max_batch_size=4, max_spec_length=5):
    """(case, layouts): rejection_sample's arguments as contiguous CPU tensors, with `uniforms`; and
    the layout that each is to have, for `place`."""
    batch_size = draw(st.sampled_from((*range(1, max_batch_size + 1), 0)))
    spec_length = max_spec_length - draw(st.integers(0, max_spec_length))
    v = draw(st.sampled_from(vocab_sizes))
    dtype = draw(st.sampled_from(DTYPES))
    ids_dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tame = draw(st.booleans())
    kinds = st.sampled_from(tuple(ROWS)[: TAME if tame else None])
    relations = st.sampled_from(RELATIONS[: 2 if tame else None])
    drafts = st.sampled_from(("likely",) * 9 + DRAFTS if tame else DRAFTS)
    p = torch.zeros(batch_size, spec_length + 1, v)
    q = torch.zeros(batch_size, spec_length, v)
    ids = torch.zeros(batch_size, spec_length, dtype=torch.int64)
    u = torch.randint(2**24, (batch_size, spec_length + 1), generator=g).float() * 2**-24
    for b in range(batch_size):
        for k in range(spec_length + 1):
            p[b, k] = ROWS[draw(kinds)](v, g)
            uniform = draw(st.sampled_from(UNIFORMS))
            if uniform != "any":
                u[b, k] = uniform
            if k < spec_length:
                q[b, k] = ROWS[draw(kinds)](v, g)
                p[b, k] = _related(draw(relations), p[b, k], q[b, k], g)
                ids[b, k] = _draft(draw(drafts), p[b, k], q[b, k], v, ids_dtype)
    case = {
        "draft_token_ids": ids.to(ids_dtype),
        "draft_probs": None if draw(st.booleans()) and draw(st.booleans()) else q.to(dtype),
        "target_probs": p.to(dtype),
        "num_draft_tokens": None,
        "uniforms": u,
    }
    if draw(st.booleans()):
        lengths = st.integers(spec_length - 1 if tame else -2, spec_length + 2)
        lengths = draw(st.lists(lengths, min_size=batch_size, max_size=batch_size))
        case["num_draft_tokens"] = torch.tensor(lengths, dtype=torch.int32)
    if draw(st.integers(0, 3)) == 0:
        case.update(stream(draw, batch_size, spec_length))
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in case}
    return case, layouts


def _related(relation, p, q, g):
    if relation == "equal":
        return q.clone()
    if relation == "near":  # residuals of a few units in the last place
        return q * (1 + 2e-7 * torch.randn(q.shape, generator=g))
    if relation == "disjoint":
        half = torch.rand(q.shape, generator=g) < 0.5
        q[half] = 0
        return torch.where(half, p, 0.0)
    return p


def _draft(choice, p, q, v, dtype):
    if choice == "likely":
        return int(q.nan_to_num(0, 0, 0).argmax())
    if choice == "zero in target":
        return int(p.nan_to_num(0, 0, 0).argmin())
    if choice == "V":
        return v
    return INT_MAX if choice > INT_MAX and dtype == torch.int32 else choice


def stream(draw, batch_size, spec_length):
    """seeds and offsets; `uniforms` stays, as what they stand for."""
    numbers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=batch_size, max_size=batch_size)
    seeds, offsets = (torch.tensor(draw(numbers), dtype=torch.int64) for _ in range(2))
    u = torch.zeros(0, spec_length + 1)
    if batch_size:
        u = torch.from_numpy(philox.uniforms(seeds.numpy(), offsets.numpy(), spec_length + 1))
    return {"seeds": seeds, "offsets": offsets, "uniforms": u}


def place(case, layouts, device):
    """(arguments, buffers): the case on `device` in its layouts, each tensor a view inside a buffer
    whose other elements are poison: a read outside the tensor changes tokens."""
    arguments, buffers = {}, {}
    for name, tensor in case.items():
        arguments[name] = None
        if tensor is not None:
            arguments[name], buffers[name] = _place(name, tensor, layouts[name], device)
    if arguments.get("seeds") is not None:
        arguments["uniforms"] = None
    return arguments, buffers


def _place(name, tensor, layout, device):
    shape = list(tensor.shape)
    is_rows = name.endswith(("_probs", "logits"))
    if layout == "positions first" and tensor.ndim > 1:
        shape[0], shape[1] = shape[1], shape[0]
    if layout == "padded rows" and is_rows:
        shape[-1] += 3  # no 16-byte load can start at most rows
    if is_rows:
        poison = 1e30 if tensor.dtype != torch.float16 else 6e4
    else:
        poison = 0.0 if tensor.is_floating_point() else 1
    buffer = torch.full((_size(shape) + 2 * RED_ZONE,), poison, dtype=tensor.dtype, device=device)
    view = buffer[RED_ZONE : RED_ZONE + _size(shape)].reshape(shape)
    view = view[..., : tensor.shape[-1]] if is_rows else view
    if layout == "positions first" and tensor.ndim > 1:
        view = view.transpose(0, 1)
    view.copy_(tensor)
    return view, buffer


def _size(shape):
    result = 1
    for extent in shape:
        result *= extent
    return result


def bits(tensor):
    """The tensor's bytes: what comparing NaN and -0 wants."""
    return tensor.cpu().contiguous().view(torch.uint8).clone()
