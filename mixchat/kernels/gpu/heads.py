"""The kernel between the product with qkv and attention, for one token.

H = num_attention_heads, G = num_key_value_heads, h = head_dim, S = partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.kv_store import KVTensors, store_rows
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.norm import summed

_COLUMNS = 256  # of a norm over all heads, that are summed at once


def heads(
    qkv: torch.Tensor,
    queries: torch.Tensor,
    tensors: KVTensors,
    past: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    norms: Sequence[torch.Tensor] = (),
    eps: float = 0.0,
    clip: float | None = None,
    gates: torch.Tensor | None = None,
    *,
    v_norm: bool = False,
    values_are_keys: bool = False,
) -> None:
    """Store a token's queries in `queries` [H, h], and its key and value after `past` tokens.

    qkv: partial sums [S, (H + 2 * G) * h], fp32. If there are `gates` [H, h], they are stored, too.
    The sums then have H more heads, which are neither normalized nor rotated. v_norm: values are
    normalized without weights. values_are_keys: there are no sums of values. past: int32 on the
    GPU. rope: cos and sin [context, at most h], as `RotaryEmbedding.tables`. norms: the weights of
    queries and keys, of each head [h] or of all together [H * h] and [G * h]. All is rounded where
    CPUs round, which is not before a weight in fp32 multiplies.
    """
    (count, width), groups = queries.shape, tensors.numbers.shape[1]
    query_norm, key_norm = norms or (None, None)
    launch(
        _heads,
        (count + 2 * groups + (0 if gates is None else count),),
        *(qkv, query_norm, key_norm, *rope, queries, gates, *tensors[:2]),
        *(past, eps, clip, tensors.room),
        H=count,
        G=groups,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROTATED=rope[0].shape[1],
        TOGETHER=query_norm is not None and query_norm.shape[0] > width,
        S=qkv.shape[0],
        ROWS=min(triton.next_power_of_2(qkv.shape[0]), 8),
        COLUMNS=_COLUMNS,
        V_NORM=v_norm,
        VALUES_ARE_KEYS=values_are_keys,
    )


@triton.jit(do_not_specialize=["room"])
def _heads(
    qkv,
    query_norm,
    key_norm,
    cos,
    sin,
    queries,
    gates,
    numbers,
    scales,
    past,
    eps,
    clip,
    room,
    H: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    TOGETHER: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    V_NORM: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
):
    """Compute one head of the queries, keys, values or gates."""
    VALUES: tl.constexpr = 0 if VALUES_ARE_KEYS else G
    R: tl.constexpr = (H + G + VALUES + (0 if gates is None else H)) * WIDTH
    dtype: tl.constexpr = queries.dtype.element_ty
    head = tl.program_id(0)
    is_query = head < H
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    turns = columns < tl.where(head < H + G, ROTATED, 0)
    # A column i < ROTATED / 2 turns with i + ROTATED / 2.
    partners = tl.where(columns < ROTATED // 2, columns + ROTATED // 2, columns - ROTATED // 2)
    # The head's sums. Those after the keys come earlier if there are none of values.
    source = tl.where(head < H + G, head, head - (G - VALUES))
    x = summed(qkv, source * WIDTH + columns, inside, S, R, ROWS).to(dtype).to(tl.float32)
    y = summed(qkv, source * WIDTH + partners, turns, S, R, ROWS).to(dtype).to(tl.float32)
    if query_norm is not None:
        if TOGETHER:
            start = tl.where(is_query, 0, H * WIDTH)
            end = tl.where(is_query, H * WIDTH, (H + G) * WIDTH)
            squares = tl.zeros((COLUMNS,), tl.float32)
            for first in range(start, end, COLUMNS):
                part = first + tl.arange(0, COLUMNS)
                z = summed(qkv, part, part < end, S, R, ROWS).to(dtype).to(tl.float32)
                squares += z * z
            mean = tl.sum(squares) / (end - start)
            first_weight = tl.where(is_query, head, head - H) * WIDTH
        else:
            mean = tl.sum(x * x) / WIDTH
            first_weight = 0
        factor = tl.where(head < (H + 2 * G if V_NORM else H + G), tl.rsqrt(mean + eps), 1.0)
        x = (x * factor).to(query_norm.dtype.element_ty).to(tl.float32)
        y = (y * factor).to(query_norm.dtype.element_ty).to(tl.float32)
        # Products with 1 change nothing, so values and gates need no code of their own.
        of_query = columns < tl.where(is_query, WIDTH, 0)
        of_key = columns < tl.where(is_query | (head >= H + G), 0, WIDTH)
        query_norm += first_weight
        key_norm += first_weight
        x *= tl.load(query_norm + columns, of_query, 1.0).to(tl.float32)
        x *= tl.load(key_norm + columns, of_key, 1.0).to(tl.float32)
        y *= tl.load(query_norm + partners, of_query & turns, 1.0).to(tl.float32)
        y *= tl.load(key_norm + partners, of_key & turns, 1.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
    if clip is not None:
        x = tl.clamp(x, -clip, clip, propagate_nan=tl.PropagateNan.ALL).to(dtype).to(tl.float32)
        y = tl.clamp(y, -clip, clip, propagate_nan=tl.PropagateNan.ALL).to(dtype).to(tl.float32)
    position = tl.load(past)
    angles = position.to(tl.int64) * ROTATED + columns
    x *= tl.load(cos + angles, turns, 1.0).to(tl.float32)
    x = (x + y * tl.load(sin + angles, turns, 0.0).to(tl.float32)).to(dtype)
    if is_query:
        tl.store(queries + head * WIDTH + columns, x, inside)
    elif head >= H + 2 * G:
        if gates is not None:
            tl.store(gates + (head - H - 2 * G) * WIDTH + columns, x, inside)
    else:
        place = (head - H).to(tl.int64) * room + position % room
        places = place + tl.zeros((1,), tl.int64)
        store_rows(x, numbers, scales, places, columns, inside, WIDTH)
