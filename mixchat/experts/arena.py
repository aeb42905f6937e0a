"""The memory of a GPU's slots, in a few large pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# torch takes memory in multiples of 2 MB. Slots as tensors of their own lost 4.6% of it for Qwen3
# and 19.5% for LFM2, whose experts it puts into 20 MB by eights and by threes. Large pieces lose
# less than half a percent. An eighth of them can be given back, so those of few slots are smaller.
_PIECE_BYTES = 2**29
_LEAST_PIECES = 8


class Arena:
    """Blocks of memory of these sizes, by their numbers.

    The blocks of the last piece are given back first, and taken again last.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        self._device = device
        self._sizes = sizes
        self._pieces = _divided(sizes)
        self.blocks: dict[int, torch.Tensor] = {}
        self._taken = 0  # pieces
        while self._taken < len(self._pieces):
            self.take()

    @property
    def nbytes(self) -> int:
        return sum(self._sizes[number] for number in self.blocks)

    @property
    def pieces(self) -> Sequence[range]:
        """Return the numbers of the blocks in each piece that is taken."""
        return self._pieces[: self._taken]

    @property
    def next_size(self) -> int | None:
        """Return the bytes of the piece that `take` takes, None if all are taken."""
        if self._taken == len(self._pieces):
            return None
        return sum(self._sizes[number] for number in self._pieces[self._taken])

    def take(self) -> range:
        """Take a piece, and return its blocks. Raises `torch.OutOfMemoryError`."""
        numbers = self._pieces[self._taken]
        sizes = [self._sizes[number] for number in numbers]
        # A thread that is not in inference mode fills it.
        with torch.inference_mode(False):
            piece = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self.blocks |= zip(numbers, torch.split(piece, sizes), strict=True)
        self._taken += 1
        return numbers

    def give_back(self) -> None:
        """Free the last piece. Whoever has a view of a block keeps its memory."""
        self._taken -= 1
        for number in self._pieces[self._taken]:
            del self.blocks[number]


def _divided(sizes: Sequence[int]) -> list[range]:
    """Return the numbers of the blocks of each piece."""
    most = min(_PIECE_BYTES, sum(sizes) // _LEAST_PIECES)
    pieces: list[range] = []
    room = 0
    for number, size in enumerate(sizes):
        if not pieces or size > room:
            pieces.append(range(number, number))
            room = most
        pieces[-1] = range(pieces[-1].start, number + 1)
        room -= size
    return pieces
