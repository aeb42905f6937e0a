"""Makes the parts of experts anew from the checkpoint, with codes that suit their inputs.

An expert learns from the rows of the tokens that chose it, and from a few of all tokens: an expert
that hardly any token chose is not fitted to those alone. Each fifth window of the text is held out:
its rows judge what the rest has taught (`encode.py`). Windows are held out as a whole, because
neighbours are alike.

D = hidden_size, F = intermediate_size.
"""

from __future__ import annotations

from collections import Counter

import torch

from mixchat.kernels import rows
from mixchat.weights.make.expert_inputs import ExpertInputs
from mixchat.weights.make.parts import Part
from mixchat.weights.matrix.gptq import Inputs, Way
from mixchat.weights.matrix.linear import DenseLinear
from mixchat.weights.source.checkpoint_index import CheckpointIndex, Read

FOLD = 5  # windows, of which the last is held out
_OF_ALL = 32  # rows of any tokens, beside those of the expert


class Calibrator:
    """Makes parts one after the other: an expert's w2 comes after its w13.

    window: tokens that were read or written in one piece.
    """

    def __init__(self, inputs: ExpertInputs, index: CheckpointIndex, read: Read, window: int):
        self._inputs, self._index, self._read, self._window = inputs, index, read, window
        self._w2_inputs = (torch.empty(0), torch.empty(0))
        self._ways, self._errors = Counter[Way](), 0.0

    @torch.inference_mode()
    def make(self, part: Part) -> list[torch.Tensor]:
        """Return the tensors of an expert's part."""
        assert part.linear is not None
        assert part.expert is not None
        weight = part.dense(self._index, self._read)
        if part.linear.name == "w2":
            return part.encoded(weight, Inputs(*self._w2_inputs, self._note))
        fit, held_out = self._rows(*part.expert)
        exact = DenseLinear(weight)
        self._w2_inputs = rows.swiglu(exact(fit)), rows.swiglu(exact(held_out))
        return part.encoded(weight, Inputs(fit, held_out, self._note))

    def report(self) -> str:
        """Return how many matrices were made in which way, and what that gained."""
        ways, count = self._ways, max(1, self._ways.total())
        return (
            f"of {count} matrices {ways['gptq']} are rounded with error feedback (GPTQ), "
            f"{ways['weighted']} have weighted scales, {ways['plain']} are as they were; on text "
            f"that was held out, the error of their products is {1 - self._errors / count:.0%} less"
        )

    def _note(self, way: Way, error: float, plain: float) -> None:
        self._ways[way] += 1
        self._errors += (error / plain) ** 0.5 if plain else 1.0

    def _rows(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows [n, D] that an expert learns from, and those that are held out."""
        every, chosen = self._inputs.of(layer, expert)
        last = torch.arange(len(every)) // self._window % FOLD == FOLD - 1
        return _some(every, chosen, ~last), _some(every, chosen, last)


def _some(every: torch.Tensor, chosen: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return the rows of a part [N] of all that chose an expert, and a few others."""
    places = part.nonzero().squeeze(-1)
    few = places[:: max(1, len(places) // _OF_ALL)][:_OF_ALL]
    return torch.cat((every[part & chosen], every[few]))
