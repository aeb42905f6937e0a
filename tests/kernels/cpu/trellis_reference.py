"""The search for the numbers of a trellis in torch, which the kernel is compared with.

The Viterbi algorithm chooses all numbers of a column in a ring together. It goes from row 63 up to
row 0. Between two rows it knows, for each window of 7 bits, the least error with which the rows
below can end in it. The window of row j is the window of row j + 1, shifted left, with bit j as its
last bit. A first search, begun in the middle of the ring, finds a window for row 0. A second one
begins and ends with that window.
"""

import torch

from mixchat.kernels.cpu.trellis_units import RING, SUBSET_BITS, WINDOW
from mixchat.weights.matrix.trellis_table import TrellisTable

_SUBSETS = 1 << SUBSET_BITS
_HALF = 1 << WINDOW - 1
_NEVER = 1e30
_SHIFTS = torch.arange(8, dtype=torch.uint8)


def search(
    table: TrellisTable, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and numbers with the least sum of weight * (x - number)^2 in each ring.

    x, weight and numbers are fp32 [n, 64]. Words are int64 [n, W].
    """
    x, weight = x.T, weight.T
    # The planes are free in each state, so each subset has one best number.
    errors = torch.full((RING, _SUBSETS, x.shape[1]), _NEVER)
    best = torch.zeros(errors.shape, dtype=torch.uint8)
    for index, numbers in enumerate(table.by_subset):
        error = (x.unsqueeze(1) - numbers.unsqueeze(-1)).square_()  # [64, 16, n]
        best.masked_fill_(error < errors, index)
        torch.minimum(errors, error, out=errors)
    errors.mul_(weight.unsqueeze(1))
    middle = RING // 2
    start = least_path(table, errors.roll(middle, 0), None)[middle]  # row 0's window
    windows = least_path(table, errors, start)
    subsets = table.subsets[windows]
    chosen = best.gather(1, subsets.unsqueeze(1)).squeeze(1)
    planes = [chosen >> plane & 1 for plane in range(table.bits - 1)]
    bits = torch.stack([(windows & 1).byte(), *planes]).permute(2, 0, 1).contiguous()  # [n, W, 64]
    eight = bits.view(*bits.shape[:2], -1, 8) << _SHIFTS
    words = eight.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1)
    return words, table.levels[chosen.long() * _SUBSETS + subsets].T


def least_path(
    table: TrellisTable, errors: torch.Tensor, start: torch.Tensor | None
) -> torch.Tensor:
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
