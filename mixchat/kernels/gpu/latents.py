"""The kernels of latent attention for one token, beside its products and `attend`.

H = num_attention_heads, L = kv_lora_rank, n and r = columns of a head's query that do not rotate,
and that do, S = partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.kv_store import KVTensors, store_rows
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.norm import normalized, summed

_MAX_ROWS = 8  # partial sums that are loaded at once


def latent_heads(
    queries: torch.Tensor,
    latents: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rope: tuple[torch.Tensor, torch.Tensor],
    past: torch.Tensor,
    tensors: KVTensors,
    kept: torch.Tensor,
    whole: torch.Tensor,
) -> None:
    """Store a token's queries in `kept` [H, n] and in the last r columns of `whole` [H, L + r].

    Also store its normalized latent and the rotated columns of its key after `past` tokens, int32
    on the GPU. queries: partial sums, fp32, of all heads' n columns, and then of their r. latents:
    partial sums, fp32, that end with those of the latent and the key. The two may be the same.
    weight, eps: of the latent's norm. All is rounded where CPUs round.
    """
    (heads, width), latent = kept.shape, tensors.numbers.shape[-1]
    turning = whole.shape[1] - latent
    launch(
        _latent_heads,
        (heads + 1,),
        *(queries, latents, weight, *rope, past, *tensors, kept, whole, eps),
        tensors.room,
        H=heads,
        N=width,
        LATENT=latent,
        TURNING=turning,
        KEPT=triton.next_power_of_2(width),
        BLOCK=triton.next_power_of_2(latent),
        TURNS=triton.next_power_of_2(turning),
        **_sums("Q_", queries),
        **_sums("", latents),
    )


def _sums(name: str, partials: torch.Tensor) -> dict[str, int]:
    """Return the constants with which a kernel adds up partial sums [S, R]."""
    count, columns = partials.shape
    at_once = min(triton.next_power_of_2(count), _MAX_ROWS)
    return {f"{name}S": count, f"{name}R": columns, f"{name}AT_ONCE": at_once}


@triton.jit
def _turned(
    partials,
    first,
    cos,
    sin,
    position,
    dtype: tl.constexpr,
    TURNING: tl.constexpr,
    TURNS: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Return columns rotated to the token's position."""
    columns = tl.arange(0, TURNS)
    inside = columns < TURNING
    partners = tl.where(columns < TURNING // 2, columns + TURNING // 2, columns - TURNING // 2)
    x = summed(partials, first + columns, inside, S, R, AT_ONCE).to(dtype).to(tl.float32)
    y = summed(partials, first + partners, inside, S, R, AT_ONCE).to(dtype).to(tl.float32)
    angles = position.to(tl.int64) * TURNING + columns
    x *= tl.load(cos + angles, inside, 1.0).to(tl.float32)
    return (x + y * tl.load(sin + angles, inside, 0.0).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["room"])
def _latent_heads(
    queries,
    latents,
    weight,
    cos,
    sin,
    past,
    numbers,
    scales,
    rotating,
    kept,
    whole,
    eps,
    room,
    H: tl.constexpr,
    N: tl.constexpr,
    LATENT: tl.constexpr,
    TURNING: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
    Q_S: tl.constexpr,
    Q_R: tl.constexpr,
    Q_AT_ONCE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Compute one head's query, or in the last program the token's latent and key."""
    dtype: tl.constexpr = kept.dtype.element_ty
    head = tl.program_id(0)
    position = tl.load(past)
    turns = tl.arange(0, TURNS)
    if head < H:
        columns = tl.arange(0, KEPT)
        inside = columns < N
        x = summed(queries, head * N + columns, inside, Q_S, Q_R, Q_AT_ONCE)
        tl.store(kept + head * N + columns, x, inside)
        first = H * N + head * TURNING
        query = _turned(
            queries, first, cos, sin, position, dtype, TURNING, TURNS, Q_S, Q_R, Q_AT_ONCE
        )
        tl.store(whole + head * (LATENT + TURNING) + LATENT + turns, query, turns < TURNING)
    else:
        FIRST: tl.constexpr = R - LATENT - TURNING
        every = tl.arange(0, BLOCK)
        of_latent = every < LATENT
        latent = summed(latents, FIRST + every, of_latent, S, R, AT_ONCE).to(dtype)
        latent = normalized(latent, tl.load(weight + every, of_latent, 0.0), eps, LATENT)
        key = _turned(
            latents, FIRST + LATENT, cos, sin, position, dtype, TURNING, TURNS, S, R, AT_ONCE
        )
        places = position + tl.zeros((1,), tl.int64)
        store_rows(key, rotating, scales, places, turns, turns < TURNING, TURNING)
        if scales is None:
            store_rows(latent, numbers, scales, places, every, of_latent, LATENT)
        else:
            store_rows(latent, numbers, scales + room, places, every, of_latent, LATENT)
