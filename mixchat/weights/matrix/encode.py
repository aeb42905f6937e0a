"""Encodes a matrix in codes of levels on the CPU, as bitsandbytes does or with better scales.

A block is 64 weights that share one scale. A code stands for the level nearest to weight / scale.

- By default the scale is absmax, the largest magnitude of the block. For NF4 the result has
  bitsandbytes' bits.
- With `search`, the scale is absmax times the best of 32 factors. Half of them are negative,
  because some blocks fit the mirror image of the levels better.
- With `inputs`, searched scales, weighted scales (by the inputs of a column), and GPTQ with fitted
  scales (`gptq.py`) are tried. Inputs that were held out decide.

N = weights, B = blocks, C = columns, F = factors (32), S = rows of the table (1025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mixchat.weights.matrix.gptq import (
    corrected,
    error_of_products,
    feedback_of,
    mean_squares,
    nearest_levels,
    round_with_fitted_scales,
)
from mixchat.weights.matrix.quant_type import BLOCKSIZE, Encoded, Inputs, Way

Pack = Callable[[torch.Tensor], torch.Tensor]  # packs codes [B, 64], one a byte
# The least absmax that bitsandbytes divides by.
_TINY = 1e-38
_PIECE = 2**19  # weights in one pass
# A thread takes about 13 MB. More threads would mostly wait for Python's lock.
_MAX_THREADS = 6
_STEPS = 512  # rows of the table from 0 to 1
# A margin above the rounding errors in the squared error of a block with absmax 1.
_MARGIN = 1e-5


class Grid:
    """The levels of a type, rising, and the factors that the search tries.

    16 go from `smallest` to `largest`, and 16 are their negatives.
    """

    def __init__(self, levels: torch.Tensor, smallest: float, largest: float) -> None:
        self.levels = levels
        self.boundaries = ((levels[1:] + levels[:-1]) / 2).numpy()
        factors = torch.linspace(smallest, largest, 16)
        self.factors = torch.cat((factors, -factors))  # [F]

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the codes uint8, one a byte, which count the boundaries below each weight."""
        values = scaled.numpy()
        count = np.zeros(values.shape, np.uint8)
        above = np.empty(values.shape, np.bool_)
        for boundary in self.boundaries:
            np.greater(values, boundary, out=above)
            np.add(count, above.view(np.uint8), out=count)
        return torch.from_numpy(count)

    @functools.cached_property
    def error_table(self) -> torch.Tensor:
        """Return the squared error [S, F] of weight / absmax from -1 to 1 under each factor."""
        scaled = torch.linspace(-1, 1, 2 * _STEPS + 1).unsqueeze(-1)
        codes = self.nearest(scaled / self.factors)
        return (scaled - self.factors * self.levels[codes.int()]).square()


def encode(
    grid: Grid,
    weight: torch.Tensor,
    pack: Pack,
    *,
    search: bool = False,
    inputs: Inputs | None = None,
) -> Encoded:
    """Return packed codes, flat, and scales (bf16 [N / 64]) of a matrix on the CPU.

    `weight` [rows, C] is of any float type and finite, and C is a multiple of 64. It is rounded to
    bf16, which makes absmax exact. With `search` no block's squared error grows.
    """
    if inputs is None:
        codes, scales = _rounded(grid, weight, search, None, pack)
        return codes.view(-1), scales

    def dense(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        values = grid.levels[codes.int()].mul_(scales.float().unsqueeze(-1))
        return values.view(weight.shape)

    codes, scales = best_way(_ways(grid, weight, inputs), dense, weight, inputs)
    return pack(codes).view(-1), scales


def best_way(
    ways: Iterable[tuple[Way, Encoded]],
    dense: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    inputs: Inputs,
) -> Encoded:
    """Return the codes and scales with the least error of products that were held out.

    The first way is the plain one. It is taken unless another is better. `dense` makes a matrix [R,
    C], like `weight`.
    """
    best: Encoded | None = None
    taken: Way = "plain"
    errors: dict[Way, float] = {}
    for way, coded in ways:
        errors[way] = error_of_products(dense(*coded), weight, inputs)
        if best is None or errors[way] < errors[taken]:
            best = coded
            taken = way
    assert best is not None
    inputs.chosen(taken, errors[taken], errors["plain"])
    return best


def _ways(grid: Grid, weight: torch.Tensor, inputs: Inputs) -> Iterator[tuple[Way, Encoded]]:
    """Yield the codes and scales of each way."""
    importance = mean_squares(inputs.fit)
    yield "plain", _rounded(grid, weight, True, None)
    codes, scales = _rounded(grid, weight, True, importance)
    yield "weighted", (codes, scales)
    feedback = feedback_of(inputs.fit)
    if inputs.exact is not None:
        weight = corrected(weight, feedback, inputs)
        scales = _rounded(grid, weight, True, importance)[1]
    by_column = torch.empty(weight.T.shape, dtype=torch.uint8)
    rounder = nearest_levels(grid.levels, by_column)
    fitted = round_with_fitted_scales(
        weight.float(),
        scales.float().view(len(weight), -1),
        rounder,
        feedback,
        lambda scales: scales.bfloat16().float(),
    )
    scales = fitted.bfloat16().view(-1)
    yield "gptq", (by_column.T.contiguous().view(-1, BLOCKSIZE), scales)


def _rounded(
    grid: Grid,
    weight: torch.Tensor,
    search: bool,
    importance: torch.Tensor | None,
    pack: Pack = lambda codes: codes,
) -> Encoded:
    """Return codes [B, bytes of a block], each the nearest to its weight, and scales [B].

    `importance` is fp32 [C]. `pack` is applied to each piece, which bounds the memory.
    """
    blocks = weight.detach().reshape(-1, BLOCKSIZE)
    of_row = weight.shape[-1] // BLOCKSIZE
    size = pack(torch.zeros(1, BLOCKSIZE, dtype=torch.uint8)).numel()
    codes = torch.empty(len(blocks), size, dtype=torch.uint8)
    scales = torch.empty(len(blocks), dtype=torch.bfloat16)

    def quantize(
        numbers: torch.Tensor, weights: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor
    ) -> None:
        weights = weights.to(torch.bfloat16).float()
        absmax = weights.abs().amax(-1)
        # Like bitsandbytes, this multiplies by 1 / absmax, which rounds differently than dividing.
        scaled = weights * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(-1)
        separate = grid.nearest(scaled)
        scales.copy_(absmax)
        if search:
            own = None if importance is None else importance.view(of_row, -1)[numbers % of_row]
            _search(grid, scaled, absmax, separate, scales, own)
        packed.copy_(pack(separate).view(packed.shape))

    tensors = (torch.arange(len(blocks)), blocks, codes, scales)
    each_in_threads(quantize, *((tensor, max(1, _PIECE // BLOCKSIZE)) for tensor in tensors))
    return codes, scales


def each_in_threads(work: Callable[..., None], *tensors: tuple[torch.Tensor, int]) -> None:
    """Call `work` in threads with the first pieces of all tensors, with the second, and so on.

    Each tensor comes with the length of its pieces. torch's own threads would wait for each other
    after every operation.
    """
    threads = torch.get_num_threads()
    alone = functools.partial(torch.set_num_threads, 1)
    pieces = [torch.split(tensor, length) for tensor, length in tensors]
    try:
        # This keeps torch from starting threads of its own in a thread, and in later ones.
        with ThreadPoolExecutor(min(threads, _MAX_THREADS), initializer=alone) as pool:
            # A caller's inference mode holds for its own thread only. `list` raises the errors of
            # threads.
            list(pool.map(torch.inference_mode()(work), *pieces))
    finally:
        torch.set_num_threads(threads)


def _search(
    grid: Grid,
    scaled: torch.Tensor,
    absmax: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    importance: torch.Tensor | None,
) -> None:
    """Replace the scales and codes of blocks that a factor of the grid makes better."""
    # The table has the errors of all factors by weight / absmax, rounded to 1/512. One look-up with
    # a sum of rows replaces 32 trials. Then the best factor is tried exactly.
    steps = (scaled * _STEPS + (_STEPS + 0.5)).to(torch.int32)
    errors = torch.nn.functional.embedding_bag(
        steps, grid.error_table, mode="sum", per_sample_weights=importance
    )  # [B, F]
    unit = absmax.clamp(min=_TINY)  # `scaled` is weight / unit
    trial = (absmax * grid.factors[errors.argmin(-1)]).to(torch.bfloat16)
    ratio = trial.float() / unit
    trial_codes = grid.nearest(scaled * (1.0 / ratio).unsqueeze(-1))
    error = _squared_error(grid, scaled, absmax / unit, codes, importance)
    trial_error = _squared_error(grid, scaled, ratio, trial_codes, importance)
    # If the trial is 0 or infinite, this compares 0 with 0, or NaN, which is not better.
    better = trial_error < error - _MARGIN * (1 if importance is None else importance.amax(-1))
    torch.where(better, trial, scales, out=scales)
    # Eight codes are chosen at once, as one number of 64 bits.
    wide = codes.view(torch.int64)
    trial_wide = trial_codes.view(torch.int64)
    torch.where(better.unsqueeze(-1), trial_wide, wide, out=wide)


def _squared_error(
    grid: Grid,
    scaled: torch.Tensor,
    ratio: torch.Tensor,
    codes: torch.Tensor,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sum [B] over a block of (scaled - ratio * level)^2. Codes [B, 64], ratio [B].

    With `importance` [B, 64], each summand times its own.
    """
    levels = grid.levels.index_select(0, codes.view(-1).int()).view_as(scaled)
    errors = levels.mul_(ratio.unsqueeze(-1)).sub_(scaled).square_()
    return (errors if importance is None else errors.mul_(importance)).sum(-1)
