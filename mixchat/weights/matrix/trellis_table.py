"""The numbers of a trellis.

n = columns in rings, W = words of a column (the bits of a code), U = numbers of a subset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.kernels.cpu.trellis_units import RING, SUBSET_BITS, WINDOW, subset

_SUBSETS = 1 << SUBSET_BITS
_ONE = 64  # the integer of the table that means 1
_SHIFTS = torch.arange(8, dtype=torch.uint8)


class TrellisTable:
    """Numbers by index, and the subset of each window.

    upper: the second half of the integers. The first half is its mirror image. sigma: the root of
    the mean square of normal numbers that they suit best. error: the squared error to choose scales
    with, of a number among those with a mean square of 1.
    """

    def __init__(self, upper: Sequence[int], sigma: float, error: float) -> None:
        half = torch.tensor(upper)
        self.sigma = sigma / _ONE
        self.error = error * (sigma / _ONE) ** 2
        self.levels = torch.cat((-half.flip(0), half)) / _ONE  # [16 * planes]
        self.subsets = torch.tensor([subset(window) for window in range(1 << WINDOW)])
        self.by_subset = self.levels.view(-1, _SUBSETS)  # [U, 16]
        self.bits = len(self.by_subset).bit_length()

    def numbers(self, words: torch.Tensor) -> torch.Tensor:
        """Return the numbers, fp32 [n, 64], of words [n, W, 8]."""
        bits = (words.unsqueeze(-1) >> _SHIFTS.to(words.device) & 1).flatten(-2)  # [n, W, 64]
        # The first bits of the ring are repeated at its end, so that the last windows are slices,
        # too.
        ring = torch.cat((bits[:, 0], bits[:, 0, : WINDOW - 1]), dim=-1)
        window = ring[:, :RING]
        for bit in range(1, WINDOW):
            window = window | ring[:, bit : bit + RING] << bit
        index = self.subsets.to(words.device, torch.uint8)[window.int()]
        for plane in range(1, bits.shape[1]):
            index = index | bits[:, plane] << SUBSET_BITS - 1 + plane
        return self.levels.to(words.device)[index.int()]
