"""Experts of the tiny model (2 layers of 4, D = 64) with few slots, and inputs for them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from routing_simulation import LRU
from source_tools import disk

from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.compute import HostCompute
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.holder import WorkerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.load_queue import LoadQueue
from mixchat.experts.prefetch import NextRouters
from mixchat.experts.store import READS, ExpertStore, ReadExpert
from mixchat.experts.tier import Tier
from mixchat.weights.format.installed_model import InstalledModel

CPU = torch.device("cpu")


def runner(
    installed: InstalledModel,
    slots: int,
    read: ReadExpert | None = None,
    workers: Sequence[WorkerExperts] = (),
    copies: Iterable[ExpertKey] = (),
    next_routers: NextRouters | None = None,
    reads: int = READS,
    watch: Any = None,
) -> Dispatcher:
    blueprint, stats = installed.blueprint, ExpertStats()
    store = ExpertStore(
        read or disk(installed),
        blueprint.expert_of,
        lambda slot: blueprint.expert.stride,
        stats,
    )
    may_fill = watch.is_ample if watch else lambda: True
    queue = LoadQueue(reads, may_fill=may_fill, count_moved=stats.count_read)
    cache = ExpertCache([0] * slots, LRU())
    ram = Tier(cache, store, queue, Passes(2), stats, experts=8, watch=watch)
    return Dispatcher(
        HostCompute(ram, 4),
        stats,
        next_routers=next_routers,
        layers_ahead=3,
        workers=workers,
        copies=frozenset(copies),
    )


def routing(tokens: int, choices: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=generator).to(torch.bfloat16)
    scores = torch.randn(tokens, 4, generator=generator)
    largest, selected = scores.topk(choices, dim=-1)
    return hidden, selected, largest.softmax(-1)


class FakeWorker:
    """A worker in the same process, that fails where it is told to."""

    def __init__(self, installed: InstalledModel, held: Iterable[ExpertKey]) -> None:
        self._experts, self._holds = runner(installed, 8), frozenset(held)
        self.works = True
        self.fails_at: str | None = None  # "begin" or "finish"
        self.sent: list[list[ExpertKey]] = []

    @property
    def held(self) -> frozenset[ExpertKey]:
        return self._holds if self.works else frozenset()

    def begin_turn(self) -> None:
        self.works = True

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        self.works = self.fails_at != "begin"
        self.sent.append(list(keys))

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        self.works = self.works and self.fails_at != "finish"
        if not self.works:
            return self.sent[-1]
        for key in self.sent[-1]:
            x = rows.of(key)
            chosen = torch.full((x.shape[0], 1), key.expert)
            computed = self._experts.compute(rows.layer, x, chosen)
            rows.put(key, computed.outputs)
        return []

    def close(self) -> None:
        self.works = False
