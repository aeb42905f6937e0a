"""Gated DeltaNet between its two products: see kernels/cpu/delta_net.py.

One kernel computes all for one token, and another one the states for a prompt. A program has a
block of columns of one head's state, which it reads once and writes once. So the queries and keys
of a head are computed by each of its programs, from numbers that are few beside those of the state.
For one token, the last program of a head to finish normalizes what all have read.

T = tokens, V and K = heads of values, and of keys and queries, v and k = their columns, D =
hidden_size, C = 2 K k + V v channels: queries, keys, values. L = taps of the convolution, S =
partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.convolution import convolved, floats_at
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.norm import normalized, summed

_THREADS = 128  # of a program, which computes 16 KiB of the state in most models


@dataclass(frozen=True)
class DeltaNetWeights:
    """All weights except the weights of the two products.

    ba_proj: [2 V, D], to the logits of rates and decays. convolution: [L, C], fp32. rates, biases:
    of decays [V], fp32. norm: [v].
    """

    ba_proj: torch.Tensor
    convolution: torch.Tensor
    rates: torch.Tensor
    biases: torch.Tensor
    norm: torch.Tensor
    eps: float


def delta_net(
    x: torch.Tensor,
    projected: torch.Tensor,
    weights: DeltaNetWeights,
    addresses: torch.Tensor,
    state_shape: tuple[int, int, int, int],
    read: torch.Tensor,
    out: torch.Tensor,
    finished: torch.Tensor,
) -> None:
    """Update the state by the token x [D], and store what is read of it in `out` [V * v].

    projected: partial sums [S, C + V * v], fp32, of channels and of the output's gate. addresses:
    int64 [4] on the GPU, of the convolution's last inputs [L - 1, C], fp32, before and after the
    token, and of the states, fp32, before and after. state_shape: of these, [V, v / block, k,
    block]. read: room for V * v numbers. finished: counters, int32 [V], 0 between two calls.
    All is rounded where CPUs round.
    """
    heads, blocks, key_dim, block = state_shape
    taps, channels = weights.convolution.shape
    value_dim = blocks * block
    key_heads = (channels - heads * value_dim) // (2 * key_dim)
    launch(
        _delta_net,
        (heads, blocks),
        *(x, projected, weights.ba_proj, weights.convolution, weights.rates, weights.biases),
        *(weights.norm, addresses, read, out, finished, weights.eps),
        D=x.shape[0],
        X=triton.next_power_of_2(x.shape[0]),
        K=key_heads,
        V=heads,
        KEY=key_dim,
        ROWS=triton.next_power_of_2(key_dim),
        BLOCK=block,
        COLUMNS=triton.next_power_of_2(block),
        BLOCKS=blocks,
        VALUE=triton.next_power_of_2(value_dim),
        L=taps,
        S=projected.shape[0],
        AT_ONCE=min(triton.next_power_of_2(projected.shape[0]), 8),
        num_warps=_THREADS // 32,
    )


def delta_rule(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Update the state by T tokens, one after the other. Return what each reads [T, V * v].

    qkv: [T, C], fp32, rows of a matrix, with queries and keys as `DeltaRule.prepare` leaves them.
    gates: decays and rates [T, V, 2], as it returns them. before, after: states [V, v / block, k,
    block], fp32.
    """
    (tokens, channels), (heads, blocks, key_dim, block) = qkv.shape, before.shape
    out = torch.empty(tokens, heads * blocks * block, dtype=dtype, device=qkv.device)
    launch(
        _delta_rule,
        (heads, blocks),
        *(qkv, gates, before, after, out, tokens, qkv.stride(0)),
        K=(channels - heads * blocks * block) // (2 * key_dim),
        V=heads,
        KEY=key_dim,
        ROWS=triton.next_power_of_2(key_dim),
        BLOCK=block,
        COLUMNS=triton.next_power_of_2(block),
        BLOCKS=blocks,
        num_warps=_THREADS // 32,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _delta_rule(
    qkv,
    gates,
    before,
    after,
    out,
    tokens,
    stride,
    K: tl.constexpr,
    V: tl.constexpr,
    KEY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCKS * BLOCK
    head = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    places = (head * BLOCKS + block) * (KEY * BLOCK) + row[:, None] * BLOCK + column[None, :]
    wanted = row < KEY
    own = column < BLOCK
    inside = wanted[:, None] & own[None, :]
    state = tl.load(before + places, inside, 0.0)
    at = head * WIDTH + block * BLOCK + column
    queries = qkv + head // (V // K) * KEY + row
    values = qkv + 2 * K * KEY + at
    gates += 2 * head
    # A token's numbers are loaded while the one before it is computed.
    query = tl.load(queries, wanted, 0.0)
    key = tl.load(queries + K * KEY, wanted, 0.0)
    value = tl.load(values, own, 0.0)
    decay = tl.load(gates)
    rate = tl.load(gates + 1)
    out += at
    for token in range(tokens):
        is_last = token + 1 == tokens
        skipped = tl.where(is_last, 0, stride)
        queries = queries + skipped
        values = values + skipped
        gates += tl.where(is_last, 0, 2 * V)
        next_query = tl.load(queries, wanted, 0.0)
        next_key = tl.load(queries + K * KEY, wanted, 0.0)
        next_value = tl.load(values, own, 0.0)
        next_decay = tl.load(gates)
        next_rate = tl.load(gates + 1)
        state *= decay
        delta = rate * (value - tl.sum(state * key[:, None], 0))
        state += key[:, None] * delta[None, :]
        read = tl.sum(state * query[:, None], 0)
        tl.store(out, read, own)
        out += V * WIDTH
        query = next_query
        key = next_key
        value = next_value
        decay = next_decay
        rate = next_rate
    tl.store(after + places, state, inside)


@triton.jit
def _delta_net(
    x,
    projected,
    ba_proj,
    convolution,
    rates,
    biases,
    norm,
    addresses,
    read,
    out,
    finished,
    eps,
    D: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    VALUE: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCKS * BLOCK
    C: tl.constexpr = 2 * K * KEY + V * WIDTH
    R: tl.constexpr = C + V * WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    head = tl.program_id(0)
    block = tl.program_id(1)
    # The state comes first, since most time goes by until it is there.
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    places = (head * BLOCKS + block) * (KEY * BLOCK) + row[:, None] * BLOCK + column[None, :]
    inside = (row < KEY)[:, None] & (column < BLOCK)[None, :]
    state = tl.load(floats_at(addresses + 2) + places, inside, 0.0)

    inputs = tl.arange(0, X)
    numbers = tl.load(x + inputs, inputs < D, 0.0).to(tl.float32)
    ba_proj += head * D + inputs
    rate = tl.sum(numbers * tl.load(ba_proj, inputs < D, 0.0).to(tl.float32))
    step = tl.sum(numbers * tl.load(ba_proj + V * D, inputs < D, 0.0).to(tl.float32))
    rate = rate.to(dtype).to(tl.float32)
    step = step.to(dtype).to(tl.float32)
    step += tl.load(biases + head)
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    decay = tl.exp(tl.load(rates + head) * step)
    rate = tl.sigmoid(rate)

    before = floats_at(addresses)
    after = floats_at(addresses + 1)
    key_head = head // (V // K)
    # Of the programs with the same queries and keys, one stores their inputs.
    is_first = (head % (V // K) == 0) & (block == 0)
    channel = key_head * KEY + row
    wanted = row < KEY
    kept = row < tl.where(is_first, KEY, 0)
    query = _activated(
        projected, convolution, before, after, channel, wanted, kept, C, R, L, S, AT_ONCE, dtype
    )
    channel += K * KEY
    key = _activated(
        projected, convolution, before, after, channel, wanted, kept, C, R, L, S, AT_ONCE, dtype
    )
    query *= tl.rsqrt(tl.sum(query * query) + 1e-6) * (1 / KEY**0.5)
    key *= tl.rsqrt(tl.sum(key * key) + 1e-6)
    at = head * WIDTH + block * BLOCK + column
    channel = 2 * K * KEY + at
    wanted = column < BLOCK
    value = _activated(
        projected, convolution, before, after, channel, wanted, wanted, C, R, L, S, AT_ONCE, dtype
    )

    state *= decay
    delta = rate * (value - tl.sum(state * key[:, None], 0))
    state += key[:, None] * delta[None, :]
    tl.store(floats_at(addresses + 3) + places, state, inside)
    tl.store(read + at, tl.sum(state * query[:, None], 0), wanted)

    # All threads have stored their numbers before one of them counts the program.
    tl.debug_barrier()
    if tl.atomic_add(finished + head, 1) == BLOCKS - 1:
        tl.store(finished + head, 0)
        every = tl.arange(0, VALUE)
        # Other programs have stored these, and the first-level cache is each one's own.
        places_of_head = head * WIDTH + every
        own = every < WIDTH
        values = tl.load(read + places_of_head, own, 0.0, cache_modifier=".cg")
        values = normalized(values, tl.load(norm + every, own, 0.0), eps, WIDTH).to(tl.float32)
        gate = summed(projected, C + places_of_head, own, S, R, AT_ONCE).to(dtype).to(tl.float32)
        tl.store(out + places_of_head, values * (gate * tl.sigmoid(gate)), own)


@triton.jit
def _activated(
    projected,
    weight,
    before,
    after,
    channel,
    wanted,
    kept,
    C: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    AT_ONCE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return the output of some channels, with silu. Store their last inputs if they are kept."""
    x = summed(projected, channel, wanted, S, R, AT_ONCE).to(dtype).to(tl.float32)
    total = convolved(x, weight, before, after, channel, wanted, kept, C, L)
    return total * tl.sigmoid(total)
