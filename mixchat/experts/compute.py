"""Computes experts in RAM on the CPU.

n = rows of an expert, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, islice, takewhile

import torch

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.fetcher import Fetcher
from mixchat.experts.layer_rows import LayerRows
from mixchat.kernels.cpu.program import Program, alone
from mixchat.kernels.cpu.router import look_up_step
from mixchat.weights.format.expert import Expert, compute_together

_LOADS_AHEAD = 2  # experts on their way while one is computed
# Numbers of x for experts that are computed together, which fit in a CPU's cache.
_MAX_X_NUMBERS = 2**21


class HostCompute:
    """Computes experts out of slots in RAM. Two slots are enough.

    forms: a number for each layer. Layers whose experts have the same form have the same number.
    None if all layers do.
    """

    def __init__(self, fetcher: Fetcher, forms: Sequence[int] | None = None) -> None:
        self.fetcher, self._forms = fetcher, forms
        self._order: list[ExpertKey] = []  # those that are still to be computed
        self._unrequested: list[ExpertKey] = []
        self._programs: dict[tuple[int, int], RowExperts] = {}  # by count and form of experts

    def begin(self, rows: LayerRows, keys: Collection[ExpertKey]) -> None:
        """Start loading these experts, for `compute_next`, as far as there are slots."""
        self.fetcher.settle(rows.layer, keys)
        # Experts in their slots come first. Otherwise a prefill with more experts than slots would
        # evict each just before its turn. The others come in the order of their file.
        self._order = sorted(keys, key=lambda key: (self.fetcher.state(key), key))
        self._unrequested = list(self._order)
        self._request()

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Start loading predicted experts, after the experts of `begin`."""
        self.fetcher.prefetch(keys, pinned=self._order)

    def compute_next(self, rows: LayerRows) -> bool:
        """Compute the next experts of `begin` into `rows`. Return False if none was left.

        Experts that have arrived are computed together.
        """
        if not self._order:
            return False
        interrupts.check()
        self._request()
        self.fetcher.wait(self._order[0])
        # Slots for the loads ahead stay free of experts that are in use.
        ahead = min(_LOADS_AHEAD, self.fetcher.slots - 1) if self._unrequested else 0
        requested = self._order[: len(self._order) - len(self._unrequested)]
        room = self.fetcher.slots - ahead
        keys = [*islice(takewhile(self.fetcher.has_ended, requested), room)]
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
        experts = [self.fetcher.ready(key) for key in keys]
        if not experts[0].has_stages(rows.hidden_states):
            for key, expert in zip(keys, experts, strict=True):
                interrupts.check()
                rows.put(key, expert(rows.of(key), exact=rows.exact))
        elif rows.is_one_token:
            outputs = self._program(rows, experts)(rows.hidden_states, experts)
            for key, output in zip(keys, torch.split(outputs, 1), strict=True):
                rows.put(key, output)
        else:
            x, x_rows = rows.hidden_states, rows.tokens_of(keys)
            outs = [rows.output_of(key) for key in keys]
            compute_together(experts, x, x_rows, outs, exact=rows.exact)

    def _program(self, rows: LayerRows, experts: Sequence[Expert]) -> RowExperts:
        # A program has the form of its experts, and gets their addresses with each call.
        program_key = len(experts), self._forms[rows.layer] if self._forms else 0
        if program_key not in self._programs:
            self._programs[program_key] = RowExperts(experts[0], rows.hidden_states, len(experts))
        return self._programs[program_key]

    def _request(self, in_use: Sequence[ExpertKey] = ()) -> None:
        if self._unrequested:
            count = self.fetcher.request(self._unrequested, {*self._order, *in_use})
            del self._unrequested[:count]


class RowExperts:
    """Computes `count` experts for the same row [1, D] in one program, on the CPU.

    `expert` is any of their form, and `x` any row of their type.
    """

    def __init__(self, expert: Expert, x: torch.Tensor, count: int) -> None:
        self._x, self._outputs = torch.empty_like(x), x.new_empty(count, x.shape[1])
        stages, places = expert.stages(self._x, self._outputs)
        self._addresses = torch.zeros(len(places), len(places[0]), dtype=torch.int64)
        fill = look_up_step(torch.arange(count), self._addresses, torch.tensor(places))
        self._program = Program([alone(fill), *stages])

    def __call__(self, x: torch.Tensor, experts: Sequence[Expert]) -> torch.Tensor:
        """Return the experts' outputs [K, D], which the next call overwrites."""
        self._x.copy_(x)
        self._addresses.copy_(torch.tensor([expert.addresses for expert in experts]))
        self._program.run()
        return self._outputs
