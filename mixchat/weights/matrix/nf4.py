"""4-bit codes with one scale (`absmax`) for each block of 64 weights.

A code is an index into NF4's table of 16 levels from -1 to 1 (QLoRA, arXiv:2305.14314). A weight is
its level times the scale of its block.

Rows are taken 32 at a time. For a pair of columns (2j, 2j+1) the 64 codes row0[2j], row0[2j+1],
row1[2j], ... are one line of 32 bytes, the first 32 codes in the low nibbles.

In the order of the rows, as bitsandbytes has them, a byte holds two codes of a row, the even column
in the high nibble, and `absmax` goes row after row.

`absmax` is stored in bf16. For bf16 weights that is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from mixchat.kernels.cpu.four_bit_units import FOUR_BITS
from mixchat.kernels.cpu.units import BAND
from mixchat.weights.matrix.encode import Grid, each_in_threads, encode
from mixchat.weights.matrix.quant_type import BlockCodes, Encoded, Inputs, on_device

_DENSE_PIECE = 2**18  # weights, whose temporary tensors fit in the caches


class NibbleCodes(BlockCodes):
    """Codes of 4 bits."""

    bits = 4
    levels: torch.Tensor

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1)  # [n * columns / 2, 2], n rows
        bands = nibbles.view(-1, BAND, columns // 2, 2).transpose(1, 2)
        lines = bands.reshape(-1, 2, BAND)  # [n * columns / 64, 2, 32]
        return lines[:, 0] | (lines[:, 1] << 4)

    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        packed = codes.view(-1, BAND)
        lines = torch.stack((packed & 0xF, packed >> 4), dim=1)  # [n * columns / 64, 2, 32]
        nibbles = lines.view(-1, columns // 2, BAND, 2).transpose(1, 2).reshape(-1, columns)
        return on_device(self.levels, codes.device)[nibbles.int()]


@dataclass(frozen=True)
class Quantized4bit:
    """A matrix in 4 bits, with flat codes and scales in the order of the rows."""

    quantization: NibbleCodes
    rows: int
    columns: int
    codes: torch.Tensor  # uint8
    # One for each block. It can be fp32 in place of bf16, as bitsandbytes computes with fp32.
    absmax: torch.Tensor
    levels: torch.Tensor | None = None  # of the codes, None for the type's own

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [rows, columns] as `dtype` (bf16, fp16, fp32)."""
        quantization = self.quantization
        weight = torch.empty(self.rows * self.columns, dtype=dtype)
        block = quantization.blocksize
        levels = quantization.levels if self.levels is None else self.levels

        def decode(codes: torch.Tensor, absmax: torch.Tensor, piece: torch.Tensor) -> None:
            nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1).view(-1)
            numbers = levels[nibbles.int()]
            # A block may begin within a row, and the last one may be short.
            blocks = functional.pad(numbers, (0, len(absmax) * block - len(numbers)))
            weights = blocks.view(-1, block) * quantization.scales(absmax).unsqueeze(-1)
            piece.copy_(weights.view(-1)[: len(piece)])

        each_in_threads(
            decode,
            (self.codes, _DENSE_PIECE // 2),
            (self.absmax, _DENSE_PIECE // block),
            (weight, _DENSE_PIECE),
        )
        return weight.view(self.rows, self.columns)

    def cut(self, rows: range) -> Quantized4bit:
        """Return some of the rows, which have to be whole blocks."""
        assert self.columns % self.quantization.blocksize == 0
        codes, absmax = (
            tensor.view(self.rows, -1)[rows.start : rows.stop : rows.step].reshape(-1)
            for tensor in (self.codes, self.absmax)
        )
        return replace(self, rows=len(rows), codes=codes, absmax=absmax)


# fmt: off
class _NF4Codes(NibbleCodes):
    units = FOUR_BITS
    name = "nf4"
    mixable = True
    levels = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])
    # fmt: on

    def __init__(self) -> None:
        self._grid = Grid(self.levels, 0.86, 1.36)

    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        return encode(self._grid, weight, two_a_byte, search=search, inputs=inputs)


NF4 = _NF4Codes()


def two_a_byte(codes: torch.Tensor) -> torch.Tensor:
    """Put codes uint8 [B, n] two in a byte, the even one in the high nibble, [B, n / 2]."""
    pairs = codes.numpy().view("<u2")  # even + 256 * odd
    return torch.from_numpy((pairs << 4 | pairs >> 8).astype(np.uint8))  # keeps the low byte


def round_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """Round scales to bf16, as they are stored. A scale changes by 1 part in 256 at most."""
    return absmax.to(torch.bfloat16)
