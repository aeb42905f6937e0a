"""The contract between the model and its experts.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mixchat.experts.cache import ExpertKey, ExpertStats
    from mixchat.weights.format.expert import Expert


class LayerExperts(list["Expert"]):
    """The experts of a layer. Unlike a list, it can have weak references."""

    @cached_property
    def addresses(self) -> torch.Tensor:
        """Return the addresses of each expert's matrices [E, n], for packed ones."""
        return torch.tensor([expert.addresses for expert in self])


class ExpertRunner(Protocol):
    """Computes experts: all that the model needs."""

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs, [T, D] in the type of hidden_states.

        hidden_states: [T, D]. selected_experts: [T, K], int64. routing_weights: [T, K], float32.
        With `exact` a token's result does not depend on the others, as far as `Linear` can do it.
        """

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        """Return the experts of the first of these layers, as many as are in memory completely.

        The model may compute them without `run`, once. It then calls `note_hits`. Nothing is
        returned if experts have to make room for others. The memory is kept while the result lives.
        While a layer's experts stay where they are, its list is the same each time.
        """

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        """Note uses of experts that `resident` has returned.

        selected: [layers, K], the experts of `layer` and of the layers after it.
        """


class ExpertHolder(ExpertRunner, Protocol):
    """Holds experts and computes them: all that `Engine` needs."""

    @property
    def stats(self) -> ExpertStats:
        """Return the counts since the start. Later uses do not change them."""

    @property
    def slots(self) -> int:
        """Return how many experts this machine's devices may hold."""

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each tier but the disk, the fastest one first."""

    @property
    def bytes_held(self) -> int:
        """Return the bytes that experts take on this machine's devices."""

    @property
    def is_filling(self) -> bool:
        """Return whether experts that nobody needs yet are on their way."""

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert's fastest copy: `device`, `host` and so on."""

    def begin_turn(self) -> None:
        """Connect again to lost workers. This is called before each prompt."""

    def give_way(self, number: int | None = None) -> bool:
        """Hold fewer experts on a GPU whose memory ran out, or on all. Return False without any."""

    def close(self) -> None:
        """Free all experts, and leave the workers. Nothing can be computed then."""
