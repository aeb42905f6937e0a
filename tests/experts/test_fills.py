"""Experts that come while nobody asks for any, because all fit."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from expert_doubles import routing, runner
from source_tools import disk

from mixchat.base.errors import CheckpointError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.load_queue import ExpertLoad
from mixchat.experts.tier import MISSING, RESIDENT, Tier
from mixchat.weights.format.installed_model import InstalledModel

EVERYTHING = [ExpertKey(*key) for key in product(range(2), range(4))]


class Source:
    """Reads experts, and notes which. Those in `held` wait until `go`, and those in `bad` fail."""

    def __init__(self, installed: InstalledModel) -> None:
        self._read = disk(installed)
        self.begun: list[ExpertKey] = []
        self.held: dict[ExpertKey, threading.Event] = {}
        self.bad: set[ExpertKey] = set()

    def __call__(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        self.begun.append(key)
        if key in self.held:
            self.held[key].wait()
        if key in self.bad:
            block.fill_(255)
            raise CheckpointError("cut short")
        self._read(key, block, start)

    def wait_for(self, key: ExpertKey) -> None:
        while key not in self.begun:
            time.sleep(0.001)

    def go(self, *keys: ExpertKey) -> None:
        for key in keys or self.held:
            self.held[key].set()


@pytest.fixture(autouse=True)
def one_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixchat.experts.tier.READS", 1)


@pytest.fixture
def installed(tiny_model: Path) -> InstalledModel:
    return InstalledModel(tiny_model)


@pytest.fixture
def source(installed: InstalledModel) -> Iterator[Source]:
    source = Source(installed)
    yield source
    source.go()


def begin(
    installed: InstalledModel, source: Source, held: Sequence[ExpertKey] = (), slots: int = 8
) -> tuple[Dispatcher, Tier]:
    """Let fills begin, and return as soon as they wait for the first of `held`."""
    source.held = {key: threading.Event() for key in held}
    experts = runner(installed, slots, source, reads=1)
    experts.fill(EVERYTHING)
    for key in held[:1]:
        source.wait_for(key)
    return experts, experts.ram


def finish(source: Source, experts: Dispatcher) -> None:
    source.go()
    while experts.is_filling:
        time.sleep(0.001)


def is_right(installed: InstalledModel, experts: Dispatcher) -> bool:
    """Return whether both layers give the bits that they give with fresh experts."""
    fresh = runner(installed, 8)
    return all(
        torch.equal(experts.run(layer, *routing(9, seed=3)), fresh.run(layer, *routing(9, seed=3)))
        for layer in range(2)
    )


def test_all_experts_come_in_the_order_of_layers_although_nobody_asks(installed, source):
    experts, ram = begin(installed, source)
    finish(source, experts)
    assert source.begun == EVERYTHING
    assert ram.holds_all
    assert not experts.stats.hits
    assert not experts.stats.misses
    assert experts.stats.bytes_moved == 8 * installed.blueprint.expert.nbytes
    assert is_right(installed, experts)
    assert not experts.stats.misses
    assert len(source.begun) == 8


def test_a_predicted_expert_comes_before_others_and_a_wrong_one_comes_all_the_same(
    installed, source, monkeypatch
):
    monkeypatch.setattr("mixchat.experts.tier._SLOTS_PER_PREFETCH", 4)
    experts, ram = begin(installed, source, EVERYTHING[:1])
    wrong, right = EVERYTHING[5], EVERYTHING[7]
    ram.prefetch([wrong, right], pinned=[])
    ram.settle(1, [right])
    source.go()
    ram.request([right])
    ram.ready(right)
    finish(source, experts)
    assert source.begun == [EVERYTHING[0], right, *EVERYTHING[1:-1]]
    stats = experts.stats
    assert (stats.predictions, stats.right_predictions, stats.late_predictions) == (2, 1, 1)
    assert dict(stats.misses) == {right: 1}
    assert ram.holds_all


@pytest.mark.parametrize("number", range(0, 8, 3))
def test_layers_are_right_while_experts_are_coming(installed, source, monkeypatch, number):
    experts, _ = begin(installed, source, EVERYTHING[number : number + 1])
    wait = ExpertLoad.wait
    monkeypatch.setattr(ExpertLoad, "wait", lambda load: [source.go(), wait(load)])
    assert is_right(installed, experts)
    finish(source, experts)
    assert is_right(installed, experts)


def test_fills_end_when_fewer_experts_may_be_held(installed, source):
    experts, ram = begin(installed, source, EVERYTHING[3:4])
    ram.resize(4)
    assert not experts.is_filling
    assert [ram.state(key) for key in EVERYTHING] == [RESIDENT] * 3 + [MISSING] * 5
    assert len(ram._memory.blocks) == 3
    source.go()
    assert is_right(installed, experts)
    ram.resize(8)
    assert is_right(installed, experts)
    assert not experts.is_filling


def test_a_fill_that_makes_room_for_another_expert_does_not_overwrite_it(installed, source):
    """A worker was lost while fills ran. Their slots went to its experts, and were filled again."""
    experts = runner(installed, 4, source, reads=1)
    ram = experts.ram
    ram.elsewhere = frozenset(EVERYTHING[4:])
    source.held = {EVERYTHING[0]: threading.Event()}
    experts.fill(EVERYTHING)
    source.wait_for(EVERYTHING[0])
    ram.elsewhere = frozenset()
    ram.request(EVERYTHING[4:6])
    (gone, *_) = [key for key in EVERYTHING[:4] if ram.state(key) == MISSING]
    source.go()
    for key in EVERYTHING[4:6]:
        ram.ready(key)
    finish(source, experts)
    assert is_right(installed, experts)
    ram.load(gone, [])
    assert ram.holds(gone)


def test_fills_end_when_the_engine_is_closed(installed, source):
    others = set(threading.enumerate())
    experts, ram = begin(installed, source, EVERYTHING[3:4])
    experts.close()
    assert not ram._memory.blocks
    source.go()
    for thread in set(threading.enumerate()) - others:
        thread.join()
    assert source.begun == EVERYTHING[:4]


def test_an_interrupt_while_a_fill_is_needed_leaves_it_on_its_way(installed, source, monkeypatch):
    experts, ram = begin(installed, source, EVERYTHING[:1])

    def interrupt(load):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExpertLoad, "wait", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            experts.run(0, *routing(9))
    source.go()
    assert is_right(installed, experts)
    finish(source, experts)
    assert ram.holds_all
    assert sorted(source.begun) == EVERYTHING


class Watch:
    """Memory that is short if told so."""

    def __init__(self) -> None:
        self.ample, self.told = True, list[int]()

    def is_ample(self) -> bool:
        return self.ample

    def limit(self, held: int) -> int:
        self.told.append(held)
        return 8


def test_no_fill_begins_while_memory_is_short(installed, source, monkeypatch):
    watch = Watch()
    experts = runner(installed, 8, source, reads=1, watch=watch)
    ram = experts.ram
    source.held = {EVERYTHING[2]: threading.Event()}
    experts.fill(EVERYTHING)
    source.wait_for(EVERYTHING[2])
    watch.ample = False
    finish(source, experts)
    assert source.begun == EVERYTHING[:3]
    assert [ram.state(key) for key in EVERYTHING] == [RESIDENT] * 3 + [MISSING] * 5
    assert is_right(installed, experts)


def test_experts_that_are_still_to_come_do_not_count_as_held(installed, source, monkeypatch):
    """Their memory would be missing from what is free, and a limit that counts it too high."""
    experts, ram = begin(installed, source, EVERYTHING[3:4])
    watch = Watch()
    monkeypatch.setattr(ram, "_watch", watch)
    ram.follow_memory()
    finish(source, experts)
    ram.follow_memory()
    assert watch.told == [4, 8]


def test_what_the_model_used_itself_is_counted_and_stays_if_memory_gets_short(installed, source):
    """These uses are counted late, but before experts leave their slots."""
    experts, ram = begin(installed, source)
    finish(source, experts)
    experts.note_hits(0, [[3, 1], [2, 0]])
    experts.note_hits(0, [[3, 2], [2, 1]])
    ram.resize(6)
    kept = [key for key in EVERYTHING if ram.holds(key)]
    assert kept == [ExpertKey(0, n) for n in (1, 2, 3)] + [ExpertKey(1, n) for n in (0, 1, 2)]
    experts.note_hits(1, [[0, 1]])
    uses = {(0, 3): 2, (0, 1): 1, (0, 2): 1, (1, 2): 2, (1, 0): 2, (1, 1): 2}
    assert {tuple(key): count for key, count in experts.stats.hits.items()} == uses


def test_counts_that_were_read_stay_and_the_next_ones_have_all_later_uses(installed, source):
    """A benchmark kept the counts, of which late ones were missing: it told 0% hits."""
    experts, _ = begin(installed, source)
    finish(source, experts)
    before = experts.stats
    experts.note_hits(0, [[3, 1], [2, 0]])
    since = experts.stats.since(before)
    assert not before.hits
    assert (since.hits.total(), since.hit_rate) == (4, 1.0)
