"""A tier of experts and its queue do what naive models do, whatever is asked of them.

A single thread reads. The tests let each piece go, so that they know what is on its way.
"""

import threading
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_doubles import PATIENCE
from routing_simulation import LRU
from tier_model import PIECES, SIZE, NaiveLoad, NaiveQueue, NaiveTier

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError
from mixchat.experts import load_queue
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.load_queue import FILL, PREDICTED, REQUESTED, ExpertLoad, Job, LoadQueue
from mixchat.experts.placement import MIN_SLOTS
from mixchat.experts.store import ExpertStore
from mixchat.experts.tier import RESIDENT, Tier

KEYS = [ExpertKey(*key) for key in product(range(2), range(4))]
PIECE = SIZE // PIECES
keys, some_keys = st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS), unique=True)
priorities = st.sampled_from([REQUESTED, PREDICTED, FILL])


def bytes_of(key: ExpertKey) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * key.layer + key.expert)
    return torch.randint(256, (SIZE,), dtype=torch.uint8, generator=generator)


TRUTH = {key: bytes_of(key) for key in KEYS}


class Gate:
    """Lets each piece of the queue's thread pass when the test says so."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: tuple[ExpertKey, int] | None = None
        self._is_open = False

    def enter(self, key: ExpertKey, piece: int) -> None:
        with self._changed:
            self._waiting = key, piece
            self._changed.notify_all()
            free = lambda: self._is_open or self._waiting is None  # noqa: E731
            assert self._changed.wait_for(free, PATIENCE)

    def wait(self) -> tuple[ExpertKey, int]:
        """Return the piece that the thread has come to."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting is not None, PATIENCE)
            assert self._waiting is not None
            return self._waiting

    def go(self) -> None:
        with self._changed:
            self._waiting = None
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


class QueueMachine(RuleBasedStateMachine):
    """The order of pieces, and the end of each load, with one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.naive = Gate(), NaiveQueue()
        self.queue = LoadQueue(1, may_fill=lambda: self.naive.may_fill)
        self.bad: set[ExpertKey] = set()
        self.finished: list[NaiveLoad] = []
        self.loads: list[tuple[ExpertLoad, NaiveLoad]] = []

    @rule(key=keys, priority=priorities, pieces=st.integers(1, 3), slot=st.integers(0, 3))
    def begin(self, key: ExpertKey, priority: int, pieces: int, slot: int) -> None:
        key = ExpertKey(key.layer, len(self.loads))
        load, naive = ExpertLoad(key, priority), NaiveLoad(key, pieces=pieces)
        self.loads.append((load, naive))
        moves = [partial(self.move, key, number) for number in range(pieces)]
        self.queue.begin(load, Job(slot, lambda: moves, lambda: self.finished.append(naive)))
        self.naive.put(naive, priority)

    def move(self, key: ExpertKey, number: int) -> int:
        self.gate.enter(key, number)
        if key in self.bad:
            raise CheckpointError("cut short")
        return 1

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), priority=priorities)
    def reorder(self, data: st.DataObject, priority: int) -> None:
        load, naive = data.draw(st.sampled_from(self.loads))
        self.naive.put(naive, priority)
        assert self.queue.reorder(load, priority) == (not naive.ended)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        load, naive = data.draw(st.sampled_from(self.loads))
        load.cancelled = naive.cancelled = True

    @rule()
    def memory_gets_short_or_ample(self) -> None:
        self.naive.may_fill = not self.naive.may_fill

    @precondition(lambda self: self.naive.in_flight)
    @rule(fails=st.sampled_from([False] * 9 + [True]))
    def step(self, fails: bool) -> None:
        assert self.naive.in_flight is not None
        if fails:
            self.bad.add(self.naive.in_flight.key)
        self.naive.step(fails=fails)
        self.gate.go()

    @invariant()
    def the_most_urgent_piece_is_in_flight(self) -> None:
        self.naive.choose()
        if (naive := self.naive.in_flight) is not None:
            assert self.gate.wait() == (naive.key, naive.begun - 1)
        for load, naive in self.loads:
            if naive.ended and not naive.failed:
                load.wait()
            elif naive.failed:
                with pytest.raises((CheckpointError, MemoryError)):
                    load.wait()
            assert (load.ended, load.failed) == (naive.ended, naive.failed)
        assert len(self.finished) == self.naive.moved

    def teardown(self) -> None:
        self.gate.open()
        for load, naive in self.loads:
            if not naive.cancelled:
                naive.failed |= self.is_failing(load)
        self.queue.close()

    def is_failing(self, load: ExpertLoad) -> bool:
        try:
            load.wait()
        except (CheckpointError, MemoryError):
            return True
        return False


class Block:
    """Stands in for an `ExpertSpec`: an expert is the bytes of its block."""

    stride = nbytes = SIZE

    def __init__(self, *_: object) -> None:
        pass

    def build(self, block: torch.Tensor) -> torch.Tensor:
        return block


class Memory:
    """Stands in for a `MemoryWatch`. What is free is what the naive model says."""

    def __init__(self, naive: NaiveTier) -> None:
        self._naive = naive

    def limit(self, held: int) -> int:
        return self._naive.watched

    def is_ample(self) -> bool:
        return self._naive.queue.may_fill


class RamMachine(RuleBasedStateMachine):
    """The experts in RAM: what is held or on its way, its bytes, the order of reads, the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        self.patches.enter_context(patch("mixchat.experts.tier.READS", 1))
        self.patches.enter_context(patch("mixchat.experts.store.PIECE", PIECE))
        self.patches.enter_context(patch("mixchat.experts.load_queue._SIGNAL_CHECK_S", 0.001))
        self.gate, self.stats = Gate(), ExpertStats()
        self.bad: set[ExpertKey] = set()
        self.reads: list[ExpertKey] = []
        self.lent: dict[ExpertKey, tuple[ExpertLoad, torch.Tensor]] = {}

    @initialize(slots=st.sampled_from([2, 3, 4, 5, 7, 8, 8, 8]))
    def build(self, slots: int) -> None:
        self.naive, watch = NaiveTier(slots, KEYS), Any
        watch = Memory(self.naive)
        layouts: Any = Block
        self.tier = Tier(
            ExpertCache([SIZE] * slots, LRU(), lambda layer: SIZE),
            ExpertStore(self.read, layouts, lambda slot: SIZE, self.stats),
            LoadQueue(1, may_fill=watch.is_ample, count_moved=self.stats.count_read),
            Passes(2),
            self.stats,
            experts=len(KEYS),
            watch=watch,  # type: ignore[arg-type]
        )

    def read(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        self.reads.append(key)
        self.gate.enter(key, start // PIECE)
        if key in self.bad:
            block.fill_(255)
            raise CheckpointError("cut short")
        block.copy_(TRUTH[key][start : start + len(block)])

    @rule(keys=st.permutations(KEYS))
    def fill(self, keys: list[ExpertKey]) -> None:
        self.naive.fill(keys)
        self.tier.fill(keys)

    @rule(keys=some_keys, certain=st.booleans())
    def prefetch(self, keys: list[ExpertKey], certain: bool) -> None:
        keys.sort(key=lambda key: key.layer)
        self.naive.prefetch(keys, certain=certain)
        self.tier.prefetch(keys, (), certain=certain)

    @rule(keys=some_keys)
    def request(self, keys: list[ExpertKey]) -> None:
        assert self.tier.request(keys) == self.naive.request(keys)

    @rule(layer=st.integers(0, 1), chosen=some_keys)
    def settle(self, layer: int, chosen: list[ExpertKey]) -> None:
        self.naive.settle(layer, chosen)
        self.tier.settle(layer, chosen)

    @rule(layer=st.integers(0, 1), chosen=some_keys)
    def use(self, layer: int, chosen: list[ExpertKey]) -> None:
        """A pass of a layer: the chosen experts have the bytes of their files, or an error."""
        chosen = [key for key in chosen if key.layer == layer]
        self.settle(layer, chosen)
        self.agrees()
        requested = self.naive.request(chosen)
        assert self.tier.request(chosen) == requested
        self.agrees()
        for key in chosen[:requested]:
            while (load := self.naive.loads.get(key)) is not None and not load.ended:
                self.step()
                self.agrees()
            if self.naive.ready(key):
                expert: Any = self.tier.ready(key)
                assert torch.equal(expert, TRUTH[key])
            else:
                with pytest.raises(CheckpointError, match="cut short"):
                    self.tier.ready(key)

    @rule()
    def interrupt(self) -> None:
        """Ctrl-C while an expert is awaited leaves it on its way."""
        awaited = next((key for key, load in self.naive.loads.items() if not load.ended), None)
        if awaited is not None:
            interrupted = patch.object(interrupts, "check", side_effect=KeyboardInterrupt)
            with interrupted, pytest.raises(KeyboardInterrupt):
                self.tier.wait(awaited)

    @precondition(lambda self: self.naive.queue.in_flight)
    @rule()
    def step(self) -> None:
        assert self.naive.queue.in_flight is not None
        self.naive.queue.step(fails=self.naive.queue.in_flight.key in self.bad)
        self.gate.go()

    @rule()
    def finish(self) -> None:
        while self.naive.queue.in_flight is not None:
            self.step()
            self.agrees()

    @rule(keys=st.sets(keys, max_size=2))
    def damage(self, keys: set[ExpertKey]) -> None:
        """Reads of these fail, and of no others."""
        self.bad = keys

    @rule(keys=st.frozensets(keys, max_size=4))
    def leave_elsewhere(self, keys: frozenset[ExpertKey]) -> None:
        self.tier.elsewhere = self.naive.elsewhere = keys

    @rule(layer=st.integers(0, 1), experts=st.lists(st.integers(0, 3), max_size=3))
    def note_hits(self, layer: int, experts: list[int]) -> None:
        self.naive.noted += [ExpertKey(layer, expert) for expert in experts]
        self.tier.note_hits(layer, [experts])

    @rule(slots=st.integers(MIN_SLOTS, 8), ample=st.booleans())
    def memory_changes(self, slots: int, ample: bool) -> None:
        self.naive.watched, self.naive.queue.may_fill = min(slots, self.naive.slots), ample
        before = self.naive.limit
        self.naive.follow_memory()
        self.tier.follow_memory()
        if self.naive.limit != before:
            # Until the next load, the slots of experts that were evicted in vain keep memory.
            most = max(self.naive.limit, len(self.naive.recent))
            assert self.tier.nbytes <= most * SIZE

    @rule(key=keys)
    def borrow(self, key: ExpertKey) -> None:
        if key not in self.lent:
            load = ExpertLoad(key)
            block = self.tier.borrow(load)
            may = self.naive.state(key) == RESIDENT and self.naive.may_lend()
            assert (block is not None) == may
            if block is not None:
                self.lent[key] = load, block
                self.naive.borrowed.add(key)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.lent)))
        load, _ = self.lent.pop(key)
        self.naive.borrowed.remove(key)
        load.end()

    @rule(keys=st.permutations(KEYS), fills=st.booleans())
    def look_at_whole_layers(self, keys: list[ExpertKey], fills: bool) -> None:
        """They are resident in their order, and the same lists while nothing is evicted."""
        if fills:
            self.fill(keys)
            self.agrees()
            self.finish()
        layers = [KEYS[:4], KEYS[4:]]
        self.naive.follow_memory()
        resident: Any = self.tier.resident(layers)
        whole = [all(self.naive.state(key) == RESIDENT for key in layer) for layer in layers]
        count = 0 if self.naive.limit < len(KEYS) else [*whole, False].index(False)
        assert len(resident) == count
        for layer, experts, again in zip(
            layers[:count], resident, self.tier.resident(layers), strict=True
        ):
            assert experts is again
            assert all(map(torch.equal, experts, (TRUTH[key] for key in layer)))

    @rule()
    def read_the_counts(self) -> None:
        self.naive.count_hits()
        self.tier.count_hits()
        for name in ("predictions", "right_predictions", "late_predictions"):
            assert getattr(self.stats, name) == getattr(self.naive, name)
        assert self.stats.hits == self.naive.hits
        assert self.stats.misses == self.naive.misses
        assert self.stats.bytes_moved == self.naive.queue.moved * SIZE

    @invariant()
    def agrees(self) -> None:
        naive, tier = self.naive, self.tier
        naive.queue.choose()
        if (load := naive.queue.in_flight) is not None:
            assert self.gate.wait() == (load.key, load.begun - 1)
        else:
            self.wait_for_all()
        assert (tier.is_filling, tier.holds_all) == (naive.is_filling(), naive.holds_all())
        assert tier.slots == naive.limit
        for key in KEYS:
            assert tier.state(key) == naive.state(key), key
            assert tier.holds(key) == (naive.state(key) == RESIDENT)
            load = ExpertLoad(key)
            if key not in self.lent and (block := tier.borrow(load)) is not None:
                assert torch.equal(block, TRUTH[key])
            load.end()
        for key, (_, block) in self.lent.items():
            assert torch.equal(block, TRUTH[key])
        assert tier.nbytes <= naive.slots * SIZE

    def wait_for_all(self) -> None:
        """Wait until the thread has ended the last load."""
        until = threading.Event()
        for _ in range(1000 * PATIENCE):
            if not self.tier.is_filling and all(map(self.tier.has_ended, KEYS)):
                return
            until.wait(0.001)
        raise AssertionError("it never ends")

    def teardown(self) -> None:
        self.read_the_counts()
        self.tier.close()
        assert self.tier.nbytes == 0
        reads = len(self.reads)
        self.gate.open()
        queue_threads = load_queue._QueueThread
        for thread in threading.enumerate():
            if isinstance(thread, queue_threads):
                thread.join(PATIENCE)
        assert len(self.reads) == reads
        self.patches.close()


TestQueue = QueueMachine.TestCase
TestRam = RamMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=40)
TestRam.settings = settings(max_examples=200, stateful_step_count=40)
