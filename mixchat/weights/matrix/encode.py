"""NF4 coding of a matrix on the CPU: bitsandbytes' result many times faster, or better scales.

A block is 64 weights that share one scale. Its codes are the NF4 levels nearest to weight / scale.

- Plainly, the scale is the largest magnitude of the block: bit for bit what bitsandbytes gives,
  which spends its time on a binary search for each weight. Here the code of a weight is the count
  of the boundaries below it: 15 comparisons, each one fast pass of numpy.
- With `search`, the scale is absmax times the best of 32 factors, where that lowers the squared
  error of the block. The error at a factor is a sum over weights of a function of weight / absmax,
  which a table holds for all factors side by side; `embedding_bag` adds up the table's rows. Half
  of the factors are negative: the levels are not symmetric, and some blocks fit them better in the
  mirror. Whatever multiplies a level by its scale reads such a model as any other.

N = weights, B = blocks (of 64 weights), F = factors (32), S = steps of the table (1025).
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mixchat.weights.matrix.nf4 import BLOCKSIZE, LEVELS

_LEVELS = LEVELS["nf4"]
_BOUNDARIES = (_LEVELS[1:] + _LEVELS[:-1]) / 2
_TINY = 1e-38  # the least absmax that bitsandbytes divides by
_PIECE = 2**19  # weights: many in one pass, for between passes the threads wait for Python's lock
_MAX_THREADS = 6  # of about 13 MB each; more would mostly wait for that lock

_FACTORS = torch.linspace(0.86, 1.36, 16)
_FACTORS = torch.cat((_FACTORS, -_FACTORS))  # [F]
_HALF = 512  # steps of the table from 0 to 1
_MARGIN = 1e-5  # of a block's squared error, absmax being 1: more than rounding can add to it


def encode_nf4(weight: torch.Tensor, *, search: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 [ceil(N / 2)]) and scales (bf16 [ceil(N / 64)]) of a matrix on the CPU.

    weight: [rows, columns], any float type, finite; rounded to bf16 first, which makes absmax
    exact. Codes are in bitsandbytes' order: row after row, the even weight in the high nibble.

    With `search` no block's squared error, before the product of level and scale is rounded, is
    larger than without; a last block of fewer than 64 weights keeps its absmax. Neither the
    count of threads nor a block's neighbours change its result.
    """
    flat = weight.detach().reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    kept_scales = torch.empty(-(-flat.numel() // BLOCKSIZE), dtype=torch.bfloat16)
    pieces = (
        torch.split(flat, _PIECE),
        torch.split(codes, _PIECE // 2),
        torch.split(kept_scales, _PIECE // BLOCKSIZE),
    )
    work = functools.partial(_quantize_piece, search=search)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, _MAX_THREADS), initializer=_work_alone) as pool:
            list(pool.map(work, *pieces))  # the list makes it raise what a worker raised
    finally:
        torch.set_num_threads(threads)
    return codes, kept_scales


def _work_alone() -> None:
    """In a worker: no threads of torch's own, which would wait for each other at each short step.

    torch also gives this count to threads that start later: `quantize` puts its own back.
    """
    torch.set_num_threads(1)


@torch.inference_mode()  # which a caller's does not reach: it holds for one thread
def _quantize_piece(
    weight: torch.Tensor, codes: torch.Tensor, kept_scales: torch.Tensor, search: bool
) -> None:
    """Fill `codes` and `kept_scales` for some blocks, of which the last may be short."""
    missing = -weight.numel() % BLOCKSIZE  # weights
    whole = weight.numel() // BLOCKSIZE  # blocks
    blocks = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, missing)).view(-1, BLOCKSIZE)
    scaled, absmax = _scale(blocks.float())
    best = _nearest(scaled)
    kept_scales.copy_(absmax)
    kept_scales[whole:].clamp_(min=_TINY)  # as bitsandbytes does in a short block only
    if search and whole:
        _search(scaled[:whole], absmax[:whole], best[:whole], kept_scales[:whole])
    codes.copy_(_pack(best)[: len(codes)])


def _scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight / absmax [B, 64] and absmax [B] of fp32 blocks, rounded as bitsandbytes rounds.

    In a short last block it divides, which rounds differently; but no quotient of bf16 numbers is
    so near to a boundary that it would matter (a test tries all).
    """
    absmax = weight.abs().amax(-1)
    scaled = weight * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(-1)
    return scaled, absmax


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """The codes uint8 [B, 64], one a byte: how many boundaries are below each weight."""
    values = scaled.numpy()
    count = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, np.bool_)
    for boundary in _BOUNDARIES.numpy():
        np.greater(values, boundary, out=above)
        np.add(count, above.view(np.uint8), out=count)
    return torch.from_numpy(count)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [B, 64] to [32 B], two a byte, the even one in the high nibble."""
    pairs = codes.numpy().view("<u2").reshape(-1)  # even + 256 * odd
    return torch.from_numpy((pairs << 4 | pairs >> 8).astype(np.uint8))  # keeps the low byte


def _search(
    scaled: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor, kept_scales: torch.Tensor
) -> None:
    """Put better codes and scales in the place of those of absmax, in the blocks that have some."""
    unit = absmax.clamp(min=_TINY)  # `scaled` is weight / unit
    trial = (absmax * _best_factor(scaled)).to(torch.bfloat16)
    ratio = trial.float() / unit
    trial_codes = _nearest(scaled * (1.0 / ratio).unsqueeze(-1))
    error = _squared_error(scaled, absmax / unit, codes)
    # Where the trial is 0 or infinite this compares 0 with 0, or NaN: not better.
    better = _squared_error(scaled, ratio, trial_codes) < error - _MARGIN
    torch.where(better, trial, kept_scales, out=kept_scales)
    wide, trial_wide = codes.view(torch.int64), trial_codes.view(torch.int64)  # 8 at once
    torch.where(better.unsqueeze(-1), trial_wide, wide, out=wide)


def _best_factor(scaled: torch.Tensor) -> torch.Tensor:
    """The factor [B] with which the table promises the least squared error."""
    steps = (scaled * _HALF + (_HALF + 0.5)).to(torch.int32)  # rounded to the nearest
    errors = torch.nn.functional.embedding_bag(steps, _error_table(), mode="sum")  # [B, F]
    return _FACTORS[errors.argmin(-1)]


@functools.cache
def _error_table() -> torch.Tensor:
    """Squared error [S, F] of weight / absmax from -1 to 1, coded with a factor times absmax."""
    scaled = torch.linspace(-1, 1, 2 * _HALF + 1).unsqueeze(-1)
    codes = _nearest(scaled / _FACTORS)
    return (scaled - _FACTORS * _LEVELS[codes.int()]).square()


def _squared_error(scaled: torch.Tensor, ratio: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sum over a block of (scaled - ratio * level)^2: [B], of codes [B, 64] and a ratio [B]."""
    levels = _LEVELS.index_select(0, codes.view(-1).int()).view_as(scaled)
    return levels.mul_(ratio.unsqueeze(-1)).sub_(scaled).square_().sum(-1)
