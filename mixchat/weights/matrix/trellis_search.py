"""The numbers of a trellis, and the search for those with the least error.

The Viterbi algorithm chooses all numbers of a column in a ring together. It goes from row 63 up to
row 0. Between two rows it knows, for each window of 7 bits, the least error with which the rows
below can end in it. The window of row j is the window of row j + 1, shifted left, with bit j as its
last bit. A first search, begun in the middle of the ring, finds a window for row 0. A second one
begins and ends with that window.

n = columns in rings, W = words of a column (the bits of a code), U = numbers of a subset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.trellis_encode import encode_trellis, subset
from mixchat.kernels.cpu.trellis_units import RING, SUBSET_BITS, WINDOW

_SUBSETS = 1 << SUBSET_BITS
_ONE = 64  # the integer that stands for the number 1
_HALF = 1 << WINDOW - 1
_AT_ONCE = 256  # rings, whose costs fit in the second-level cache
_NEVER = 1e30
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
        self.by_subset = self.levels.view(-1, _SUBSETS)  # [U, 16]
        self.bits = len(self.by_subset).bit_length()

    def numbers(self, words: torch.Tensor) -> torch.Tensor:
        """Return the numbers, fp32 [n, 64], of words [n, W, 8]."""
        bits = (words.unsqueeze(-1) >> _SHIFTS.to(words.device) & 1).flatten(-2)  # [n, W, 64]
        # The ring goes on with its first bits, so that the last windows are slices, too.
        ring = torch.cat((bits[:, 0], bits[:, 0, : WINDOW - 1]), dim=-1)
        window = ring[:, :RING]
        for bit in range(1, WINDOW):
            window = window | ring[:, bit : bit + RING] << bit
        index = self.subsets.to(words.device, torch.uint8)[window.int()]
        for plane in range(1, bits.shape[1]):
            index = index | bits[:, plane] << SUBSET_BITS - 1 + plane
        return self.levels.to(words.device)[index.int()]


def nearest(
    table: Table, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and numbers with the least sum of weight * (x - number)^2 in each ring.

    x, weight and numbers are fp32 [n, 64]. Words are int64 [n, W].
    """
    if kernels_available():
        return encode_trellis(x, weight, table.levels)
    return search(table, x, weight)


def search(
    table: Table, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `nearest` without a kernel. Of equal sequences, it may return another one."""
    pieces = zip(torch.split(x, _AT_ONCE), torch.split(weight, _AT_ONCE), strict=True)
    results = [_search_rings(table, x.T, weight.T) for x, weight in pieces]
    words, numbers = map(torch.cat, zip(*results, strict=True))
    return words, numbers


def _search_rings(
    table: Table, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `search` of x and weight [64, n]."""
    # The planes are free in each state, so each subset has one best number.
    errors = torch.full((RING, _SUBSETS, x.shape[1]), _NEVER)
    best = torch.zeros(errors.shape, dtype=torch.uint8)
    for index, numbers in enumerate(table.by_subset):
        error = (x.unsqueeze(1) - numbers.unsqueeze(-1)).square_()  # [64, 16, n]
        best.masked_fill_(error < errors, index)
        torch.minimum(errors, error, out=errors)
    errors.mul_(weight.unsqueeze(1))
    middle = RING // 2
    start = _path(table, errors.roll(middle, 0), None)[middle]  # row 0's window
    windows = _path(table, errors, start)
    subsets = table.subsets[windows]
    chosen = best.gather(1, subsets.unsqueeze(1)).squeeze(1)
    planes = [chosen >> plane & 1 for plane in range(table.bits - 1)]
    bits = torch.stack([(windows & 1).byte(), *planes]).permute(2, 0, 1).contiguous()  # [n, W, 64]
    eight = bits.view(*bits.shape[:2], -1, 8) << _SHIFTS
    words = eight.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1)
    return words, table.levels[chosen.long() * _SUBSETS + subsets].T


def _path(table: Table, errors: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """Return the windows [64, n] with the least sum of the errors [64, 16, n] of their subsets.

    `start` [n] is the window of row 0, and of the row after the last one.
    """
    count = errors.shape[-1]
    costs = torch.zeros(2 * _HALF, count)
    if start is not None:
        costs.fill_(_NEVER).scatter_(0, start.unsqueeze(0), 0)
    from_high = torch.empty(RING, _HALF, count, dtype=torch.bool)
    for row in reversed(range(RING)):
        low, high = costs[:_HALF], costs[_HALF:]
        torch.lt(high, low, out=from_high[row])
        least = torch.minimum(low, high)
        costs = errors[row].index_select(0, table.subsets)
        costs.view(_HALF, 2, count).add_(least.unsqueeze(1))
    window = costs.argmin(0) if start is None else start
    windows = torch.empty(RING, count, dtype=torch.int64)
    for row in range(RING):
        windows[row] = window
        above = window >> 1  # without the bit of this row
        window = above + _HALF * from_high[row].gather(0, above.unsqueeze(0)).squeeze(0)
    return windows
