"""The numbers of a trellis, and how words of 64 bits say which number each row of a ring has.

n = columns in rings, W = words of a column (the bits of a code).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.kernels.cpu.trellis_encode import subset
from mixchat.kernels.cpu.trellis_units import RING, SCALE_EXPONENT, SUBSET_BITS, WINDOW

SUBSETS = 1 << SUBSET_BITS
_ONE = 64  # the integer that stands for the number 1
_SCALE_BITS = 20  # of a float below those of a scale
_EXPONENTS = 2.0**SCALE_EXPONENT  # makes an exponent of 8 bits out of one of 5
_SMALLEST, _LARGEST = 8, 255  # bytes of scales, but for 0
_SHIFTS = torch.arange(8, dtype=torch.uint8)


class Table:
    """Numbers by index, and the subset of each window.

    upper: the second half of the integers. The first half is its mirror image. sigma: the root of
    the mean square of normal numbers that they suit best. error: the squared error to choose scales
    with, of a number among those with a mean square of 1.
    """

    def __init__(self, upper: Sequence[int], sigma: float, error: float) -> None:
        half = torch.tensor(upper)
        self.sigma, self.error = sigma / _ONE, error * (sigma / _ONE) ** 2
        self.levels = torch.cat((-half.flip(0), half)) / _ONE  # [16 * planes]
        self.subsets = torch.tensor([subset(window) for window in range(1 << WINDOW)])
        self.by_subset = self.levels.view(-1, SUBSETS)  # [U, 16]
        self.bits = len(self.by_subset).bit_length()

    def numbers(self, words: torch.Tensor) -> torch.Tensor:
        """Return the numbers, fp32 [n, 64], of words [n, W, 8]."""
        bits = bits_of(words)
        # The ring goes on with its first bits, so that the last windows are slices, too.
        ring = torch.cat((bits[:, 0], bits[:, 0, : WINDOW - 1]), dim=-1)
        window = ring[:, :RING]
        for bit in range(1, WINDOW):
            window = window | ring[:, bit : bit + RING] << bit
        index = self.subsets.to(words.device, torch.uint8)[window.int()]
        for plane in range(1, bits.shape[1]):
            index = index | bits[:, plane] << SUBSET_BITS - 1 + plane
        return self.levels.to(words.device)[index.int()]


def words_of(bits: torch.Tensor) -> torch.Tensor:
    """Return bits [n, W, 64], uint8, as words, int64 [n, W]."""
    eight = bits.view(*bits.shape[:2], -1, 8) << _SHIFTS
    return eight.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1)


def bits_of(words: torch.Tensor) -> torch.Tensor:
    """Return the bits of words [n, W, 8], the first one lowest, uint8 [n, W, 64]."""
    return (words.unsqueeze(-1) >> _SHIFTS.to(words.device) & 1).flatten(-2)


def scales_of_bytes(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales, fp32, that bytes stand for."""
    return (scales.int() << _SCALE_BITS).view(torch.float32) * _EXPONENTS


def bytes_of_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest bytes, uint8, of scales that are not negative, fp32."""
    bits = (scales / _EXPONENTS).view(torch.int32) + (1 << _SCALE_BITS - 1) >> _SCALE_BITS
    return bits.clamp_(_SMALLEST, _LARGEST).masked_fill_(scales == 0, 0).byte()
