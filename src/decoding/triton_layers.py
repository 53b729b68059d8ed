"""Decoder layers of Llama and Qwen2 for a few query tokens, in five Triton kernels each.

A step of decoding reads every weight once and computes little, so its time is the bytes' and what
it takes to get from one kernel to the next. Normalization and activation are done by the products
that need them, and a kernel is started before the one in front of it has ended (programmatic
dependent launch, compute capability 9.0): it asks for its first weights, which depend on nothing,
and only then waits.

M = batch size times query tokens. Activations are [M, width], weights [rows, width], bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_ALIGNMENT = 64  # of widths and heads
_LINE = tl.constexpr(64)  # elements in a cache line
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(weights, rows, WIDTH: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr):
    """Asks for the first AHEAD columns of the rows, then waits for the kernel before this one."""
    if DEPENDENT:
        gdc_launch_dependents()
        lines = tl.arange(0, AHEAD // _LINE) * _LINE
        pointers = weights + rows[:, None] * WIDTH + tl.minimum(lines, WIDTH - _LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        gdc_wait()


@triton.jit
def _product(
    x,
    norm,
    weights,
    rows,
    count,
    epsilon,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """float32 [rows, TOKENS]: weights[rows] times x, of which `count` rows exist, transposed.

    With NORMALIZE times x's root mean square normalization: its factor for a token is known at the
    end only, which is early enough.
    """
    if TOKENS == 1:
        return _by_sums(x, norm, weights, rows, epsilon, WIDTH, COLUMNS, NORMALIZE)
    token, column = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    result = tl.zeros((rows.shape[0], TOKENS), tl.float32)
    squares = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        at = first + column
        tile = tl.load(weights + rows[:, None] * WIDTH + at[None, :])
        values = tl.load(x + token[:, None] * WIDTH + at[None, :], token[:, None] < count, 0.0)
        if NORMALIZE:
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * tl.load(norm + at)[None, :]).to(values.dtype)
        result = tl.dot(tile, tl.trans(values), result)
    if NORMALIZE:
        result *= tl.rsqrt(tl.sum(squares, 1) / WIDTH + epsilon)[None, :]
    return result


@triton.jit
def _by_sums(
    x,
    norm,
    weights,
    rows,
    epsilon,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """_product of one token, without tensor cores, which want weights in shared memory first.

    x is loaded in the weights' shape, so that every thread has what it multiplies by. With two
    tokens or more that is too much to load.
    """
    column = tl.arange(0, COLUMNS)
    result = tl.zeros((rows.shape[0], COLUMNS), tl.float32)
    squares = tl.zeros((rows.shape[0], COLUMNS), tl.float32)
    for first in tl.range(0, WIDTH, COLUMNS, loop_unroll_factor=4):
        at = rows[:, None] * 0 + (first + column)[None, :]
        tile = tl.load(weights + rows[:, None] * WIDTH + at)
        values = tl.load(x + at).to(tl.float32)
        if NORMALIZE:
            squares += values * values
            values *= tl.load(norm + at)
        result += tile * values
    result = tl.sum(result, 1)
    if NORMALIZE:
        result *= tl.rsqrt(tl.sum(squares, 1) / WIDTH + epsilon)
    return result[:, None]


@triton.jit
def _halves(values, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The first and the second half of the rows of values [ROWS, TOKENS]."""
    paired = tl.permute(tl.reshape(values, (2, ROWS // 2, TOKENS)), (1, 2, 0))
    return tl.split(paired)


@triton.jit
def _add_kernel(
    x,
    weights,
    residual,
    count,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """residual [M, OUT] += x [M, WIDTH] times the weights."""
    rows, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    _start(weights, rows, WIDTH, AHEAD, DEPENDENT)
    result = _product(x, x, weights, rows, count, 0.0, WIDTH, TOKENS, COLUMNS, False)
    at, mask = residual + token[None, :] * OUT + rows[:, None], token[None, :] < count
    tl.store(at, (tl.load(at, mask, 0.0) + result).to(x.dtype.element_ty), mask)


@triton.jit
def _logits_kernel(
    x,
    norm,
    weights,
    logits,
    count,
    epsilon,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """logits [M, OUT] of the normalized x [M, WIDTH]."""
    rows, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    rows = rows.to(tl.int64)
    _start(weights, rows, WIDTH, AHEAD, DEPENDENT)
    result = _product(x, norm, weights, rows, count, epsilon, WIDTH, TOKENS, COLUMNS, True)
    at = logits + token[None, :] * OUT + rows[:, None]
    tl.store(at, result.to(x.dtype.element_ty), token[None, :] < count)


@triton.jit
def _gated_kernel(
    x,
    norm,
    weights,
    gated,
    count,
    epsilon,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """gated [M, OUT]: silu of one half of the weights' rows times x, times the other's."""
    HALF: tl.constexpr = ROWS // 2
    i, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    first = tl.program_id(0) * HALF
    rows = first + i % HALF + i // HALF * OUT
    _start(weights, rows, WIDTH, AHEAD, DEPENDENT)
    result = _product(x, norm, weights, rows, count, epsilon, WIDTH, TOKENS, COLUMNS, True)
    gate, up = _halves(result, ROWS, TOKENS)
    at = gated + token[None, :] * OUT + (first + tl.arange(0, HALF))[:, None]
    tl.store(at, (gate * tl.sigmoid(gate) * up).to(x.dtype.element_ty), token[None, :] < count)


@triton.jit
def _qkv_kernel(
    x,
    norm,
    weights,
    bias,
    rotation,
    positions,
    query,
    cache,
    count,
    epsilon,
    QUERIES: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """query [M, HEADS, HEAD_DIM] and the cache's keys and values, rotated by their positions."""
    HALF: tl.constexpr = ROWS // 2
    TILES: tl.constexpr = HEAD_DIM // ROWS  # of a head
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    # What a rotation turns together lies half a head apart.
    rows = head * HEAD_DIM + tile * HALF + i % HALF + i // HALF * (HEAD_DIM // 2)
    _start(weights, rows, WIDTH, AHEAD, DEPENDENT)
    result = _product(x, norm, weights, rows, count, epsilon, WIDTH, TOKENS, COLUMNS, True)
    if HAS_BIAS:
        result += tl.load(bias + rows)[:, None]
    low, high = _halves(result, ROWS, TOKENS)

    exists = token < count
    position = tl.load(positions + token, exists, 0)
    d = tile * HALF + tl.arange(0, HALF)
    if head < HEADS + KV_HEADS:  # not the values
        at = rotation + position[None, :] * (2 * HEAD_DIM) + d[:, None]
        # The second half of the sines has their sign.
        cos = tl.load(at).to(tl.float32)
        sin = tl.load(at + HEAD_DIM + HEAD_DIM // 2).to(tl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    if head < HEADS:
        at = query + (token[None, :] * HEADS + head) * HEAD_DIM + d[:, None]
    else:
        slot = token // QUERIES * CAPACITY + position
        at = cache + (slot[None, :] * 2 * KV_HEADS + head - HEADS) * HEAD_DIM + d[:, None]
    kind = query.dtype.element_ty
    tl.store(at, low.to(kind), exists[None, :])
    tl.store(at + HEAD_DIM // 2, high.to(kind), exists[None, :])


@triton.jit
def _attention_kernel(
    query,
    cache,
    positions,
    attended,
    scaling,
    QUERIES: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """attended [M, HEADS, HEAD_DIM]: all queries of one key/value head of one batch row, over the
    slots up to each one's position."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    STRIDE: tl.constexpr = 2 * KV_HEADS * HEAD_DIM  # of a slot
    row, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    i, d = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    exists = i < QUERIES * GROUP
    token = row * QUERIES + i // GROUP
    at = (token * HEADS + kv_head * GROUP + i % GROUP)[:, None] * HEAD_DIM + d[None, :]
    queries = tl.load(query + at, exists[:, None], 0.0)
    position = tl.load(positions + token, exists, -1).to(tl.int32)
    end = tl.max(position, 0) + 1
    keys = cache + row * CAPACITY * STRIDE + kv_head * HEAD_DIM
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, end, COLUMNS):
        slot = first + tl.arange(0, COLUMNS)
        here = keys + slot[:, None] * STRIDE + d[None, :]
        key = tl.load(here, slot[:, None] < end, 0.0)
        value = tl.load(here + KV_HEADS * HEAD_DIM, slot[:, None] < end, 0.0)
        score = tl.dot(queries, tl.trans(key)) * (scaling * _LOG2_E)
        score = tl.where(slot[None, :] <= position[:, None], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        rescale = tl.exp2(largest - higher)
        total = total * rescale + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * rescale[:, None])
        largest = higher
    result /= tl.maximum(total, 1e-30)[:, None]
    tl.store(attended + at, result.to(query.dtype.element_ty), exists[:, None])


class TritonLayers:
    """Layers and head of a forwards.FusedForward that `fits`, over its weights and caches."""

    most_tokens = 16  # M; with more, the products are a library's work

    def __init__(self, forward):
        self.shape, self.layers, self.rotation = forward.shape, forward.layers, forward.rotation
        self.norm, self.head = forward.norm.weight, forward.head
        card = torch.cuda.get_device_properties(self.head.device)
        self.dependent = card.major >= 9
        self.shared_memory = card.shared_memory_per_block_optin

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, keep: int) -> torch.Tensor:
        """x [B, Q, hidden], overwritten; positions [B, Q] int64. Logits [B, Q or keep, V]."""
        batch_size, queries, hidden = x.shape
        shape, count = self.shape, batch_size * queries
        attended_width = shape.heads * shape.head_dim
        query = x.new_empty(count, attended_width)
        attended = torch.empty_like(query)
        heads = {
            "QUERIES": queries,
            "CAPACITY": len(self.rotation),
            "HEADS": shape.heads,
            "KV_HEADS": shape.kv_heads,
            "HEAD_DIM": shape.head_dim,
        }
        early = {"DEPENDENT": self.dependent, "launch_pdl": self.dependent}

        def product(kernel, kind: str, rows: int, width: int, count: int, *arguments, **options):
            tokens = _padded(count)
            plan = _plan(kind, width, tokens, self.shared_memory)
            kernel[(rows // plan["ROWS"],)](*arguments, TOKENS=tokens, **plan, **early, **options)

        for weights, cache in self.layers:
            size = len(weights.gate_up) // 2
            gated = x.new_empty(count, size)
            product(
                *(_qkv_kernel, "qkv", len(weights.qkv), hidden, count),
                *(x, weights.input_norm, weights.qkv, weights.qkv_bias, self.rotation, positions),
                *(query, cache, count, shape.epsilon),
                HAS_BIAS=weights.qkv_bias is not None,
                **heads,
            )
            _attention_kernel[(batch_size * shape.kv_heads,)](
                *(query, cache, positions, attended, shape.scaling),
                ROWS=max(16, triton.next_power_of_2(queries * shape.heads // shape.kv_heads)),
                COLUMNS=64,
                **heads,
                **early,
            )
            product(
                *(_add_kernel, "out", hidden, attended_width, count),
                *(attended, weights.out.t(), x, count),
                OUT=hidden,
            )
            product(
                *(_gated_kernel, "gated", 2 * size, hidden, count),
                *(x, weights.post_norm, weights.gate_up, gated, count, shape.epsilon),
                OUT=size,
            )
            product(
                *(_add_kernel, "down", hidden, size, count),
                *(gated, weights.down.t(), x, count),
                OUT=hidden,
            )
        if keep and keep < queries:
            x = x[:, -keep:].contiguous()
        size, count = len(self.head), x.shape[0] * x.shape[1]
        logits = x.new_empty(*x.shape[:2], size)
        product(
            *(_logits_kernel, "logits", size, hidden, count),
            *(x, self.norm, self.head, logits, count, shape.epsilon),
            OUT=size,
        )
        return logits


def _padded(count: int) -> int:
    """Tokens that the kernels compute for so many: one by sums, more by tensor cores.

    A tensor core would take eight; sixteen were faster (3.03 against 3.32 ms a forward of 3B).
    """
    return 1 if count == 1 else max(16, triton.next_power_of_2(count))


# Rows and columns of a tile, warps, stages, and the columns asked for before the wait: the fastest
# of a hundred measured on an H100 with Llama-3.2's shapes. A few warps are enough where more would
# read the same tile from shared memory again.
_BY_SUMS = {
    "qkv": (4, 1024, 4, 1, 512),
    "out": (4, 1024, 4, 1, 256),
    "gated": (2, 2048, 4, 1, 512),
    "down": (2, 2048, 2, 1, 512),
    "logits": (2, 2048, 4, 1, 512),
}
_BY_DOTS = {
    "qkv": (32, 256, 4, 6, 512),
    "out": (16, 256, 1, 6, 512),
    "gated": (64, 256, 2, 3, 128),
    "down": (16, 256, 1, 6, 512),
    "logits": (64, 128, 4, 4, 512),
}


def _plan(kind: str, width: int, tokens: int, shared_memory: int) -> dict:
    """How a product of that kind is cut. shared_memory: bytes that a block may have."""
    rows, columns, warps, stages, ahead = (_BY_SUMS if tokens == 1 else _BY_DOTS)[kind]
    while width % columns:
        columns //= 2
    stages = min(stages, shared_memory // (2 * columns * (rows + tokens)))
    plan = {"WIDTH": width, "ROWS": rows, "COLUMNS": columns, "AHEAD": ahead}
    return plan | {"num_warps": warps, "num_stages": max(1, stages)}


def fits(shape, layers, head) -> bool:
    """Whether the kernels take layers of that forwards._Shape and those weights."""
    weights = layers[0][0]
    widths = [weights.gate_up.shape[1], *weights.down.shape, len(head)]
    return (
        head.dtype == torch.bfloat16
        and shape.head_dim in (64, 128)
        and all(width % _ALIGNMENT == 0 for width in widths)
    )
