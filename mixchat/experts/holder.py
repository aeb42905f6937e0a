"""The contract between the model and its experts.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mixchat.experts.cache import ExpertKey, ExpertStats
    from mixchat.experts.layer_rows import LayerRows
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


class ExpertMemory(Protocol):
    """What a tier tells of itself: a GPU's or RAM."""

    @property
    def slots(self) -> int:
        """Return how many experts it may hold."""

    @property
    def nbytes(self) -> int:
        """Return the bytes that experts take."""

    @property
    def is_filling(self) -> bool:
        """Return whether experts that nobody needs yet are on their way."""

    def holds(self, key: ExpertKey) -> bool:
        """Return whether the expert can be computed there at once."""


class WorkerExperts(Protocol):
    """A worker on another machine. No method raises its faults."""

    @property
    def held(self) -> Collection[ExpertKey]:
        """Return the experts that it holds, or none while it is lost."""

    def begin_turn(self) -> None:
        """Connect again if the worker was lost."""

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        """Send the rows of these experts."""

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        """Store the outputs in `rows`, and return the experts that it has not computed."""

    def close(self) -> None:
        """End the chat with the worker."""


class ExpertHolder(ExpertRunner, Protocol):
    """Holds experts and computes them: all that `Engine` needs.

    tiers: the memories of this machine by their names, the fastest ones first.
    """

    tiers: Mapping[str, Sequence[ExpertMemory]]
    workers: Sequence[WorkerExperts]

    @property
    def stats(self) -> ExpertStats:
        """Return the counts since the start. Later uses do not change them."""

    @property
    def slots(self) -> int:
        """Return how many experts this machine's devices may hold."""
        return sum(tier.slots for tier in chain(*self.tiers.values()))

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each tier but the disk, the fastest one first."""
        slots = {name: sum(tier.slots for tier in tiers) for name, tiers in self.tiers.items()}
        if self.workers:
            slots["worker"] = sum(len(worker.held) for worker in self.workers)
        return slots

    @property
    def bytes_held(self) -> int:
        """Return the bytes that experts take on this machine's devices."""
        return sum(tier.nbytes for tier in chain(*self.tiers.values()))

    @property
    def is_filling(self) -> bool:
        """Return whether experts that nobody needs yet are on their way."""
        return any(tier.is_filling for tier in chain(*self.tiers.values()))

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert's fastest copy: `device`, `host` and so on."""
        for name, tiers in self.tiers.items():
            if any(tier.holds(key) for tier in tiers):
                return name
        return "worker" if any(key in worker.held for worker in self.workers) else "disk"

    def holds(self, key: ExpertKey) -> bool:
        """Return whether this machine's devices hold the expert."""
        return any(tier.holds(key) for tier in chain(*self.tiers.values()))

    def begin_turn(self) -> None:
        """Connect again to lost workers. This is called before each prompt."""

    def give_way(self, number: int | None = None) -> bool:
        """Hold fewer experts on a GPU whose memory ran out, or on all. Return False without any."""

    def close(self) -> None:
        """Free all experts, and leave the workers. Nothing can be computed then."""
