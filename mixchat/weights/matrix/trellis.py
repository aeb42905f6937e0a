"""2-bit and 3-bit codes of a trellis, with one scale (`absmax`) for each block of 64 weights.

The numbers of 64 rows in a column make up a ring. Row j has bit j of a word of 64 bits, and bit j
of one plane (2 bits) or of two planes (3 bits), words of 64 bits, too. The window of row j is the
bits j to j + 6 of the first word, and bit 0 follows bit 63. So a number depends on seven rows, and
the search (`trellis_search.py`) can choose among more sequences than separate codes have.

    subset = (window * FACTOR mod 2^16) >> 12
    index = subset + 16 * bit j of the first plane + 32 * bit j of the second plane

The number is an integer out of a table of 32 (or 64), which suits normal numbers. The search leaves
0.077 of their mean square as an error in 2 bits, and four separate levels leave 0.117. In 3 bits it
leaves 0.020, and eight levels 0.035 (trellis coded quantization, Marcellin and Fischer 1990).

A scale is a float of 8 bits without a sign, with 5 bits of exponent and 3 of mantissa. 0 is 0.

The layout "bitsandbytes" has the words of each column of the first ring, then those of the second.
Rows of zeros fill up the last ring. A short block ends a row if its columns are not whole blocks.

R = rows, C = columns, n = columns in rings, U = numbers of a subset.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from mixchat.base.safetensors import TensorSpec
from mixchat.kernels.cpu.trellis_units import RING, TRELLIS_2, TRELLIS_3
from mixchat.kernels.cpu.units import UnitSet
from mixchat.weights.matrix import trellis_layout
from mixchat.weights.matrix.encode import best_way
from mixchat.weights.matrix.quant_type import (
    BLOCKSIZE,
    Encoded,
    Inputs,
    QuantType,
    RowCodes,
    Shape,
    Way,
)
from mixchat.weights.matrix.trellis_encode import round_for_inputs, round_plainly
from mixchat.weights.matrix.trellis_table import Table, scales_of_bytes

_PIECE = 2**20  # weights that are decoded at once
# The last numbers were chosen by the error of products on inputs of two of the demo's layers.
# fmt: off
TABLE_2 = Table((0, 4, 4, 8, 11, 14, 14, 20, 21, 24, 26, 30, 37, 45, 41, 63), 25.8, 0.0125)
TABLE_3 = Table((
    1, 1, 3, 3, 5, 5, 6, 7, 8, 9, 11, 10, 14, 12, 14, 15,
    17, 18, 19, 20, 23, 24, 26, 25, 29, 30, 35, 33, 41, 41, 50, 63,
), 21.6, 0.0035)
# fmt: on


class TrellisCodes(RowCodes):
    """Codes of a table."""

    scale_dtype, for_dense_parts, mixable = torch.uint8, False, True

    def __init__(self, name: QuantType, units: UnitSet, table: Table) -> None:
        self.name, self.bits, self.units = name, units.bits, units
        self.levels, self._table = table.levels, table
        self.needs_calibration = self.bits == 2

    def stored_rows(self, rows: int, columns: int) -> int:
        return -(-rows // RING) * RING

    def codes_size(self, rows: int, columns: int) -> int:
        return rows * columns * self.bits // 8

    def tensors(self, name: str, shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = self.stored_rows(*shape), shape[1]
        return [
            TensorSpec(f"{name}.absmax", torch.uint8, (rows * -(-columns // BLOCKSIZE),)),
            TensorSpec(f"{name}.codes", torch.uint8, (self.codes_size(rows, columns),)),
        ]

    def codes(
        self, weight: torch.Tensor, *, search: bool = True, inputs: Inputs | None = None
    ) -> Encoded:
        """Search always. GPTQ needs C to be a multiple of 64."""
        rows, columns = weight.shape
        whole = functional.pad(weight.float(), (0, -columns % BLOCKSIZE, 0, -rows % RING))
        plain = _flat(*round_plainly(self._table, whole), columns)
        if inputs is None:
            return plain

        def ways() -> Iterator[tuple[Way, Encoded]]:
            yield "plain", plain
            if whole.shape[1] == columns:
                rounded = round_for_inputs(self._table, whole, inputs)
                yield "gptq", _flat(*rounded, columns)

        def dense(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
            return self.dequantize(codes, absmax, (rows, columns), torch.float32)

        return best_way(ways(), dense, weight, inputs)

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return scales_of_bytes(absmax)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers, fp32 [n, 64], of the flat words of n columns in rings."""
        return self._table.numbers(codes.view(-1, self.bits, RING // 8))

    def rows_of(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: Shape, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        rows, columns = shape
        rings = codes.view(-1, columns * self.bits * RING // 8)
        scales = self.scales(absmax).view(len(rings), RING, -1)
        size = max(1, _PIECE // (RING * columns))  # rings
        for start in range(0, len(rings), size):
            piece = rings[start : start + size]
            numbers = self.decode(piece).view(len(piece), columns, RING).transpose(1, 2)
            wide = scales[start : start + size].repeat_interleave(BLOCKSIZE, -1)[..., :columns]
            weight = (numbers * wide).reshape(-1, columns)
            yield weight[: rows - start * RING].to(dtype)

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        return trellis_layout.packed(codes, columns, self.bits - 1)

    def unpacked(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        return trellis_layout.unpacked(codes, columns, self.bits - 1)

    def to_packed_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> Encoded:
        scales = trellis_layout.packed_scales(absmax, rows)
        return self._reordered(self.packed, codes, columns), scales

    def to_bitsandbytes_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> Encoded:
        scales = trellis_layout.unpacked_scales(absmax, rows)
        return self._reordered(self.unpacked, codes, columns), scales


def _flat(words: torch.Tensor, scales: torch.Tensor, columns: int) -> Encoded:
    """Return flat codes and absmax of words [R / 64, C, W] and scales, without added columns."""
    return words[:, :columns].contiguous().view(torch.uint8).view(-1), scales.view(-1)


TRELLIS2 = TrellisCodes("trellis2", TRELLIS_2, TABLE_2)
TRELLIS3 = TrellisCodes("trellis3", TRELLIS_3, TABLE_3)
