"""Computes experts in RAM on the CPU.

n = rows of an expert, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, islice, takewhile

import torch

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.holder import LayerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.tier import Tier
from mixchat.kernels.cpu.program import Program, alone
from mixchat.kernels.cpu.rows import weighted_sum
from mixchat.kernels.cpu.units import MANY
from mixchat.weights.format.expert import Expert, ExpertSlots, compute_together

_LOADS_AHEAD = 2  # experts on their way while one is computed
_GROUPS = 4  # of a prompt's experts of a layer, which are computed as they arrive
# Numbers of x for experts that are computed together, which fit in a CPU's cache.
_MAX_X_NUMBERS = 2**21
# Of rows and experts that a program computes. Others have programs of their own in each call.
_MAX_PAIRS = 256
_MAX_PROGRAMS = 8  # that are kept, each with some megabytes


class HostCompute:
    """Computes experts out of slots in RAM. Two slots are enough.

    experts: of a layer. forms: a number for each layer. Layers whose experts have the same form
    have the same number. None if all layers do.
    """

    def __init__(self, ram: Tier, experts: int, forms: Sequence[int] | None = None) -> None:
        self.ram = ram
        self._experts = experts
        self._forms = forms
        self._order: list[ExpertKey] = []  # those that are still to be computed
        self._least = 1  # the least experts that are computed together, if as many are left
        self._unrequested: list[ExpertKey] = []
        # By rows, pairs and the form of the experts. The most recently used one comes last.
        self._programs: dict[tuple[int, int, int], RowExperts] = {}
        self._keys: dict[int, list[ExpertKey]] = {}  # of all experts of a layer

    def begin(self, rows: LayerRows, keys: Collection[ExpertKey]) -> None:
        """Start loading these experts, for `compute_next`, as far as there are slots."""
        self.ram.settle(rows.layer, keys)
        self._order = [*keys]
        self._sort()
        # The threads of a program wait for each other again and again, and for a core while reads
        # touch new memory. Computing Qwen3's experts as they came made the prompt of a cold start
        # take 5.0 and 5.3 s instead of 4.0 and 3.9, by turns.
        self._least = 1 if rows.is_one_token else max(len(self._order) // _GROUPS, 1)
        self._request()

    def prefetch(self, keys: Iterable[ExpertKey], *, certain: bool) -> None:
        """Start loading predicted experts, after the experts of `begin`.

        certain: as in `Tier.prefetch`.
        """
        self.ram.prefetch(keys, pinned=self._order, certain=certain)

    def compute_next(self, rows: LayerRows) -> bool:
        """Compute the next experts of `begin` into `rows`. Return False if none was left.

        Experts that have arrived are computed together.
        """
        if not self._order:
            return False
        interrupts.check()
        self._request()
        requested = self._order[: len(self._order) - len(self._unrequested)]
        for key in requested[: self._least]:
            self.ram.wait(key)
        # Slots for the loads ahead stay free of experts that are in use.
        ahead = min(_LOADS_AHEAD, self.ram.slots - 1) if self._unrequested else 0
        room = self.ram.slots - ahead
        keys = [*islice(takewhile(self.ram.has_ended, requested), room)]
        if not rows.is_one_token:
            most = _MAX_X_NUMBERS // rows.hidden_states.shape[1]
            totals = accumulate(rows.counts[key] for key in keys)
            count = sum(1 for _ in takewhile(lambda total: total <= most, totals))
            keys = keys[: max(count, 1)]
        del self._order[: len(keys)]
        self._request(keys)
        self._compute_together(rows, keys)
        return True

    def _compute_together(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        experts = LayerExperts(self.ram.ready(key) for key in keys)
        counts = [rows.counts[key] for key in keys]
        x = rows.hidden_states
        pairs = rows.memory.shape[0]
        if not experts[0].has_stages(x):
            for key, expert in zip(keys, experts, strict=True):
                interrupts.check()
                rows.put(key, expert(rows.of(key), exact=rows.exact))
        elif self._is_few(x, pairs, exact=rows.exact):
            program = self._program(rows.layer, experts[0], x, pairs)
            # `repeat_interleave` starts torch's threads, which took a sixth of a token's time.
            numbers = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)])
            outputs = program(x, experts.addresses, numbers, rows.tokens_of(keys))
            for key, output in zip(keys, torch.split(outputs, counts), strict=True):
                rows.put(key, output)
        else:
            outs = [rows.output_of(key) for key in keys]
            compute_together(experts, x, rows.tokens_of(keys), outs, exact=rows.exact)

    def run_resident(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected: torch.Tensor,
        weights: torch.Tensor,
        *,
        exact: bool,
    ) -> torch.Tensor | None:
        """Return `ExpertRunner.run` of few rows if the layer's experts are in memory, else None.

        Nothing is asked of each expert, which would take as long as to compute it.
        """
        if not self._is_few(hidden_states, selected.numel(), exact=exact):
            return None
        if layer not in self._keys:
            self._keys[layer] = [ExpertKey(layer, expert) for expert in range(self._experts)]
        resident = self.ram.resident([self._keys[layer]])
        if not resident or not resident[0][0].has_stages(hidden_states):
            return None
        pairs = selected.numel()
        experts = resident[0]
        program = self._program(layer, experts[0], hidden_states, pairs)
        tokens = torch.arange(pairs) // selected.shape[1]
        outputs = program(hidden_states, experts.addresses, selected.flatten(), tokens)
        self.ram.note_hits(layer, [[*{*selected.flatten().tolist()}]])
        return weighted_sum(outputs, weights, program.places.view(selected.shape))

    def _is_few(self, x: torch.Tensor, pairs: int, *, exact: bool) -> bool:
        """Return whether a program computes the pairs of rows and experts."""
        # Of more rows an expert may round x otherwise.
        return pairs <= _MAX_PAIRS and (exact or x.shape[0] < MANY)

    def _program(self, layer: int, expert: Expert, x: torch.Tensor, pairs: int) -> RowExperts:
        # A program has the form of its experts, and gets their addresses with each call.
        program_key = len(x), pairs, self._forms[layer] if self._forms else 0
        program = self._programs.pop(program_key, None)
        program = program or RowExperts(expert, x, pairs, self._experts)
        self._programs[program_key] = program
        if len(self._programs) > _MAX_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program

    def _sort(self) -> None:
        """Put the experts to compute in their order. All are to be requested again."""
        # Experts in their slots come first. Otherwise a prefill with more experts than slots would
        # evict each just before its turn. The others come in the order of their file.
        self._order.sort(key=lambda key: (self.ram.state(key), key))
        self._unrequested = list(self._order)

    def _request(self, in_use: Sequence[ExpertKey] = ()) -> None:
        while self._unrequested:
            count = self.ram.request(self._unrequested, {*self._order, *in_use})
            del self._unrequested[:count]
            if in_use or len(self._unrequested) < len(self._order):
                return
            # The first one's earlier load has failed, and others on their way have all slots.
            self._sort()


class RowExperts:
    """Computes experts for rows of x [N, D] in one program, on the CPU.

    `expert` is any of their form, and `x` are any rows of their type. A pair is a row and an expert
    that it has chosen. A call has up to `pairs` pairs and `experts` experts. `places` are those of
    the last call's pairs among its outputs.
    """

    def __init__(self, expert: Expert, x: torch.Tensor, pairs: int, experts: int) -> None:
        self._x = torch.empty_like(x)
        self._pairs = torch.zeros(2, pairs, dtype=torch.int64)
        slots = ExpertSlots(expert, self._x, pairs)
        self._outputs = slots.outputs
        self.places = slots.places
        table = torch.zeros(experts, len(expert.addresses), dtype=torch.int64)
        self._arrange = slots.arrange(self._pairs[0], self._pairs[1], table)
        self._program = Program([alone(self._arrange), *slots.stages])

    def __call__(
        self, x: torch.Tensor, addresses: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the outputs of all pairs, expert by expert, which the next call overwrites.

        addresses: of the experts' matrices [E, n]. experts, rows: their numbers in each pair.
        """
        count = len(rows)
        self._x.copy_(x)
        self._pairs[0, :count], self._pairs[1, :count] = experts, rows
        self._arrange.set(table=addresses.data_ptr(), count=len(addresses), pairs=count)
        self._program.run()
        return self._outputs[:count]
