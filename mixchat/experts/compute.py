"""Computes experts on one device, and on the CPU if that is faster than a copy to the GPU.

n = rows of an expert, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, islice, takewhile

import torch

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.fetcher import MISSING, Fetcher
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.memory import CPU
from mixchat.experts.sources import HostSource
from mixchat.kernels.cpu.program import Program, alone
from mixchat.kernels.cpu.router import look_up_step
from mixchat.weights.format.expert import Expert, compute_together

_LOADS_AHEAD = 2  # experts on their way while one is computed
# Numbers of x for experts that are computed together, which fit in a CPU's cache.
_MAX_X_NUMBERS = 2**21


class DeviceCompute:
    """Computes experts out of the slots of `device`. Two slots are enough.

    forms: a number for each layer. Layers whose experts have the same form have the same number.
    None if all layers do.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        device: torch.device,
        host: HostCompute | None = None,
        forms: Sequence[int] | None = None,
    ) -> None:
        self.fetcher, self.device, self._host, self._forms = fetcher, device, host, forms
        self._order: list[ExpertKey] = []
        self._programs: dict[tuple[int, int], RowExperts] = {}  # by count and form of experts
        self._on_host: set[ExpertKey] = set()

    @property
    def may_use_rows_on_cpu(self) -> bool:
        return self._host is not None and not self.fetcher.holds_all

    def begin(self, rows: LayerRows, keys: Collection[ExpertKey]) -> None:
        """Start loading the first of these experts, for `compute_next`."""
        self.fetcher.settle(rows.layer, keys)
        self._on_host.clear()
        if self._host is not None:
            missing = {key: rows.counts[key] for key in keys if self.fetcher.state(key) == MISSING}
            self._on_host.update(self._host.choose(missing))
        # Experts in their slots come first. Otherwise a prefill with more experts than slots would
        # evict each just before its turn.
        by_state = sorted(keys, key=self.fetcher.state)
        # The CPU's experts come second, so that the GPU has work meanwhile.
        self._order = sorted(
            by_state, key=lambda key: key not in self._on_host and not self.fetcher.holds(key)
        )
        self._request(together=0)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Start loading predicted experts, after the experts of `begin`."""
        self.fetcher.prefetch(keys, pinned=self._order)

    def compute_next(self, rows: LayerRows) -> bool:
        """Compute the next expert of `begin` into `rows`. Return False if none was left.

        On the CPU, experts in their slots are computed together.
        """
        if not self._order:
            return False
        interrupts.check()
        count = 0  # of the next experts, those that are computed together
        if self.device == CPU:
            # Slots for the loads ahead stay free of experts that are in use.
            room = self.fetcher.slots - self._ahead
            held = [*islice(takewhile(self.fetcher.holds, self._order), room)]
            count = len(held)
            if not rows.is_one_token:
                most = _MAX_X_NUMBERS // rows.hidden_states.shape[1]
                totals = accumulate(rows.counts[key] for key in held)
                count = sum(1 for _ in takewhile(lambda total: total <= most, totals))
        self._request(count)
        keys, self._order = self._order[:count], self._order[count:]
        if keys:
            self._compute_together(rows, keys)
        else:
            key = self._order.pop(0)
            rows.put(key, self._output(key, rows))
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

    @property
    def _ahead(self) -> int:
        return min(_LOADS_AHEAD, self.fetcher.slots - 1)

    def _request(self, together: int) -> None:
        needed = [key for key in self._order if key not in self._on_host]
        self.fetcher.request(needed[: max(together, 1) + self._ahead])

    def _output(self, key: ExpertKey, rows: LayerRows) -> torch.Tensor:
        """Return an expert's output, [n, D]."""
        if key in self._on_host and self._host is not None:
            output = self._host.run(key, rows.on_cpu(key))
            if output is not None:
                self.fetcher.stats.misses[key] += 1
                return output
            # It has left RAM since it was chosen.
            self.fetcher.request([key])
        expert = self.fetcher.ready(key)
        return expert(rows.of(key).to(self.device, non_blocking=True), exact=rows.exact)


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


class HostCompute:
    """Chooses between copying an expert and computing it in RAM, and computes it there.

    copy_seconds: to copy one expert to the GPU. host_seconds: to compute one on the CPU, by rows.
    Both overlap, so some experts are copied and others computed.
    """

    def __init__(
        self,
        source: HostSource,
        *,
        copy_seconds: float,
        host_seconds: Callable[[int], float],
    ) -> None:
        self._source, self._copy_seconds, self._host_seconds = source, copy_seconds, host_seconds

    def choose(self, missing: Mapping[ExpertKey, int]) -> list[ExpertKey]:
        """Return the experts to compute on the CPU. `missing` maps each to its rows.

        Few rows come first, because a copy costs the same for any number.
        """
        held = [key for key in missing if self._source.tier(key) == "host"]
        held.sort(key=missing.__getitem__)
        best, shortest = 0, len(missing) * self._copy_seconds
        on_host = 0.0
        for count, key in enumerate(held, start=1):
            on_host += self._host_seconds(missing[key])
            seconds = max(on_host, (len(missing) - count) * self._copy_seconds)
            if seconds < shortest:
                best, shortest = count, seconds
        return held[:best]

    def run(self, key: ExpertKey, x: torch.Tensor) -> torch.Tensor | None:
        """Return the expert's output for x [n, D], on the CPU, or None if it has left RAM."""
        with self._source.borrow(key) as expert:
            return None if expert is None else expert(x)
