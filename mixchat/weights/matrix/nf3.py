"""3-bit codes with one scale (`absmax`) for each block of 64 weights, in two layouts.

A code is an index into a table of 8 levels from -1 to 1. A weight is its level times the scale of
its block, which is chosen for the least error (`encode.py`) and can be negative.

The levels leave the least error in blocks of 64 normal numbers (Lloyd's algorithm), 0.164 of the
weights' norm. The best symmetric ones leave 0.171.

Eight codes c0 to c7 lie in three bytes. Each byte has two of the first six, and above them two bits
of z = c6 + 8 * c7:

    c0 + 8 * c1 + 64 * (z & 3),  c2 + 8 * c3 + 64 * (z >> 2 & 3),  c4 + 8 * c5 + 64 * (z >> 4)

The layouts have the names and the scales of those in `nf4.py`. The eight codes differ:

- "bitsandbytes": eight weights of a row, one after the other. The last block is filled up.
- "cpu-packed": the kernel for CPUs reads it. Rows are taken 32 at a time, and columns 8 at a time:
  96 bytes, first all first ones of the three, then all second ones, then all third ones. Byte i of
  32 holds row i / 2 (the even codes) and row 16 + i / 2 (the odd ones). Codes 0 and 1 are of column
  i % 2, codes 2 and 3 of column 2 + i % 2, and so on.

N = weights, R = rows, C = columns, G = groups of eight codes.
"""

from __future__ import annotations

import torch

from mixchat.kernels.units import BAND, THREE_BITS
from mixchat.weights.matrix.encode import Grid, encode
from mixchat.weights.matrix.quant_type import (
    BLOCKSIZE,
    Encoded,
    Inputs,
    RowCodes,
    absmax_size,
)

_BITS = 3
_GROUP = 8  # codes


class _NF3Codes(RowCodes):
    name, bits, units = "nf3", _BITS, THREE_BITS
    levels = torch.tensor([-0.8042, -0.4888, -0.256, -0.0527, 0.1437, 0.3527, 0.6081, 1.0])
    # For a tenth more bytes the demo loses a third less.
    down_type = "nf4"

    def __init__(self) -> None:
        self._grid = Grid(self.levels, 0.60, 1.20)

    def codes_size(self, rows: int, columns: int) -> int:
        return absmax_size(rows, columns) * BLOCKSIZE * _BITS // 8

    def codes(
        self, weight: torch.Tensor, *, search: bool = True, inputs: Inputs | None = None
    ) -> Encoded:
        """Search always, because with absmax the error would be half as large again."""
        return encode(self._grid, weight, _pack_blocks, search=True, inputs=inputs)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(codes.device)
        return levels[unpack(codes.view(-1, _BITS)).view(-1).int()]

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        # [bands, half, row in it, group of columns, pair of columns, column in it]
        separate = unpack(codes.view(-1, _BITS)).view(-1, 2, BAND // 2, columns // _GROUP, 4, 2)
        together = separate.permute(0, 3, 2, 5, 4, 1).reshape(-1, _GROUP)
        return pack(together).view(-1, BAND, _BITS).transpose(1, 2)

    def unpacked(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        together = unpack(codes.view(-1, _BITS, BAND).transpose(1, 2))  # [n * C / 8, 32, 8]
        separate = together.view(-1, columns // _GROUP, BAND // 2, 2, 4, 2)
        return pack(separate.permute(0, 5, 2, 1, 4, 3).reshape(-1, _GROUP))


NF3 = _NF3Codes()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return codes [..., 8], uint8 and one a byte, as three bytes [..., 3]."""
    pairs = codes[..., ::2] | codes[..., 1::2] << 3  # [..., 4]
    rest = pairs[..., 3:] >> torch.tensor([0, 2, 4], dtype=torch.uint8, device=codes.device)
    packed: torch.Tensor = pairs[..., :3] | rest << 6
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes [..., 8], one a byte, of bytes [..., 3]."""
    rest = packed[..., 0] >> 6 | packed[..., 1] >> 6 << 2 | packed[..., 2] >> 6 << 4
    pairs = torch.cat((packed, rest.unsqueeze(-1)), dim=-1)  # [..., 4]
    return torch.stack((pairs & 7, pairs >> 3 & 7), dim=-1).flatten(-2)


def _pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Return codes [B, 64], one a byte, as [B, 24]."""
    return pack(codes.view(-1, BLOCKSIZE // _GROUP, _GROUP)).flatten(1)
