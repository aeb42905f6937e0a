"""6-bit codes with one scale (`absmax`) for each block of 64 weights.

A code is a number from 0 to 63, and a weight is (code - 32) / 32 times the scale of its block. The
scale is chosen for the least error (`encode.py`) and can be negative, so that the largest weight of
a block is at the end that has one level more.

The low four bits of codes and the others lie apart. Rows are taken 32 at a time, and columns 8 at a
time. A line is 32 words of 16 bits, for row 0 of one column, row 0 of the next, row 1 of the first,
and so on up to row 15. Code 2p of a word belongs to the pair of columns p. Code 2p + 1 belongs to
the same pair, 16 rows later. Low lines hold the low bits of four codes in a word. The last line
holds the other bits of them all.

In the order of the rows each block has 32 bytes with the low bits of two codes, the earlier one in
the low nibble. Then come 16 bytes with the other bits of 4 codes, the first one lowest.

N = weights, B = blocks of 64 weights, R = rows, C = columns.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.plane_units import CODES_OF_LOW, LOW_BITS, SIX_BITS
from mixchat.kernels.cpu.units import BAND
from mixchat.weights.matrix.encode import Grid, encode
from mixchat.weights.matrix.quant_type import BLOCKSIZE, BlockCodes, Encoded, Inputs

# Rows that are encoded at once. A head of 151,936 rows and 2,048 columns is 1.2 GB in fp32.
ROWS_AT_ONCE = 2**14
_EXTRA = 6 - LOW_BITS  # bits of a code in the high line
_COLUMNS = 16 // _EXTRA  # columns with their codes in one high line, which has words of 16 bits
_HALF = 32


class _EvenGrid(Grid):
    """Levels from -1 on, with equal distances."""

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        count = len(self.levels)
        return (scaled * (count // 2)).round_().add_(count // 2).clamp_(0, count - 1).byte()


class _Int6Codes(BlockCodes):
    name = "int6"
    bits = 6
    units = SIX_BITS
    for_experts = False
    calibrated_dense_parts = True

    def __init__(self) -> None:
        levels = torch.arange(-_HALF, _HALF) / _HALF
        self._grid = _EvenGrid(levels, 0.94, 1.09)  # the factors include 1

    def codes(
        self, weight: torch.Tensor, *, search: bool = True, inputs: Inputs | None = None
    ) -> Encoded:
        """Return flat codes [R * C / 64 * bytes of a block], and scales, always searched."""
        pieces = [
            encode(self._grid, piece, self._pack_blocks, search=True, inputs=inputs)
            for piece in torch.split(weight, ROWS_AT_ONCE)
        ]
        codes, absmax = zip(*pieces, strict=True)
        return torch.cat(codes), torch.cat(absmax)

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        # [bands, half, row in it, group of columns, pair of columns, column in it]
        pairs = _COLUMNS // 2
        blocks = codes.view(-1, BLOCKSIZE * self.bits // 8)
        cut = BLOCKSIZE * LOW_BITS // 8
        separate = _separate(blocks[:, :cut], LOW_BITS)
        separate |= _separate(blocks[:, cut:], _EXTRA) << LOW_BITS
        separate = separate.view(-1, 2, BAND // 2, columns // _COLUMNS, pairs, 2)
        lines = separate.permute(0, 3, 4, 1, 2, 5).reshape(-1, _COLUMNS, BAND)
        low = (lines & 0xF).view(-1, _COLUMNS // CODES_OF_LOW, CODES_OF_LOW, BAND)
        together = _joined(low.transpose(-1, -2), LOW_BITS).flatten(1)
        high = _joined((lines >> LOW_BITS).transpose(-1, -2), _EXTRA).flatten(1)
        return torch.cat((together, high), dim=-1)

    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        groups = codes.view(-1, BAND * _COLUMNS * self.bits // 8)
        cut = BAND * _COLUMNS * LOW_BITS // 8
        low = _separate(groups[:, :cut], LOW_BITS).view(len(groups), -1, BAND, CODES_OF_LOW)
        high = _separate(groups[:, cut:], _EXTRA).view(len(groups), BAND, -1)
        lines = low.transpose(-1, -2).reshape(len(groups), -1, BAND)
        lines = lines | high.transpose(-1, -2) << LOW_BITS
        separate = lines.view(-1, columns // _COLUMNS, _COLUMNS // 2, 2, BAND // 2, 2)
        numbers = separate.permute(0, 3, 4, 1, 2, 5).reshape(-1, columns).float()
        return numbers.sub_(_HALF).div_(_HALF)

    def _pack_blocks(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes [B, 64], one a byte, as [B, bytes of a block]."""
        low = _joined(codes & 0xF, LOW_BITS)
        high = _joined(codes >> LOW_BITS, _EXTRA)
        return torch.cat((low, high), dim=-1)


def _joined(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return numbers of `bits` bits [..., n], one a byte, as bytes [..., n * bits / 8]."""
    fields = numbers.reshape(*numbers.shape[:-1], -1, 8 // bits)
    result = fields[..., 0]
    for index in range(1, 8 // bits):
        result = result | fields[..., index] << bits * index
    return result


def _separate(joined: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers of bytes [..., n], one a byte, [..., n * 8 / bits]."""
    fields = [joined >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)


INT6 = _Int6Codes()
