"""Transfers in the background: their order, and what becomes of those nobody wants any more."""

import threading
from collections.abc import Iterator

import pytest

from mixchat.experts.cache import ExpertKey
from mixchat.experts.mover import Mover, Transfer

KEYS = [ExpertKey(0, expert) for expert in range(8)]


class Gate:
    """A load that waits until it is let through, and notes what it did."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, int]] = []
        self.begun, self.open = threading.Event(), threading.Event()

    def load(self, key: ExpertKey, slot: int) -> None:
        self.begun.set()
        assert self.open.wait(30)
        if key == KEYS[7]:
            raise OSError("the disk says no")
        self.loaded.append((key.expert, slot))


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def begin(mover: Mover, expert: int) -> Transfer:
    transfer = Transfer(KEYS[expert])
    mover.begin(transfer, slot=expert + 10)
    return transfer


def test_they_are_carried_out_in_order_and_in_the_background(gate: Gate) -> None:
    mover = Mover(gate.load)
    transfers = [begin(mover, expert) for expert in (3, 0, 2)]
    assert gate.begun.wait(30)
    assert not any(transfer.ended for transfer in transfers)
    gate.open.set()
    for transfer in transfers:
        transfer.wait()
    assert gate.loaded == [(3, 13), (0, 10), (2, 12)]


def test_one_that_is_cancelled_in_time_is_not_carried_out(gate: Gate) -> None:
    mover = Mover(gate.load)
    begin(mover, 0)
    assert gate.begun.wait(30)
    begin(mover, 1).cancelled = True
    last = begin(mover, 2)
    gate.open.set()
    last.wait()
    assert [expert for expert, _ in gate.loaded] == [0, 2]


def test_a_failure_is_told_to_whoever_waits_and_the_next_is_carried_out(gate: Gate) -> None:
    gate.open.set()
    mover = Mover(gate.load)
    failing, next_one = begin(mover, 7), begin(mover, 1)
    with pytest.raises(OSError, match="says no"):
        failing.wait()
    assert failing.ended
    next_one.wait()


def test_the_thread_goes_when_there_is_nothing_to_do_and_comes_back(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixchat.experts.mover._IDLE", 0.01)
    gate.open.set()
    others = set(threading.enumerate())
    mover = Mover(gate.load)
    for expert in range(3):
        begin(mover, expert).wait()
        for thread in set(threading.enumerate()) - others:
            thread.join(30)
        assert set(threading.enumerate()) <= others
    assert len(gate.loaded) == 3
