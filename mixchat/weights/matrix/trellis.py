"""2-bit and 3-bit codes of a trellis, with one scale (`absmax`) for each block of 64 weights.

The numbers of 64 rows in a column make up a ring. Row j has bit j of a word of 64 bits, and bit j
of one plane (2 bits) or of two planes (3 bits), words of 64 bits, too. The window of row j is the
bits j to j + 6 of the first word, and bit 0 follows bit 63. So a number depends on seven rows, and
the search (`trellis_encode.py`) can choose among more sequences than separate codes have.

    subset = (window * FACTOR mod 2^16) >> 12
    index = subset + 16 * bit j of the first plane + 32 * bit j of the second plane

The number is an integer out of a table of 32 (or 64), which suits normal numbers. In 2 bits the
search leaves an error of 0.077 of their mean square, and four separate levels would leave 0.117. In
3 bits it leaves 0.020, and eight levels would leave 0.035 (trellis coded quantization, Marcellin
and Fischer 1990).

A scale is a float of 8 bits without a sign, with 5 bits of exponent and 3 of mantissa. 0 is 0. The
error of a number is about the same wherever the number lies, up to the largest number of the table.
So a block's scale is chosen for the least sum of two errors: the mean error of numbers times the
square of the scale, for each weight, and the squares by which larger weights exceed the largest
number.

In the order of the rows, for each band of 64 rows and each column, there is the ring in 64 bits,
then each plane. `kernels/cpu/trellis_units.py` describes the order of the kernels.

R = rows and C = columns, in whole rings and blocks of 64 weights. n = columns in rings. W = words
of a column in a ring.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from mixchat.kernels.cpu.trellis_encode import encode_trellis
from mixchat.kernels.cpu.trellis_units import (
    COLUMNS,
    RING,
    SCALE_EXPONENT,
    TRELLIS_2,
    TRELLIS_3,
    TURNS,
)
from mixchat.kernels.cpu.units import UnitSet
from mixchat.weights.matrix.encode import best_way
from mixchat.weights.matrix.gptq import (
    corrected,
    feedback_of,
    mean_squares,
    round_with_fitted_scales,
)
from mixchat.weights.matrix.quant_type import BLOCKSIZE, BlockCodes, Encoded, Inputs, QuantType, Way
from mixchat.weights.matrix.trellis_table import TrellisTable

_PIECE = 2**22  # weights that are rounded in one pass
_TINY = 1e-38
_FACTORS = torch.logspace(-0.2, 0.52, 22)  # that are tried, of the root of a block's mean square
_SCALE_BITS = 20  # of a float's mantissa that a scale lacks
_EXPONENTS = 2.0**SCALE_EXPONENT  # turns an exponent of 5 bits into one of 8
_SMALLEST, _LARGEST = 8, 255  # of the bytes of scales, besides 0
_FOURS = COLUMNS // 4
_ROW_WORDS = RING // 16  # of a column

# The last numbers were chosen by the errors of products in two of the demo's layers.
# fmt: off
TABLE_2 = TrellisTable((0, 4, 4, 8, 11, 14, 14, 20, 21, 24, 26, 30, 37, 45, 41, 63), 25.8, 0.0125)
TABLE_3 = TrellisTable((
    1, 1, 3, 3, 5, 5, 6, 7, 8, 9, 11, 10, 14, 12, 14, 15,
    17, 18, 19, 20, 23, 24, 26, 25, 29, 30, 35, 33, 41, 41, 50, 63,
), 21.6, 0.0035)
# fmt: on


class TrellisCodes(BlockCodes):
    """Codes of the trellis with one table."""

    scale_dtype = torch.uint8
    for_dense_parts = False
    mixable = True

    def __init__(self, name: QuantType, units: UnitSet, table: TrellisTable) -> None:
        self.name = name
        self.bits = units.bits
        self.units = units
        self.levels = table.levels
        self._table = table
        self.needs_calibration = self.bits == 2

    def codes(
        self, weight: torch.Tensor, *, search: bool = True, inputs: Inputs | None = None
    ) -> Encoded:
        """Return flat codes and absmax of whole rings of weight [R, C], always searched."""
        rows, columns = weight.shape
        whole = functional.pad(weight.float(), (0, 0, 0, -rows % RING))
        plain = _round_plainly(self._table, whole)
        if inputs is None:
            return plain

        def ways() -> Iterator[tuple[Way, Encoded]]:
            yield "plain", plain
            yield "gptq", _round_for_inputs(self._table, whole, inputs)

        def dense(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
            tensors = self.pack(codes, absmax, columns)
            return self.dequantize(tensors, (rows, columns), torch.float32)

        return best_way(ways(), dense, weight, inputs)

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return scales_of_bytes(absmax)

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        count = columns // COLUMNS
        # [bands, groups of columns, four, column in it, ring or plane, j, pass]
        whole = codes.view(-1, count, _FOURS, 4, self.bits, _ROW_WORDS, 2)
        # [..., four, pair, parity, j, byte]
        ring = whole[..., 0, :, :].reshape(-1, count, _FOURS, 2, 2, _ROW_WORDS, 2)
        ring = ring.permute(0, 1, 4, 2, 5, 3, 6).flatten(2)
        # [..., pass, four, j, column, plane]
        bits = whole[..., 1:, :, :].permute(0, 1, 6, 2, 5, 3, 4)
        if self.bits == 2:
            return torch.cat((ring, bits.flatten(2)), dim=-1)
        shifts = torch.arange(TURNS, dtype=torch.uint8, device=codes.device)
        turns = bits.unsqueeze(-1) >> shifts & 1
        pairs = turns[..., 0, :] | turns[..., 1, :] << 1  # [..., pass, four, j, column, turn]
        # A byte holds two bits of each of four turns: turns 0 to 3 in the first vectors, 4 to 7 in
        # the second.
        fours = pairs.view(*pairs.shape[:-1], 2, 4)
        joined = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
        return torch.cat((ring, joined.movedim(-1, -4).flatten(2)), dim=-1)

    def unpacked(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        """Undo `packed`. Return [bands, C / 16, 4, 4, ring or plane, 4, 2]."""
        count = columns // COLUMNS
        groups = codes.view(-1, count, self.bits * RING * COLUMNS // 8)
        size = RING * COLUMNS // 8
        ring = groups[..., :size].reshape(-1, count, 2, _FOURS, _ROW_WORDS, 2, 2)
        ring = ring.permute(0, 1, 3, 5, 2, 4, 6).flatten(3, 4).unsqueeze(4)
        if self.bits == 2:
            bits = groups[..., size:].reshape(-1, count, 2, _FOURS, _ROW_WORDS, 4, 1)
        else:
            # Bytes of four turns become pairs of bits. These become a byte of eight turns a plane.
            fours = groups[..., size:].reshape(-1, count, 2, 2, _FOURS, _ROW_WORDS, 4)
            shifts = torch.arange(TURNS, dtype=torch.uint8, device=codes.device)
            pairs = fours.movedim(3, -1).unsqueeze(-1) >> shifts[:4] * 2 & 3  # [..., column, 2, 4]
            planes = (pairs.flatten(-2) >> plane & 1 for plane in (0, 1))
            joined = [(plane << shifts).sum(-1, dtype=torch.uint8) for plane in planes]
            bits = torch.stack(joined, dim=-1)
        bits = bits.permute(0, 1, 3, 5, 6, 4, 2)
        return torch.cat((ring, bits), dim=4)

    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        words = self.unpacked(codes, columns).reshape(-1, self.bits, RING // 8)
        numbers = self._table.numbers(words)
        return numbers.view(-1, columns, RING).transpose(1, 2).reshape(-1, columns)

    def packed_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        bands, _, blocks = absmax.shape
        # [band, j, turn of both passes, block]
        return absmax.view(bands, _ROW_WORDS, 16, blocks).permute(0, 3, 2, 1).flatten(2)

    def unpacked_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        bands, blocks, _ = absmax.shape
        return absmax.view(bands, blocks, 16, _ROW_WORDS).permute(0, 3, 2, 1).flatten(1, 2)


def _round_plainly(table: TrellisTable, weight: torch.Tensor) -> Encoded:
    """Return flat codes and scales of weight [R, C], fp32, for the least error of the weights."""
    scales = _scales(table, weight, torch.ones(weight.shape[1]))
    wide = scales_of_bytes(scales).repeat_interleave(BLOCKSIZE, -1)
    size = max(1, _PIECE // (RING * weight.shape[1])) * RING
    pieces = zip(torch.split(weight, size), torch.split(wide, size), strict=True)
    words = torch.cat([_rounded(table, *piece)[0] for piece in pieces])
    return words.view(torch.uint8).view(-1), scales.view(-1)


def _round_for_inputs(table: TrellisTable, weight: torch.Tensor, inputs: Inputs) -> Encoded:
    """Return flat codes and scales for the least error of products with the inputs."""
    feedback = feedback_of(inputs.fit)
    weight = corrected(weight, feedback, inputs)
    scales = _scales(table, weight, mean_squares(inputs.fit))
    words = torch.empty(len(weight) // RING, weight.shape[1], table.bits, dtype=torch.int64)

    def rounded(index: int, column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        column_words, values = _rounded(table, column.unsqueeze(-1), scale.unsqueeze(-1))
        words[:, index] = column_words[:, 0]
        return values.squeeze(-1)

    fitted = round_with_fitted_scales(
        weight,
        scales_of_bytes(scales),
        rounded,
        feedback,
        lambda scales: scales_of_bytes(bytes_of_scales(scales)),
    )
    return words.view(torch.uint8).view(-1), bytes_of_scales(fitted).view(-1)


def _rounded(
    table: TrellisTable, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words [R / 64, n, W] and values [R, n] of weights [R, n] with these scales."""
    rows, columns = weight.shape
    # Scales are divided by the largest one of a ring, so that their squares stay in range.
    relative = scale.view(-1, RING, columns)
    relative = relative / relative.amax(1, keepdim=True).clamp(min=_TINY)
    x = (weight / scale.where(scale != 0, 1)).view(relative.shape)
    words, numbers = encode_trellis(_in_rings(x), _in_rings(relative.square()), table.levels)
    values = numbers.view(-1, columns, RING).transpose(1, 2).reshape(rows, columns) * scale
    return words.view(-1, columns, table.bits), values


def _in_rings(x: torch.Tensor) -> torch.Tensor:
    """Return numbers [R / 64, 64, n] as [R / 64 * n, 64]."""
    return x.transpose(1, 2).reshape(-1, RING)


def _scales(table: TrellisTable, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the scales [R, C / 64]. `importance` [C] is of squared errors."""
    blocks = weight.view(len(weight), -1, BLOCKSIZE)
    relative = (importance / importance.mean()).view(-1, BLOCKSIZE)
    sums, mean = relative.sum(-1), blocks.square().mean(-1).sqrt()  # [C / 64], [R, C / 64]
    magnitudes = blocks.abs()
    largest = float(table.levels[-1])
    best = torch.full_like(mean, torch.inf)
    result = bytes_of_scales(mean)
    for factor in _FACTORS:
        trial = bytes_of_scales(mean / table.sigma * factor)
        scale = scales_of_bytes(trial)
        beyond = (magnitudes - (largest * scale).unsqueeze(-1)).clamp_(min=0).square_()
        clipped = torch.einsum("rbc,bc->rb", beyond, relative)
        error = table.error * scale.square() * sums + clipped
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, trial, result)
    return result


def scales_of_bytes(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales, fp32, that bytes, uint8, stand for, in the same shape."""
    return (scales.int() << _SCALE_BITS).view(torch.float32) * _EXPONENTS


def bytes_of_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest bytes, uint8 [...], of scales, fp32 [...], that are not negative."""
    bits = (scales / _EXPONENTS).view(torch.int32) + (1 << _SCALE_BITS - 1) >> _SCALE_BITS
    return bits.clamp_(_SMALLEST, _LARGEST).masked_fill_(scales == 0, 0).byte()


TRELLIS2 = TrellisCodes("trellis2", TRELLIS_2, TABLE_2)
TRELLIS3 = TrellisCodes("trellis3", TRELLIS_3, TABLE_3)
