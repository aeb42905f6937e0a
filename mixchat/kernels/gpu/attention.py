"""Attention of new tokens over a GPU's KV cache, with the softmax online and no mask in memory.

Milakov & Gimelshein, arXiv:1805.02867. The keys of a few tokens are split over many programs, as in
flash decoding, since a single token has less work than a GPU has processors.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads (of
R = H / G heads each), h = head_dim, S = splits. A row is a pair of a new token and one of R heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mixchat.base import gpu
from mixchat.kernels.gpu.kv_store import KVTensors
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.splits import LATENT_ROWS, MOST_WIDTH, PROGRAMS

_MOST_SPLITS = 256
_PARTS = 8  # that are merged at once
# Scores. If all keys so far are masked, the largest score is _LOWEST, and 2^(masked - lowest) is 0.
# With infinities the difference would be NaN.
_MASKED = tl.constexpr(-3e38)
_LOWEST = tl.constexpr(-1e38)
_LOG2_E = tl.constexpr(math.log2(math.e))


class Parts(NamedTuple):
    """Room for what programs compute of splits, in fp32.

    sums: weighted values [T * H, S, h]. weights: the largest score of each split and the sum of its
    weights [2, T * H, S]. Both are empty if the keys are not split.
    """

    sums: torch.Tensor
    weights: torch.Tensor
    splits: int

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        heads: int,
        tensors: KVTensors,
        window: int | None,
        scratch: torch.Tensor | None = None,
    ) -> Parts:
        """Return room for T tokens, which depends on the size of the cache, not on its length.

        scratch: fp32 memory for it, of `token_scratch` numbers for one token, None for new memory.
        """
        groups, room, width = tensors.numbers.shape[1:]
        rows = tokens * heads // groups
        tile = _AttentionTile.of(tokens, heads, tensors)
        wanted = PROGRAMS // (triton.cdiv(rows, tile.rows) * groups)
        useful = triton.cdiv(min(room, (window or room) + tokens), tile.keys)
        splits = max(1, min(wanted, useful, _MOST_SPLITS))
        rooms = (tokens * heads, splits) if splits > 1 else (0, 0)
        sizes = [math.prod(rooms) * width, math.prod(rooms) * 2]
        if scratch is None:
            device = tensors.numbers.device
            scratch = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        sums, weights = torch.split(scratch[: sum(sizes)], sizes)
        return cls(sums.view(*rooms, width), weights.view(2, *rooms), splits)


class _AttentionTile(NamedTuple):
    """The rows and the keys that a program computes at once, and Triton's options for it.

    They leave no number in local memory, as the assembly for each card shows. Decoding in 16 bits
    leaves the registers for half of a card's threads.
    """

    rows: int
    keys: int
    options: dict[str, int]

    @classmethod
    def of(cls, tokens: int, heads: int, tensors: KVTensors) -> _AttentionTile:
        numbers = tensors.numbers
        _, groups, _, width = numbers.shape
        eight_bits = numbers.dtype == torch.int8
        rows = tokens * heads // groups
        if width > MOST_WIDTH:
            # Latents, whose sums take most registers. Turing has 64 KiB of shared memory.
            options = {"num_warps": 8, "num_stages": 1 if gpu.is_amd() else 2}
            return cls(LATENT_ROWS if gpu.has_bf16(numbers.device) else 8, 16, options)
        if gpu.is_amd():
            keys = 32 if width <= 64 else 16
            options = {"num_warps": 4, "num_stages": 1}
            return cls(16 if rows <= 16 else 32, keys, options)
        if not gpu.has_bf16(numbers.device):
            # For these cards Triton has no product of matrices but by single numbers.
            return cls(16, 32 if width <= 64 else 16, {"num_warps": 8, "num_stages": 1})
        keys = 64 if width <= 128 else 32
        options = {"num_warps": 8, "num_stages": 2}
        if rows > 16:
            few = eight_bits or width > 128 or rows <= 64
            return cls(64 if few else 128, 32 if eight_bits else keys, options)
        if eight_bits:
            # They take many registers to become 16 bits, so little is computed at once.
            return cls(16, 16, {"num_warps": 4 if width <= 128 else 8, "num_stages": 3})
        if width <= 128:
            options |= {"num_warps": 4 if width <= 64 else 8, "maxnreg": 64}
        return cls(16, keys, options)


def attend(
    queries: torch.Tensor,
    tensors: KVTensors,
    past: torch.Tensor,
    out: torch.Tensor,
    parts: Parts,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Store the attention of `queries` [T, H, h] in `out` [T, H, h].

    If there are `gates`, of the same shape, their sigmoids multiply it. With gates [T, H] their
    softplus multiplies each head. `scale` multiplies scores, 1 / sqrt(h) by default. If the cache
    holds latents, `queries` [T, H, h + r] have r more columns for the rotating numbers of keys.

    The cache holds the keys and values of these tokens already, after `past` tokens, int32 on the
    GPU. A token attends to itself and all before it, or to the last `window` of these. `sinks` are
    logits [H], fp32, of which each joins the sum of a head's softmax. `parts` are for T tokens.
    """
    (tokens, heads, _), (_, groups, _, width) = queries.shape, tensors.numbers.shape
    shared = heads // groups
    turning = queries.shape[2] - width
    tile = _AttentionTile.of(tokens, heads, tensors)
    shape = {"WINDOW": window or 0, "H": heads, "R": shared, "WIDTH": width}
    shape |= {"ROWS": tile.rows, "KEYS": tile.keys}
    shape["BLOCK"] = triton.next_power_of_2(width)
    shape["HEAD_GATES"] = gates is not None and gates.dim() == 2
    launch(
        _attend,
        (triton.cdiv(tokens * shared, tile.rows), groups, parts.splits),
        *(queries, *tensors, past, out, *parts[:2]),
        *((sinks, gates) if parts.splits == 1 else (None, None)),
        *(tokens, tensors.room, parts.splits),
        **shape,
        SCALE=width**-0.5 if scale is None else scale,
        TURNING=turning,
        TURNS=triton.next_power_of_2(max(turning, 16)),
        WHOLE=parts.splits == 1,
        **tile.options,
    )
    if parts.splits > 1:
        grid = (tokens * heads,)
        arguments = *parts[:2], past, out, sinks, gates, tokens, parts.splits
        launch(_merge, grid, *arguments, **shape, PARTS=_PARTS, SPLITS=_MOST_SPLITS)


@triton.jit
def _keys_of(
    block,
    past,
    tokens,
    splits,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the first key that a block of rows sees, the end of these, and the keys of a split."""
    end = past + tl.minimum((block * ROWS + ROWS - 1) // R + 1, tokens)
    first = tl.maximum(past + block * ROWS // R + 1 - WINDOW, 0) if WINDOW else 0
    return first, end, tl.cdiv(tl.cdiv(end - first, splits), KEYS) * KEYS


@triton.jit(do_not_specialize=["tokens", "room", "splits"])
def _attend(
    queries,
    numbers,
    scales,
    rotating,
    past,
    out,
    part_sums,
    part_weights,
    sinks,
    gates,
    tokens,
    room,
    splits,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_GATES: tl.constexpr,
    SCALE: tl.constexpr,
    TURNING: tl.constexpr,
    TURNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Attend with some rows of a group to the keys of a split."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(past)
    first, end, part = _keys_of(block, length, tokens, splits, WINDOW, R, ROWS, KEYS)
    start = first + split * part
    stop = tl.minimum(start + part, end)
    if start >= stop:
        return
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    token = rows // R
    wide = columns[None, :] < WIDTH
    inside = (token < tokens)[:, None] & wide
    row = token * H + group * R + rows % R  # in queries and `out`
    own = queries + row[:, None] * (WIDTH + TURNING)
    query = tl.load(own + columns[None, :], inside, 0.0)
    if rotating is not None:
        turns = tl.arange(0, TURNS)[None, :]
        wanted = (token < tokens)[:, None] & (turns < TURNING)
        turned = tl.load(own + WIDTH + turns, wanted, 0.0)
    position = (length + token)[:, None]
    # A group's keys, and how far its values are behind them.
    behind = room.to(tl.int64) * (H // R)
    numbers += group.to(tl.int64) * room * WIDTH
    largest = tl.full((ROWS,), _LOWEST, tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(start, stop, KEYS):
        keys = begin + tl.arange(0, KEYS)
        places = keys
        if WINDOW:
            places = begin % room + tl.arange(0, KEYS)
            places = tl.where(places < room, places, places - room)
        at = places[:, None] * WIDTH + columns[None, :]
        held = (keys < stop)[:, None] & wide
        key = tl.load(numbers + at, held, 0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (_LOG2_E * SCALE)
        if scales is not None:
            scale = scales + group.to(tl.int64) * room + places
            key_scale = tl.load(scale, keys < stop, 0.0)
            value_scale = tl.load(scale + behind, keys < stop, 0.0)
        if rotating is None:
            value = tl.load(numbers + behind * WIDTH + at, held, 0).to(query.dtype)
            if scales is not None:
                scores *= key_scale[None, :]
        else:
            value = key
            other = rotating + places[:, None] * TURNING + turns
            held = (keys < stop)[:, None] & (turns < TURNING)
            key = tl.load(other, held, 0).to(query.dtype)
            others = tl.dot(turned, tl.trans(key), input_precision="ieee") * (_LOG2_E * SCALE)
            if scales is not None:
                scores *= value_scale[None, :]
                others *= key_scale[None, :]
            scores += others
        seen = keys[None, :] <= position
        if WINDOW:
            seen &= keys[None, :] > position - WINDOW
        scores = tl.where(seen, scores, _MASKED)
        highest = tl.maximum(largest, tl.max(scores, 1))
        weight = tl.exp2(scores - highest[:, None])
        factor = tl.exp2(largest - highest)
        weights = weights * factor + tl.sum(weight, 1)
        largest = highest
        if scales is not None:
            weight *= value_scale[None, :]
        sums = tl.dot(weight.to(query.dtype), value, sums * factor[:, None], input_precision="ieee")
    if WHOLE:
        if sinks is not None:
            sink = tl.load(sinks + group * R + rows % R) * _LOG2_E
            highest = tl.maximum(largest, sink)
            factor = tl.exp2(largest - highest)
            weights = weights * factor + tl.exp2(sink - highest)
            sums *= factor[:, None]
        # A row that no token has may have seen no key.
        sums /= tl.maximum(weights, 1e-30)[:, None]
        places = row[:, None] * WIDTH + columns[None, :]
        tl.store(out + places, _gated(sums, gates, out, places, inside, WIDTH, HEAD_GATES), inside)
    else:
        place = row.to(tl.int64) * splits + split
        tl.store(part_sums + place[:, None] * WIDTH + columns[None, :], sums, inside)
        tl.store(part_weights + place, largest, token < tokens)
        tl.store(part_weights + tokens * H * splits + place, weights, token < tokens)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _merge(
    part_sums,
    part_weights,
    past,
    out,
    sinks,
    gates,
    tokens,
    splits,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_GATES: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits of a token's head."""
    row = tl.program_id(0)
    token = row // H
    head = row % H
    block = (token * R + head % R) // ROWS
    first, end, part = _keys_of(block, tl.load(past), tokens, splits, WINDOW, R, ROWS, KEYS)
    split = tl.arange(0, SPLITS)
    used = split * part < end - first
    part_weights += row.to(tl.int64) * splits
    largest = tl.load(part_weights + split, used, _LOWEST)
    weights = tl.load(part_weights + tokens * H * splits + split, used, 0.0)
    highest = tl.max(largest)
    if sinks is not None:
        sink = tl.load(sinks + head) * _LOG2_E
        highest = tl.maximum(highest, sink)
    total = tl.sum(weights * tl.exp2(largest - highest))
    if sinks is not None:
        total += tl.exp2(sink - highest)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in range(0, tl.cdiv(end - first, part), PARTS):
        some = start + tl.arange(0, PARTS)
        held = some * part < end - first
        factor = tl.exp2(tl.load(part_weights + some, held, _LOWEST) - highest)
        place = (row.to(tl.int64) * splits + some)[:, None] * WIDTH + columns[None, :]
        mask = held[:, None] & (columns[None, :] < WIDTH)
        sums += tl.load(part_sums + place, mask, 0.0) * factor[:, None]
    places = row * WIDTH + columns
    inside = columns < WIDTH
    attended = tl.sum(sums, 0) / total
    attended = _gated(attended, gates, out, places, inside, WIDTH, HEAD_GATES)
    tl.store(out + places, attended, inside)


@triton.jit
def _gated(attended, gates, out, places, inside, WIDTH: tl.constexpr, HEAD_GATES: tl.constexpr):
    if gates is not None:
        # Rounded first, as on CPUs.
        attended = attended.to(out.dtype.element_ty).to(tl.float32)
        if HEAD_GATES:
            gate = tl.load(gates + places // WIDTH, inside, 0.0).to(tl.float32)
            attended *= tl.maximum(gate, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(gate)))
        else:
            attended *= tl.sigmoid(tl.load(gates + places, inside, 0.0).to(tl.float32))
    return attended
