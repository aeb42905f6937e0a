"""A short convolution for one token, and its gates: see kernels/cpu/convolution.py.

C = channels, L = taps, the inputs of which one output is made, S = partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.norm import summed

_CHANNELS = 128  # of a program


def gated_convolution(
    projected: torch.Tensor, weight: torch.Tensor, addresses: torch.Tensor, out: torch.Tensor
) -> None:
    """Store the output of a token in `out` [C].

    projected: partial sums [S, 3C], fp32, of the gate, the output's gate and the inputs. weight:
    [L, C], fp32. addresses: int64 [2] on the GPU, of the last inputs [L - 1, C], fp32, before and
    after the token. All is rounded where CPUs round.
    """
    taps, channels = weight.shape
    launch(
        _gated_convolution,
        (triton.cdiv(channels, _CHANNELS),),
        *(projected, weight, addresses, out),
        C=channels,
        L=taps,
        S=projected.shape[0],
        AT_ONCE=min(triton.next_power_of_2(projected.shape[0]), 8),
        CHANNELS=_CHANNELS,
    )


@triton.jit
def _gated_convolution(
    projected,
    weight,
    addresses,
    out,
    C: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    wanted = channel < C
    gate = summed(projected, channel, wanted, S, 3 * C, AT_ONCE).to(dtype).to(tl.float32)
    out_gate = summed(projected, C + channel, wanted, S, 3 * C, AT_ONCE).to(dtype).to(tl.float32)
    x = summed(projected, 2 * C + channel, wanted, S, 3 * C, AT_ONCE).to(dtype).to(tl.float32)
    before = floats_at(addresses)
    after = floats_at(addresses + 1)
    total = convolved(x * gate, weight, before, after, channel, wanted, wanted, C, L)
    tl.store(out + channel, total * out_gate, wanted)


@triton.jit
def floats_at(address):
    """Load an address, a multiple of 16, from memory, and return it as a pointer to floats."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def convolved(x, weight, before, after, channel, wanted, kept, C: tl.constexpr, L: tl.constexpr):
    """Return the sums of some channels. Store the last inputs of those that are kept."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(L - 1):
        earlier = tl.load(before + tap * C + channel, wanted, 0.0)
        total += earlier * tl.load(weight + tap * C + channel, wanted, 0.0)
        if tap > 0:
            tl.store(after + (tap - 1) * C + channel, earlier, kept)
    tl.store(after + (L - 2) * C + channel, x, kept)
    return total + x * tl.load(weight + (L - 1) * C + channel, wanted, 0.0)
