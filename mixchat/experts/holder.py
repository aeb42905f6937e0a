"""The contract between the model and its experts, wherever these are.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from mixchat.experts.keys import ExpertKey
    from mixchat.experts.layer_rows import LayerRows
    from mixchat.experts.stats import ExpertStats
    from mixchat.weights.format.blueprint import Expert


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
        """Return the weighted sum of the selected experts' outputs, for each token.

        hidden_states: [T, D]; selected_experts: [T, K], int64; routing_weights: [T, K], float32.
        Returns [T, D] in the type of hidden_states. With `exact` a token's result does not depend
        on the others, as far as `Linear` can do that.
        """

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        """Return the experts of the first of these layers, as many as are in memory completely.

        The model may compute them without `run`, once, and says then by `note_hits` which it used.
        Where room has to be made for others, nothing is returned. The memory of experts is not
        given back as long as the result lives.
        """

    def note_hits(self, keys: Sequence[ExpertKey]) -> None:
        """Note that these experts of a layer, which `resident` has returned, were used."""


class ExpertHolder(ExpertRunner, Protocol):
    """Holds experts and computes them: all that `Engine` needs.

    On one device, spread over several, or over other machines.
    """

    @property
    def stats(self) -> ExpertStats:
        """Return the counts since the start; they change with each run."""

    @property
    def slots(self) -> int:
        """Return how many experts may be held where they are computed."""

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each tier but the disk, the fastest one first."""

    @property
    def bytes_held(self) -> int:
        """Return the bytes of memory that experts take where they are computed."""

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert's fastest copy: `device`, `host` and so on."""

    def begin_turn(self) -> None:
        """Take up workers again that were lost; this is called before each prompt."""

    def halve(self, number: int | None = None) -> bool:
        """Hold half as many experts from now on; return False where that would be too few.

        number: that of the GPU whose memory ran out; None halves those of all devices.
        """

    def close(self) -> None:
        """Give all memory of experts back, and leave the workers; nothing can be computed then."""


class WorkerExperts(Protocol):
    """A worker on another machine, as the side that chats sees it. No method raises its faults."""

    @property
    def held(self) -> Collection[ExpertKey]:
        """Return the experts that it holds; none while it is lost."""

    def begin_turn(self) -> None:
        """Connect again, if the worker was lost."""

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        """Send the rows of these experts."""

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        """Store the outputs in `rows`; return the experts that it has not computed."""

    def close(self) -> None:
        """End the chat with the worker, which can then serve another one."""
