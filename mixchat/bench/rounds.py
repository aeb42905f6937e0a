"""Measures a model in rounds: limits, mixchat and llama.cpp one after the other, again and again.

So that whatever else the machine does meets all of them alike. A ratio is that of one round; what
is shown is the median of all rounds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import methodcaller
from pathlib import Path
from statistics import median

from mixchat.bench.machine_limits import Limits, LimitsMeter, copy_bandwidth, disk_bandwidth
from mixchat.bench.peer import Peer
from mixchat.bench.work import bytes_per_token, operations_per_token
from mixchat.engine.generate import Engine
from mixchat.engine.sampling import SamplingOptions
from mixchat.loading.loader import LoadOptions, load_engine
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel

COLD_PROMPT = 12  # tokens
_GREEDY = SamplingOptions(temperature=0)
_WARM = 2  # tokens whose time is not taken


@dataclass(frozen=True)
class Tasks:
    """What is measured. `contexts` and `prompts` are counts of tokens."""

    contexts: Sequence[int] = (0,)
    prompts: Sequence[int] = (512,)
    tokens: int = 48
    rounds: int = 5


@dataclass
class Row:
    """One task: tokens a second, and the most that this round's limits allow, of each round."""

    name: str
    limited_by: str  # "memory" or "compute"
    ours: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    @property
    def of_limit(self) -> float:
        """The part of the limit that is reached."""
        return median(ours / most for ours, most in zip(self.ours, self.most, strict=True))

    @property
    def to_peer(self) -> float | None:
        """How many times as fast as the peer; None where that was not measured."""
        pairs = list(zip(self.ours, self.peer, strict=False))
        return median(ours / peer for ours, peer in pairs) if pairs else None


@dataclass(frozen=True)
class ColdStart:
    """The first token with nothing of the model in memory: seconds from the start, bytes read.

    `disk` and `copy` are what the disk and the way to a GPU give, in bytes a second, if anything.
    """

    load_seconds: float
    first_token_seconds: float
    bytes: int
    disk: float | None
    copy: float | None


class Bench:
    """A kept model that is measured on a device."""

    def __init__(self, directory: Path, options: LoadOptions, tasks: Tasks) -> None:
        self._directory, self._options, self._tasks = directory, options, tasks
        self._random = random.Random(0)
        with InstalledModel(directory) as kept:
            self.blueprint: Blueprint = kept.blueprint
        self.engine: Engine
        self.cold_start: ColdStart
        self.limits: list[Limits] = []
        self.rows = [
            *(Row(f"decode behind {n:,} tokens", "memory") for n in tasks.contexts),
            *(Row(f"prompt of {n:,} tokens", "compute") for n in tasks.prompts),
        ]

    def start_cold(self) -> None:
        """Load with nothing in the page cache, and make the first token. The engine stays."""
        _drop_from_page_cache(self._directory)
        start = time.perf_counter()
        self.engine = load_engine(self._directory, self._options)
        loaded = time.perf_counter()
        self._rate(self._prompt(COLD_PROMPT), 0)
        ended = time.perf_counter()
        expert = self.blueprint.expert.stride
        self.cold_start = ColdStart(
            loaded - start,
            ended - start,
            self.engine.experts.stats.bytes_moved + self.blueprint.shared_size,
            disk_bandwidth(self._directory, expert),
            copy_bandwidth(self.engine.device, expert),
        )

    def run(self, peer: Peer | None) -> Iterator[None]:
        """Measure round by round; yields after each task."""
        meter = LimitsMeter(self.engine.device)
        self._rate(self._prompt(64), 1)  # brings the experts in
        for number in range(self._tasks.rounds):
            for row, task in zip(self.rows, self._of_a_round(), strict=True):
                self.limits.append(limits := meter.measure())
                row.most.append(task.most(limits, task.cost))
                row.ours.append(task.ours())
                if peer is not None and (number == 0 or not task.peer_is_slow):
                    row.peer.append(task.peer(peer))
                yield

    def _of_a_round(self) -> Iterator[_Task]:
        tasks, blueprint = self._tasks, self.blueprint
        for context in tasks.contexts:
            size = bytes_per_token(blueprint, context, self._options.kv_bits)
            yield _Task(
                partial(self._decode, context),
                methodcaller("decode", context, tasks.tokens),
                lambda limits, size: limits.memory / size,
                size,
                peer_is_slow=context > 0,  # which it has to compute first, for minutes
            )
        for prompt in tasks.prompts:
            yield _Task(
                partial(self._prefill, prompt),
                methodcaller("prefill", prompt),
                lambda limits, operations: limits.gemm / operations,
                operations_per_token(blueprint),
            )

    def _decode(self, context: int) -> float:
        self.engine.pretend(context)
        return self._rate([0] * context + self._prompt(1), self._tasks.tokens)

    def _prefill(self, tokens: int) -> float:
        self.engine.pretend(0)
        self._rate(self._prompt(tokens), 0)
        return tokens / self.engine.stats.prefill_seconds

    def _prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(5, self.blueprint.config.vocab_size) for _ in range(tokens)]

    def _rate(self, prompt: list[int], tokens: int) -> float:
        """Tokens a second, behind the prompt and a few that are not counted."""
        made = self.engine.generate(prompt, sampling=_GREEDY, stop_ids=set())
        warm = list(islice(made, 1 + (_WARM if tokens else 0)))
        start = time.perf_counter()
        count = len(list(islice(made, tokens)))
        assert warm
        assert count == tokens
        return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class _Task:
    ours: Callable[[], float]
    peer: Callable[[Peer], float]
    most: Callable[[Limits, int], float]
    cost: int  # of a token, in what it is limited by
    peer_is_slow: bool = False


def _drop_from_page_cache(directory: Path) -> None:
    """Let the kernel forget what it holds of the files, where it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in filter(Path.is_file, directory.iterdir()):  # nobody opens the end of a FIFO
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
