"""Tiers of experts and their queues do what naive models do, whatever is asked of them.

RAM is filled from a disk, and a GPU's memory on paper from RAM, by one thread each. The tests let
each piece go, so that they know what is on its way.
"""

import threading
from contextlib import ExitStack
from functools import partial
from itertools import islice, product
from typing import Any
from unittest.mock import patch

import paper_gpu
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from patience import PATIENCE_S, wait_until
from routing_simulation import LRU
from tier_model import PIECES, SIZE, NaiveLoad, NaiveQueue, NaiveTier

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError
from mixchat.experts import load_queue, tier
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.load_queue import FILL, PREDICTED, REQUESTED, ExpertLoad, Job, LoadQueue
from mixchat.experts.placement import MIN_SLOTS
from mixchat.experts.store import ExpertStore
from mixchat.experts.tier import RESIDENT, Tier
from mixchat.experts.vram import VramTier

GPU = torch.device("paper", 0)
KEYS = [ExpertKey(*key) for key in product(range(2), range(4))]
PIECE = SIZE // PIECES
keys, some_keys = st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS), unique=True)
pinned_keys = st.sets(keys, max_size=3)
priorities = st.sampled_from([REQUESTED, PREDICTED, FILL])
FAILURES = (CheckpointError, MemoryError, OSError)


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
            assert self._changed.wait_for(free, PATIENCE_S)

    def wait(self) -> tuple[ExpertKey, int]:
        """Return the piece that the thread has come to."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting is not None, PATIENCE_S)
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
        self.queue = LoadQueue(1, may_fill=self.may_fill)
        self.bad: set[ExpertKey] = set()
        self.finished: list[NaiveLoad] = []
        self.loads: list[tuple[ExpertLoad, NaiveLoad]] = []

    def may_fill(self) -> bool:
        """Return that memory is ample. If it is not, the system fails to say so."""
        if not self.naive.may_fill:
            raise OSError("too many open files")
        return True

    @rule(
        layer=st.integers(0, 1),
        priority=priorities,
        pieces=st.integers(1, 3),
        slot=st.integers(0, 3),
        fault=st.sampled_from([None] * 8 + ["begin", "finish"]),
    )
    def begin(self, layer: int, priority: int, pieces: int, slot: int, fault: str | None) -> None:
        key = ExpertKey(layer, len(self.loads))
        load, naive = ExpertLoad(key, priority), NaiveLoad(key, pieces=pieces, fault=fault)
        self.loads.append((load, naive))
        moves = [partial(self.move, key, number) for number in range(pieces)]

        def note(step: str, result: Any) -> Any:
            if fault == step:
                raise MemoryError("no slot")
            return result

        def finish() -> None:
            note("finish", None)
            self.finished.append(naive)

        self.queue.begin(load, Job(slot, partial(note, "begin", moves), finish))
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
                with pytest.raises(FAILURES):
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
        except FAILURES:
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
    """Stands in for a `MemoryWatch`. What is free is what the naive model says.

    Of fills that are still to come, only the first one counts as held. The memory of a prefetch
    that was given up does, because the next expert gets it.
    """

    def __init__(self, naive: NaiveTier) -> None:
        self._naive = naive
        self.store: ExpertStore | None = None

    def limit(self, held: int) -> int:
        assert self.store is not None
        to_come = max(len(self._naive.fills) - 1, 0) if self._naive.is_filling() else 0
        assert held == len(self.store.blocks) - to_come
        return self._naive.watched

    def is_ample(self) -> bool:
        return self._naive.queue.may_fill


class LentBlock:
    """An expert's block in RAM. The GPU's thread takes each piece when the test says so."""

    def __init__(self, key: ExpertKey, block: torch.Tensor, bus: Gate) -> None:
        self._key, self._block, self._bus = key, block, bus

    def __getitem__(self, piece: slice) -> torch.Tensor:
        self._bus.enter(self._key, piece.start // PIECE)
        return self._block[piece]


class TierMachine(RuleBasedStateMachine):
    """RAM, and a GPU's memory in front of it.

    Of both: what is held or on its way, the bytes, and the order of pieces. Of RAM also the counts,
    and of the GPU what kernels read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        for name, number in {
            "tier.READS": 1,
            "store.PIECE": PIECE,
            "vram._STAGES": 1,
            "vram._STAGE_BYTES": PIECE,
            "load_queue._SIGNAL_CHECK_S": 0.001,
        }.items():
            self.patches.enter_context(patch(f"mixchat.experts.{name}", number))
        self.patches.enter_context(paper_gpu.in_place_of_cuda())
        self.gate, self.stats = Gate(), ExpertStats()
        self.bad: set[ExpertKey] = set()
        self.reads: list[ExpertKey] = []
        self.lent: list[tuple[ExpertLoad, torch.Tensor]] = []
        self.bus, self.naive_bus = Gate(), NaiveQueue()
        self.copies: list[tuple[ExpertLoad, NaiveLoad]] = []  # all loads of the GPU
        self.coming: dict[ExpertKey, tuple[ExpertLoad, NaiveLoad]] = {}  # those of no guests
        self.unreadable: set[ExpertKey] = set()  # which the GPU does not ask for again
        self.has_guests = False
        self.outputs: list[tuple[ExpertKey, torch.Tensor]] = []

    @initialize(
        slots=st.sampled_from([2, 3, 4, 5, 7, *[8] * 5]),
        on_gpu=st.sampled_from([0, 1, 2, 2, 3, 3, 4, 6, 8]),
        pieces=st.sampled_from([1, 3, 8]),
    )
    def build(self, slots: int, on_gpu: int, pieces: int) -> None:
        self.patches.enter_context(patch("mixchat.experts.arena._LEAST_PIECES", pieces))
        self.naive = NaiveTier(slots, KEYS)
        layouts: Any = Block
        watch: Any = Memory(self.naive)
        self.store = ExpertStore(self.read, layouts, lambda slot: SIZE, self.stats)
        watch.store = self.store
        self.queue = LoadQueue(1, may_fill=watch.is_ample, count_moved=self.stats.count_read)
        self.tier = Tier(
            ExpertCache([SIZE] * slots, LRU(), lambda layer: SIZE),
            self.store,
            self.queue,
            Passes(2),
            self.stats,
            experts=len(KEYS),
            watch=watch,
        )
        ram: Any = self
        form = Block()
        forms: Any = lambda layer: form  # noqa: E731
        self.on_gpu = on_gpu
        self.gpu = VramTier(GPU, range(2), 4, forms, [SIZE] * on_gpu, self.read_past_ram, ram)

    def read(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        self.reads.append(key)
        self.gate.enter(key, start // PIECE)
        self.read_disk(key, block, start)

    def read_past_ram(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        assert key not in self.naive.borrowed
        self.bus.enter(key, start // PIECE)
        self.read_disk(key, block, start)

    def read_disk(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        if key in self.bad:
            block.fill_(255)
            raise CheckpointError("cut short")
        block.copy_(TRUTH[key][start : start + len(block)])

    # RAM.

    @rule(keys=some_keys | st.permutations(KEYS), needed=some_keys, finishes=st.booleans())
    def fill(self, keys: list[ExpertKey], needed: list[ExpertKey], finishes: bool) -> None:
        """Fill the slots. Others may be needed meanwhile, as those of a worker that is lost."""
        self.naive.fill(keys)
        self.tier.fill(keys)
        self.agrees()
        self.request(needed, set())
        self.agrees()
        if finishes:
            self.finish()

    @rule(keys=some_keys, pinned=pinned_keys, certain=st.booleans())
    def prefetch(self, keys: list[ExpertKey], pinned: set[ExpertKey], certain: bool) -> None:
        keys.sort(key=lambda key: key.layer)
        self.naive.prefetch(keys, pinned, certain=certain)
        self.tier.prefetch(keys, pinned, certain=certain)
        assert self.queue.predicted_limit == (tier.READS if certain else tier._PREDICTED_LIMIT)

    @rule(keys=some_keys, pinned=pinned_keys)
    def request(self, keys: list[ExpertKey], pinned: set[ExpertKey]) -> None:
        missing = {key for key in keys if key not in self.naive.recent}
        assert self.tier.request(keys, pinned) == self.naive.request(keys, pinned)
        if missing & self.naive.loads.keys():
            most = max(self.naive.limit, len(self.naive.recent))
            assert len(self.store.blocks) <= most  # also of memory that is to be taken

    @rule(layer=st.integers(0, 1), chosen=some_keys)
    def settle(self, layer: int, chosen: list[ExpertKey]) -> None:
        self.tier.settle(layer, chosen)
        self.naive.settle(layer, chosen)

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
        in_ram = [key for key, load in self.naive.loads.items() if not load.ended]
        on_gpu = [key for key, (load, _) in self.pending.items() if not load.ended]
        interrupted = patch.object(interrupts, "check", side_effect=KeyboardInterrupt)
        for await_one, awaited in ((self.tier.wait, in_ram), (self.gpu.ready, on_gpu)):
            if awaited:
                with interrupted, pytest.raises(KeyboardInterrupt):
                    await_one(awaited[0])

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

    def note_hits(self, layer: int, experts: list[int]) -> None:
        self.naive.noted += [ExpertKey(layer, expert) for expert in experts]
        self.tier.note_hits(layer, [experts])

    @rule(
        slots=st.integers(MIN_SLOTS, 8),
        ample=st.booleans(),
        passes=st.booleans(),
        experts=st.lists(st.integers(0, 3), max_size=3),
    )
    def memory_changes(self, slots: int, ample: bool, passes: bool, experts: list[int]) -> None:
        """Memory gets short or ample, until the next change or for a moment, after some hits."""
        self.note_hits(slots % 2, experts)
        self.naive.queue.may_fill = ample
        for watched in (min(slots, self.naive.slots), self.naive.slots)[: 1 + passes]:
            self.naive.watched = watched
            before = self.naive.limit
            self.tier.follow_memory()
            self.naive.follow_memory()
            if self.naive.limit != before:
                # Until the next load, the slots of experts that were evicted in vain keep memory.
                most = max(self.naive.limit, len(self.naive.recent))
                assert self.tier.nbytes <= most * SIZE
        self.look_at_whole_layers(KEYS, fills=False)

    @rule(keys=st.permutations(KEYS), fills=st.booleans())
    def look_at_whole_layers(self, keys: list[ExpertKey], fills: bool) -> None:
        """They are resident in their order, and the same lists while nothing is evicted."""
        if fills:
            self.fill(keys, [], finishes=True)
        layers = [KEYS[:4], KEYS[4:]]
        resident: Any = self.tier.resident(layers)
        self.naive.follow_memory()
        whole = [all(self.naive.state(key) == RESIDENT for key in layer) for layer in layers]
        count = 0 if self.naive.limit < len(KEYS) else [*whole, False].index(False)
        assert len(resident) == count
        for layer, experts, again in zip(
            layers[:count], resident, self.tier.resident(layers), strict=True
        ):
            assert experts is again
            assert all(map(torch.equal, experts, (TRUTH[key] for key in layer)))

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
            wait_until(lambda: not tier.is_filling and all(map(tier.has_ended, KEYS)))
        assert (tier.is_filling, tier.holds_all) == (naive.is_filling(), naive.holds_all())
        assert tier.slots == naive.limit
        for key in KEYS:
            assert tier.state(key) == naive.state(key), key
            assert tier.holds(key) == (naive.state(key) == RESIDENT)
            if key not in naive.borrowed:
                reader = ExpertLoad(key)
                assert (block := tier.borrow(reader)) is None or torch.equal(block, TRUTH[key])
                reader.end()
        for reader, block in self.lent:
            assert reader.ended or reader.cancelled or torch.equal(block, TRUTH[reader.key])
        assert tier.nbytes <= naive.slots * SIZE

    # The GPU.

    @property
    def pending(self) -> dict[ExpertKey, tuple[ExpertLoad, NaiveLoad]]:
        """Return the loads of experts with slots that have not been published."""
        return {key: copy for key, copy in self.coming.items() if not copy[0].cancelled}

    def borrow(self, load: ExpertLoad) -> Any:
        """Stand in for RAM, as the GPU sees it. A load asks for its expert before it is queued."""
        naive = NaiveLoad(load.key)
        self.copies.append((load, naive))
        self.naive_bus.put(naive, load.priority)
        if not self.has_guests:
            assert load.key not in self.unreadable
            self.coming[load.key] = load, naive
        may_lend = self.naive.may_lend(load.key)
        block = self.tier.borrow(load)
        assert (block is not None) == may_lend
        if block is None:
            return None
        self.naive.readers.append(load)
        self.lent.append((load, block))
        return LentBlock(load.key, block, self.bus)

    @rule(uses=st.lists(st.tuples(keys, st.integers(1, 30)), max_size=2))
    def publish(self, uses: list[tuple[ExpertKey, int]]) -> None:
        """Experts that have arrived are held, and then one more may come at a time."""
        for key, tokens in uses:
            self.gpu.policy.note_rows(key, tokens)
        pending, begun = self.pending, len(self.copies)
        for key, (load, _) in pending.items():
            if load.ended:
                del self.coming[key]
                self.unreadable |= {key} if load.failed else set()
        is_busy = bool(self.pending)
        self.gpu.publish()
        assert len(self.copies) - begun <= (0 if is_busy else 1)
        self.token()

    @rule(finishes=st.booleans())
    def fill_gpu(self, finishes: bool) -> None:
        self.gpu.fill_slots()
        unreadable = self.unreadable - self.gpu.keys
        assert len(self.gpu.keys) == min(self.gpu.slots, len(KEYS) - len(unreadable))
        self.gpu_agrees()
        while finishes and self.naive_bus.in_flight is not None:
            self.step_gpu()

    @rule(needed=some_keys, grows=st.booleans())
    def give_way(self, needed: list[ExpertKey], grows: bool) -> None:
        """Memory runs out in a prompt, or later, while some experts are still coming.

        Those that are used most stay, but none moves to where another one may be coming.
        """
        if needed:
            self.fill_gpu(finishes=False)
            self.prompt(needed, len(needed))
            self.gpu_agrees()
        slots, arrived = self.gpu.slots, self.gpu.keys - self.pending.keys()
        coming = {self.address(key) for key in self.pending}
        uses = {key: self.gpu.policy.uses_of(key) for key in arrived}
        assert self.gpu.give_way() == bool(slots)
        assert self.gpu.slots < slots or not slots
        stay = {uses[key] for key in arrived & self.gpu.keys}
        assert coming.isdisjoint(map(self.address, arrived & self.gpu.keys))
        assert all(uses[key] <= min(stay, default=1e9) for key in arrived - self.gpu.keys)
        self.gpu_agrees()
        if grows:
            self.gpu.grow()
            assert self.gpu.slots == self.on_gpu

    def address(self, key: ExpertKey) -> int:
        expert: Any = self.gpu.expert(key)
        return int(expert.data_ptr())

    def token(self) -> None:
        """Start kernels that read all experts that are held. Nobody waits for them yet."""
        held: Any = [(key, self.gpu.expert(key)) for key in KEYS if self.gpu.holds(key)]
        self.outputs += [(key, expert ^ 0) for key, expert in held]

    @rule(keys=some_keys, until=st.integers(1, 8))
    def prompt(self, keys: list[ExpertKey], until: int) -> None:
        """Bring what is missing, up to an interrupt, or an expert that cannot be read."""
        for number, key in enumerate(keys):
            self.gpu.policy.note_rows(key, 5 * number)
        arriving = list[ExpertKey]()
        for key in keys:
            _, naive = self.pending.get(key, (None, None))
            assert self.gpu.hurry(key) == (naive is not None and not naive.ended)
            if naive is not None:
                self.naive_bus.put(naive, REQUESTED)
                arriving += [] if naive.ended else [key]
        missing = [key for key in keys if not self.gpu.holds(key) and key not in arriving]
        brought = list[ExpertKey]()
        try:
            # Whoever waits looks for a signal, again and again. Meanwhile the bus goes on.
            with patch.object(interrupts, "check", self.step_gpu):
                self.bring(arriving, missing, until, brought)
        except CheckpointError:
            assert self.bad & {*arriving, *missing}
        else:
            assert brought == missing[:until]
        guests = [load for load, _ in self.copies if self.coming.get(load.key, [0])[0] is not load]
        assert all(load.ended or load.cancelled for load in guests)

    def bring(
        self,
        arriving: list[ExpertKey],
        missing: list[ExpertKey],
        until: int,
        brought: list[ExpertKey],
    ) -> None:
        self.has_guests = True
        try:
            with self.gpu.invite(missing) as guests:
                self.token()
                self.gpu_agrees()
                for key in arriving:
                    load, _ = self.coming[key]
                    try:
                        self.gpu.ready(key)
                    finally:
                        del self.coming[key]
                        self.unreadable |= {key} if load.failed else set()
                expert: Any
                for key, expert in islice(guests, until):
                    assert len(self.naive.borrowed - self.pending.keys()) <= 2
                    brought.append(key)
                    self.outputs.append((key, expert ^ 0))
                    self.gpu_agrees()  # or a load might be cancelled before or after it begins
        finally:
            self.has_guests = False

    @rule()
    def step_gpu(self) -> None:
        self.gpu_agrees()
        naive = self.naive_bus.in_flight
        if naive is not None:
            (load,) = [load for load, other in self.copies if other is naive]
            is_lent = any(load is reader for reader, _ in self.lent)
            moved, table = self.gpu.stats.bytes_read, self.gpu.table.inner.clone()
            self.naive_bus.step(fails=not is_lent and naive.key in self.bad)
            self.bus.go()
            wait_until(
                lambda: load.ended if naive.ended else self.gpu.stats.bytes_read == moved + PIECE
            )
            assert torch.equal(self.gpu.table.inner, table)
            self.gpu_agrees()

    @invariant()
    def gpu_agrees(self) -> None:
        gpu: Any = self.gpu
        for load, naive in self.copies:
            naive.cancelled = load.cancelled
        self.naive_bus.choose()
        if (naive := self.naive_bus.in_flight) is not None:
            assert self.bus.wait() == (naive.key, naive.begun - 1)
        for load, naive in self.copies:
            assert (load.ended, load.failed) == (naive.ended, naive.failed)
        pending = self.pending
        assert pending.keys() <= gpu.keys
        assert len(gpu.keys) <= gpu.slots
        assert gpu.nbytes == gpu.slots * SIZE
        assert gpu.is_filling == any(not load.ended for load, _ in pending.values())
        assert gpu.holds_all == (not pending and len(gpu.keys) == len(KEYS))
        held = {key: gpu.expert(key) for key in gpu.keys if key not in pending}
        for key in KEYS:
            assert gpu.holds(key) == (key in held)
            assert gpu.missing(key.layer, [key.expert]) == ([] if key in held else [0])
            address = held[key].data_ptr() if key in held else 0
            assert gpu.table.inner[key] == address
            assert key not in held or torch.equal(held[key].inner, TRUTH[key])

    def teardown(self) -> None:
        self.read_the_counts()
        self.token()
        for key, output in self.outputs:
            assert torch.equal(output.cpu(), TRUTH[key])
        self.gpu.close()
        self.tier.close()
        assert self.tier.nbytes == self.gpu.nbytes == 0
        reads = len(self.reads)
        self.gate.open()
        self.bus.open()
        queue_threads = load_queue._QueueThread
        for thread in threading.enumerate():
            if isinstance(thread, queue_threads):
                thread.join(PATIENCE_S)
        assert len(self.reads) == reads
        self.patches.close()


# Steps that few random runs take: slots in RAM and on the GPU, and rules with their arguments.
RARE: dict[str, tuple[int, int, str, tuple[Any, ...]]] = {
    "a fill that makes room for an expert does not overwrite it": (
        3,
        0,
        "fill",
        (KEYS[:2], KEYS[2:4], True),
    ),
    "a layer is not resident if memory was short for a moment": (
        8,
        0,
        "memory_changes",
        (4, True, True, []),
    ),
    "an expert does not move to where another one is coming": (
        8,
        2,
        "give_way",
        ([KEYS[7], KEYS[4]], False),
    ),
}


@pytest.mark.parametrize(("slots", "on_gpu", "rule", "arguments"), RARE.values(), ids=RARE)
def test_rare_steps_do_what_naive_models_do(slots, on_gpu, rule, arguments):
    machine = TierMachine()
    machine.build(slots=slots, on_gpu=on_gpu, pieces=8)
    try:
        if slots == len(KEYS):
            machine.look_at_whole_layers(KEYS, fills=True)
        getattr(machine, rule)(*arguments)
        machine.agrees()
        machine.gpu_agrees()
    finally:
        machine.teardown()


TestQueue = QueueMachine.TestCase
TestTiers = TierMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=40)
TestTiers.settings = settings(max_examples=200, stateful_step_count=40)
