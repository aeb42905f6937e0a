"""Encodes a matrix in NF4 on the CPU: bitsandbytes' result, but faster, or with better scales.

A block is 64 weights that share one scale. The code of a weight stands for the NF4 level nearest to
weight / scale.

- By default the scale is absmax, the largest magnitude of the block. The result is bitsandbytes',
  bit for bit. bitsandbytes makes a binary search for each weight. Here the code of a weight is the
  count of the boundaries below it: 15 comparisons, each one fast pass of numpy.
- With `search`, the scale is absmax times the best of 32 factors, if that lowers the squared error
  of the block. The error is a sum over the block's weights, and each summand depends only on
  weight / absmax and on the factor. A table holds these summands, a row for each step of
  weight / absmax and a column for each factor, and `embedding_bag` adds up its rows. Half of the
  factors are negative: the levels are not symmetric, and some blocks fit their mirror image better.
  Readers need not know of it: a weight is its level times its scale, as always.

N = weights, B = blocks (of 64 weights), F = factors (32), S = rows of the table (1025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mixchat.weights.matrix.nf4 import BLOCKSIZE, LEVELS

_LEVELS = LEVELS["nf4"]
_BOUNDARIES = (_LEVELS[1:] + _LEVELS[:-1]) / 2
_TINY = 1e-38  # the least absmax that bitsandbytes divides by
_PIECE = 2**19  # weights in one pass: between passes the threads wait for Python's lock
_MAX_THREADS = 6  # of about 13 MB each; more would mostly wait for that lock

_FACTORS = torch.linspace(0.86, 1.36, 16)
_FACTORS = torch.cat((_FACTORS, -_FACTORS))  # [F]
_STEPS = 512  # of the table, from 0 to 1
_MARGIN = 1e-5  # in a block's squared error, where absmax is 1: more than rounding can add


def encode_nf4(weight: torch.Tensor, *, search: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (uint8 [ceil(N / 2)]) and scales (bf16 [ceil(N / 64)]) of a matrix on the CPU.

    weight: [rows, columns], any float type, finite; rounded to bf16 first, which makes absmax
    exact. Codes are in bitsandbytes' order: row after row, the even weight in the high nibble.

    With `search` no block's squared error, before the product of level and scale is rounded, is
    larger than without; a last block of fewer than 64 weights has absmax for its scale. A block's
    result depends neither on its neighbours nor on the count of threads.
    """
    flat = weight.detach().reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // BLOCKSIZE), dtype=torch.bfloat16)
    pieces = (
        torch.split(flat, _PIECE),
        torch.split(codes, _PIECE // 2),
        torch.split(scales, _PIECE // BLOCKSIZE),
    )
    each_in_threads(functools.partial(_quantize_piece, search=search), *pieces)
    return codes, scales


def each_in_threads(work: Callable[..., None], *pieces: Sequence[torch.Tensor]) -> None:
    """Call `work` with the first of all `pieces`, with the second, and so on, in some threads.

    torch's own threads would wait for each other after every operation: long if cores are busy.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, _MAX_THREADS), initializer=_work_alone) as pool:
            list(pool.map(work, *pieces))  # as a list, it raises what a thread raised
    finally:
        torch.set_num_threads(threads)


def _work_alone() -> None:
    """Keep torch from using threads of its own in this one: they would only wait for each other.

    torch also gives this count to threads that start later: `each_in_threads` restores the old one.
    """
    torch.set_num_threads(1)


@torch.inference_mode()  # a caller's holds for its own thread only
def _quantize_piece(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, search: bool
) -> None:
    """Fill `codes` and `scales` for some blocks, of which the last may be short."""
    missing = -weight.numel() % BLOCKSIZE  # weights
    whole = weight.numel() // BLOCKSIZE  # blocks
    blocks = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, missing)).view(-1, BLOCKSIZE)
    scaled, absmax = _scale(blocks.float())
    best = _nearest(scaled)
    scales.copy_(absmax)
    scales[whole:].clamp_(min=_TINY)  # as bitsandbytes does in a short block only
    if search and whole:
        _search(scaled[:whole], absmax[:whole], best[:whole], scales[:whole])
    codes.copy_(_two_a_byte(best)[: len(codes)])


def _scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight / absmax [B, 64] and absmax [B] of fp32 blocks, rounded as bitsandbytes rounds.

    bitsandbytes divides in a short last block, which rounds differently. No quotient of bf16
    numbers is so near to a boundary that this would matter (a test tries all).
    """
    absmax = weight.abs().amax(-1)
    scaled = weight * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(-1)
    return scaled, absmax


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [B, 64], one a byte: the count of boundaries below each weight."""
    values = scaled.numpy()
    count = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, np.bool_)
    for boundary in _BOUNDARIES.numpy():
        np.greater(values, boundary, out=above)
        np.add(count, above.view(np.uint8), out=count)
    return torch.from_numpy(count)


def _two_a_byte(codes: torch.Tensor) -> torch.Tensor:
    """Put codes uint8 [B, 64] two in a byte, the even one in the high nibble: [32 B]."""
    pairs = codes.numpy().view("<u2").reshape(-1)  # even + 256 * odd
    return torch.from_numpy((pairs << 4 | pairs >> 8).astype(np.uint8))  # keeps the low byte


def _search(
    scaled: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> None:
    """Replace codes and scales of absmax by better ones, in the blocks where there are some."""
    unit = absmax.clamp(min=_TINY)  # `scaled` is weight / unit
    trial = (absmax * _best_factor(scaled)).to(torch.bfloat16)
    ratio = trial.float() / unit
    trial_codes = _nearest(scaled * (1.0 / ratio).unsqueeze(-1))
    error = _squared_error(scaled, absmax / unit, codes)
    # Where the trial is 0 or infinite this compares 0 with 0, or NaN: not better.
    better = _squared_error(scaled, ratio, trial_codes) < error - _MARGIN
    torch.where(better, trial, scales, out=scales)
    wide, trial_wide = codes.view(torch.int64), trial_codes.view(torch.int64)  # 8 at once
    torch.where(better.unsqueeze(-1), trial_wide, wide, out=wide)


def _best_factor(scaled: torch.Tensor) -> torch.Tensor:
    """Return the factor [B] with the least squared error by the table."""
    steps = (scaled * _STEPS + (_STEPS + 0.5)).to(torch.int32)  # rounded to the nearest
    errors = torch.nn.functional.embedding_bag(steps, _error_table(), mode="sum")  # [B, F]
    return _FACTORS[errors.argmin(-1)]


@functools.cache
def _error_table() -> torch.Tensor:
    """Return the squared error [S, F] of weight / absmax from -1 to 1 under each factor."""
    scaled = torch.linspace(-1, 1, 2 * _STEPS + 1).unsqueeze(-1)
    codes = _nearest(scaled / _FACTORS)
    return (scaled - _FACTORS * _LEVELS[codes.int()]).square()


def _squared_error(scaled: torch.Tensor, ratio: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the sum over a block of (scaled - ratio * level)^2: [B]. Codes [B, 64], ratio [B]."""
    levels = _LEVELS.index_select(0, codes.view(-1).int()).view_as(scaled)
    return levels.mul_(ratio.unsqueeze(-1)).sub_(scaled).square_().sum(-1)
