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

`trellis_order.py` has the order of the words and scales.

R = rows, C = columns, n = columns in rings, U = numbers of a subset.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from mixchat.kernels.cpu.trellis_units import RING, TRELLIS_2, TRELLIS_3
from mixchat.kernels.cpu.units import UnitSet
from mixchat.weights.matrix import trellis_order
from mixchat.weights.matrix.encode import best_way
from mixchat.weights.matrix.quant_type import BlockCodes, Encoded, Inputs, QuantType, Way
from mixchat.weights.matrix.trellis_encode import round_for_inputs, round_plainly
from mixchat.weights.matrix.trellis_table import Table, scales_of_bytes

# The last numbers were chosen by the error of products on inputs of two of the demo's layers.
# fmt: off
TABLE_2 = Table((0, 4, 4, 8, 11, 14, 14, 20, 21, 24, 26, 30, 37, 45, 41, 63), 25.8, 0.0125)
TABLE_3 = Table((
    1, 1, 3, 3, 5, 5, 6, 7, 8, 9, 11, 10, 14, 12, 14, 15,
    17, 18, 19, 20, 23, 24, 26, 25, 29, 30, 35, 33, 41, 41, 50, 63,
), 21.6, 0.0035)
# fmt: on


class TrellisCodes(BlockCodes):
    """Codes of a table."""

    scale_dtype, for_dense_parts, mixable = torch.uint8, False, True

    def __init__(self, name: QuantType, units: UnitSet, table: Table) -> None:
        self.name, self.bits, self.units = name, units.bits, units
        self.levels, self._table = table.levels, table
        self.needs_calibration = self.bits == 2

    def codes(
        self, weight: torch.Tensor, *, search: bool = True, inputs: Inputs | None = None
    ) -> Encoded:
        """Search always. Codes and absmax are of whole rings."""
        rows, columns = weight.shape
        whole = functional.pad(weight.float(), (0, 0, 0, -rows % RING))
        plain = _flat(*round_plainly(self._table, whole))
        if inputs is None:
            return plain

        def ways() -> Iterator[tuple[Way, Encoded]]:
            yield "plain", plain
            yield "gptq", _flat(*round_for_inputs(self._table, whole, inputs))

        def dense(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
            tensors = self.pack(codes, absmax, columns)
            return self.dequantize(tensors, (rows, columns), torch.float32)

        return best_way(ways(), dense, weight, inputs)

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return scales_of_bytes(absmax)

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        return trellis_order.packed(codes, columns, self.bits - 1)

    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        words = trellis_order.unpacked(codes, columns, self.bits - 1)
        numbers = self._table.numbers(words.reshape(-1, self.bits, RING // 8))
        return numbers.view(-1, columns, RING).transpose(1, 2).reshape(-1, columns)

    def packed_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return trellis_order.packed_scales(absmax)

    def unpacked_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return trellis_order.unpacked_scales(absmax)


def _flat(words: torch.Tensor, scales: torch.Tensor) -> Encoded:
    """Return flat codes and absmax of words [R / 64, C, W] and scales."""
    return words.view(torch.uint8).view(-1), scales.view(-1)


TRELLIS2 = TrellisCodes("trellis2", TRELLIS_2, TABLE_2)
TRELLIS3 = TrellisCodes("trellis3", TRELLIS_3, TABLE_3)
