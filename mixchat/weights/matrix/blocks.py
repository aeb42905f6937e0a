"""Blocks of 64 weights that share a scale, the same for every count of bits.

N = weights, B = blocks, R = rows, C = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.nn import functional

BLOCKSIZE = 64
BAND = 32  # rows that the layout "cpu-packed" interleaves
_PIECE = 2**18  # weights: their temporary tensors, of some MB, fit in the caches


class RowsOf(Protocol):
    """Yields a matrix of codes as dense rows of a type."""

    def __call__(
        self,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Iterator[torch.Tensor]: ...


def can_pack(rows: int, columns: int) -> bool:
    """Return whether a matrix of this shape has a packed layout."""
    return rows % BAND == 0 and columns % BLOCKSIZE == 0


def absmax_size(rows: int, columns: int) -> int:
    """Return the count of a matrix's scales."""
    return -(-rows * columns // BLOCKSIZE)


def in_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers [N] as blocks [B, 64], the last one filled up with zeros."""
    return functional.pad(numbers, (0, -len(numbers) % BLOCKSIZE)).view(-1, BLOCKSIZE)


def transposed(absmax: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return scales that lie as [height, width] in the order of [width, height]; a new tensor."""
    return absmax.view(height, width).T.contiguous().view(-1)


def dequantized_rows(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Yield a matrix of this shape as `dtype`, some rows at a time. Layout "bitsandbytes".

    `decode` returns the numbers, before their scale, of some codes of `bits` bits, in fp32.
    """
    rows, columns = shape
    # Blocks continue from row to row; with 64 rows, one ends.
    size = max(1, _PIECE // (columns * BLOCKSIZE)) * BLOCKSIZE * columns
    scales = torch.split(absmax[: absmax_size(rows, columns)], size // BLOCKSIZE)
    for number, scale in enumerate(scales):
        start, end = number * size, min((number + 1) * size, rows * columns)
        whole = start + len(scale) * BLOCKSIZE  # the end of the last block
        some = decode(codes[start * bits // 8 : whole * bits // 8])[: end - start]
        blocks = in_blocks(some) * scale.float().unsqueeze(-1)
        yield blocks.view(-1)[: end - start].view(-1, columns).to(dtype)


def dequantize(
    rows_of: RowsOf,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the matrix of this shape as `dtype`; `rows_of` yields its rows."""
    pieces = rows_of(codes, absmax, shape, dtype)
    first = next(pieces)
    weight = first.new_empty(shape)
    weight[: len(first)] = first
    start = len(first)
    for rows in pieces:
        weight[start : start + len(rows)] = rows
        start += len(rows)
    return weight
