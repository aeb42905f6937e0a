"""Stores keys and values in the memory of a GPU's KV cache.

T = new tokens, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.launch import launch

_TOKENS = 16  # of a program


class KVTensors(NamedTuple):
    """The keys and values of a layer, with room for as many tokens as it ever keeps.

    numbers: keys and values [2, G, room, h], in 8 bits or in the type of hidden states. scales: of
    each key and value in 8 bits [2, G, room], fp32. `p % room` is the place of the token p.

    Latents, which are keys and values at once, lie in `numbers` [1, 1, room, h]. `rotating` [1,
    room, r] has the other numbers of keys then, whose scales come first.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None
    rotating: torch.Tensor | None = None

    @property
    def room(self) -> int:
        return self.numbers.shape[2]


def store(tensors: KVTensors, keys: torch.Tensor, values: torch.Tensor, past: torch.Tensor) -> None:
    """Store keys and values [T, G, h] after the first `past` tokens, int32 on the GPU.

    The numbers of a token's heads follow one another. T is at most `room`.
    """
    tokens, groups, width = keys.shape
    launch(
        _store,
        (triton.cdiv(tokens, _TOKENS), groups),
        *(keys, values, *tensors[:2], past, tokens, keys.stride(0), values.stride(0), tensors.room),
        G=groups,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        TOKENS=_TOKENS,
    )


@triton.jit(do_not_specialize=["tokens", "room"])
def _store(
    keys,
    values,
    numbers,
    scales,
    past,
    tokens,
    key_stride,
    value_stride,
    room,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    group = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (columns < WIDTH)
    place = (tl.load(past) + token) % room
    source = group * WIDTH + columns
    key = tl.load(keys + token.to(tl.int64) * key_stride + source, inside, 0.0)
    value = tl.load(values + token.to(tl.int64) * value_stride + source, inside, 0.0)
    store_rows(key, numbers, scales, group.to(tl.int64) * room + place, columns, inside, WIDTH)
    row = (G + group).to(tl.int64) * room + place
    store_rows(value, numbers, scales, row, columns, inside, WIDTH)


@triton.jit
def store_rows(rows, numbers, scales, places, columns, inside, WIDTH: tl.constexpr):
    """Store rows of WIDTH numbers at their places, which both end in an axis of length 1."""
    if scales is not None:
        wide = rows.to(tl.float32)
        scale = tl.max(tl.abs(wide), -1, keep_dims=True) / 127
        # A row of zeros has a scale of 0, and stays zeros.
        rows = nearest(wide / tl.maximum(scale, 1e-30)).to(tl.int8)
        tl.store(scales + places, scale, tl.max(inside.to(tl.int32), -1, keep_dims=True) > 0)
    tl.store(numbers + places * WIDTH + columns, rows, inside)


@triton.jit
def nearest(x):
    """Round fp32 numbers below 2**22 to whole ones, and halves to even."""
    return (x + 12582912.0) - 12582912.0
