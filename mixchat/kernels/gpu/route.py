"""Chooses the best experts of one token on a GPU, as `kernels/cpu/router.py` does.

E = experts, D = columns of x, K = experts of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.cpu.router import LEAST_SUM, Router
from mixchat.kernels.gpu.dense import block_of, dot
from mixchat.kernels.gpu.launch import launch

_LEAST_SUM = tl.constexpr(LEAST_SUM)
# The least rank of an expert that was not chosen yet, and the rank of NaN.
_LOWEST = tl.constexpr(-3.2e38)
_NO_NUMBER = tl.constexpr(3.4e38)


def route(
    x: torch.Tensor,
    router: Router,
    logits: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    finished: torch.Tensor,
) -> None:
    """Write the experts of x [D], int32 [K], best first, and their weights, fp32 [K].

    Of equal logits, the first one is best. logits: fp32 [E]. `finished`, int32, is a counter that
    is 0 between two calls.
    """
    count, columns = router.gate.shape
    launch(
        _route,
        (count,),
        *(x, router.gate, router.bias, router.correction, router.scales),
        *(logits, selected, weights, finished),
        E=count,
        D=columns,
        K=router.choices,
        PLAIN=router.scoring == "softmax" and router.correction is None and router.scaling == 1,
        SIGMOID=router.scoring == "sigmoid",
        NORMALIZED=router.normalized,
        SCALING=router.scaling,
        CAP=router.cap,
        EXPERTS=triton.next_power_of_2(count),
        CHOICES=triton.next_power_of_2(router.choices),
        BLOCK=block_of(columns),
        num_warps=4,
    )


@triton.jit
def _route(
    x,
    gate,
    bias,
    correction,
    scales,
    logits,
    selected,
    weights,
    finished,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    PLAIN: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SCALING: tl.constexpr,
    CAP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the logit of an expert. The last program to finish chooses."""
    expert = tl.program_id(0)
    logit = dot(x, gate + expert * D, D, BLOCK)
    if bias is not None:
        logit += tl.load(bias + expert)
    if CAP is not None:
        # tanh(x) is 2 * sigmoid(2 * x) - 1.
        logit = (2.0 * tl.sigmoid(2.0 * logit / CAP) - 1.0) * CAP
    tl.store(logits + expert, logit)
    # All threads have stored before one of them counts the program.
    tl.debug_barrier()
    if tl.atomic_add(finished, 1) == E - 1:
        tl.store(finished, 0)
        experts = tl.arange(0, EXPERTS)
        choices = tl.arange(0, CHOICES)
        # Other programs have stored these, and the first-level cache is each one's own.
        all_logits = tl.load(logits + experts, experts < E, float("-inf"), cache_modifier=".cg")
        ranks = all_logits
        largest = 0.0
        total = 1.0
        if SIGMOID:
            ranks = tl.sigmoid(all_logits)
        elif not PLAIN or not NORMALIZED:
            largest = tl.max(all_logits)
            powers = tl.where(experts < E, tl.exp(all_logits - largest), 0.0)
            total = tl.sum(powers)
            ranks = all_logits if PLAIN else powers / total
        if correction is not None:
            ranks += tl.load(correction + experts, experts < E, 0.0)
        chosen = _best(ranks, experts, choices, E, K)
        values = tl.load(logits + chosen, cache_modifier=".cg")
        if SIGMOID:
            values = tl.sigmoid(values)
        elif PLAIN and NORMALIZED:
            values = tl.exp(values - tl.max(values))
        else:
            values = tl.exp(values - largest) / total
        if NORMALIZED:
            values /= tl.sum(tl.where(choices < K, values, 0.0)) + (0.0 if PLAIN else _LEAST_SUM)
        if scales is not None:
            values *= tl.load(scales + chosen)
        tl.store(selected + choices, chosen, choices < K)
        tl.store(weights + choices, values * SCALING, choices < K)


@triton.jit
def _best(ranks, experts, choices, E: tl.constexpr, K: tl.constexpr):
    """Return the K best of E experts, best first, and the best one again in further places."""
    # As in torch, NaN is above all numbers. -0 becomes 0, so that the first of equal ones is best.
    ranks = tl.where(ranks == ranks, tl.maximum(ranks, _LOWEST) + 0.0, _NO_NUMBER)
    ranks = tl.where(experts < E, ranks, float("-inf"))
    best = tl.argmax(ranks, 0)
    chosen = tl.full(choices.shape, best, tl.int32)
    for number in tl.static_range(1, K):
        ranks = tl.where(experts == best, float("-inf"), ranks)
        best = tl.argmax(ranks, 0)
        chosen = tl.where(choices == number, best, chosen)
    return chosen
