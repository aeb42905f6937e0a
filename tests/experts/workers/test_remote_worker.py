"""A worker as the dispatcher sees it: tried again, but not too often, and asked again."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mixchat.base.errors import MixchatError, ResourceError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.workers.remote_worker import RemoteWorker
from mixchat.experts.workers.sockets import BadMessageError, ConnectionLostError

KEYS = [ExpertKey(0, 0), ExpertKey(0, 1)]


class FakeLink:
    """A link to a worker that multiplies by the number of the request, counted from 1."""

    address, slots, arithmetic, is_lost = "fake", 4, "words", False

    def __init__(self) -> None:
        self.requests: list[torch.Tensor] = []
        self.answered = 0
        self.fails = False

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        pass

    def start(self, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor) -> None:
        assert self.answered == len(self.requests)
        self.requests.append(x)

    def finish(self) -> torch.Tensor:
        assert self.answered < len(self.requests)
        if self.fails:
            raise ConnectionLostError("it is a test")
        self.answered += 1
        return self.requests[-1] * len(self.requests)

    def close(self) -> None:
        pass


def rows_of(value: float) -> LayerRows:
    """Two tokens, each for both experts."""
    selected = torch.tensor([[0, 1], [0, 1]])
    return LayerRows(0, torch.full((2, 8), value), selected)


def test_a_layer_that_begins_again_gets_its_own_answer():
    """A GPU ran out of memory in a layer whose rows were sent: the next request was a bug."""
    link = FakeLink()
    worker = RemoteWorker(lambda: link, print)
    worker.hold(KEYS)
    worker.begin(rows_of(5), KEYS)
    rows = rows_of(7)
    worker.begin(rows, KEYS)
    assert worker.finish(rows) == ()
    assert torch.equal(rows.outputs, torch.full((4, 8), 14.0))


def test_a_layer_that_begins_again_is_computed_at_home_where_the_worker_fails_meanwhile():
    notes: list[str] = []
    link = FakeLink()
    worker = RemoteWorker(lambda: link, notes.append)
    worker.hold(KEYS)
    worker.begin(rows_of(5), KEYS)
    link.fails = True
    worker.begin(rows_of(7), KEYS)
    assert list(worker.finish(rows_of(7))) == KEYS
    assert len(notes) == 1


@pytest.mark.parametrize("where", ["of", "put"])
def test_a_gpu_whose_memory_runs_out_while_rows_move_leaves_no_request_behind(monkeypatch, where):
    """The layer began again with the wait for an answer that nobody owed: an AssertionError."""
    link = FakeLink()
    worker = RemoteWorker(lambda: link, print)
    worker.hold(KEYS)
    rows = rows_of(5)

    def run_out(*arguments):
        raise torch.OutOfMemoryError("GPU 0 is full")

    def ask(rows):
        worker.begin(rows, KEYS)
        return worker.finish(rows)

    monkeypatch.setattr(rows, where, run_out)
    with pytest.raises(torch.OutOfMemoryError):
        ask(rows)
    again = rows_of(7)
    assert ask(again) == ()
    assert torch.equal(again.outputs, torch.full((4, 8), 7.0 * len(link.requests)))


def test_what_cannot_be_sent_is_computed_at_home():
    """It was taken for computed, with whatever was in memory: the worker was killed before."""
    notes: list[str] = []
    worker = RemoteWorker(FakeLink, notes.append)
    worker.hold(KEYS)
    worker._link.start = fail
    worker.begin(rows_of(5), KEYS)
    assert list(worker.finish(rows_of(5))) == KEYS
    assert not worker.held
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("seconds", "error", "tries"),
    [(2.0, MixchatError, 3), (0.001, MixchatError, 12), (2.0, ResourceError, 12)],
    ids=["hangs", "refuses", "is busy"],
)
def test_the_longer_it_takes_to_try_a_worker_the_longer_it_is_left_alone(
    monkeypatch, seconds, error, tries
):
    """One that hung cost 2 s at every turn. One that Ctrl-C had left busy rested for 20 s."""
    clock = [100.0]
    tried: list[float] = []

    def connect():
        tried.append(clock[0])
        if len(tried) == 1:
            return FakeLink()
        clock[0] += seconds
        raise error("it is a test")

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    worker = RemoteWorker(connect, lambda line: None)
    worker.hold(KEYS)
    worker._link.start = fail
    worker.begin(rows_of(5), KEYS)
    for _ in range(12):
        worker.begin_turn()
        clock[0] += 4
    assert len(tried) - 1 == tries


def test_a_worker_that_ends_between_two_turns_is_told_once(monkeypatch):
    """Nobody was told that it no longer took part: only a fault within an answer gave a line."""
    links = [FakeLink(), None, None, FakeLink(), None]
    notes: list[str] = []

    def connect():
        link = links.pop(0)
        if link is None:
            raise MixchatError("fake: no worker listens there")
        return link

    monkeypatch.setattr("time.monotonic", lambda: 100.0)  # a try takes no time: no rest follows
    worker = RemoteWorker(connect, notes.append)
    worker.hold(KEYS)
    for told in (1, 1, 1, 2):
        if worker._link is not None:
            worker._link.is_lost = True
        worker.begin_turn()
        assert len(notes) == told
    assert notes[0].startswith("worker fake is lost (no worker listens there)")


def test_a_worker_that_lies_is_blamed_once_and_left_out(monkeypatch):
    notes: list[str] = []
    links = [FakeLink(), FakeLink()]
    worker = RemoteWorker(lambda: links.pop(0), notes.append)
    worker.hold(KEYS)

    def lie():
        raise BadMessageError("it sent numbers that are not finite")

    worker._link.finish = lie
    worker.begin(rows_of(5), KEYS)
    assert list(worker.finish(rows_of(5))) == KEYS
    for _ in range(3):
        worker.begin_turn()
    assert len(links) == 1
    assert notes == [
        "worker fake is lost (it sent numbers that are not finite): this machine computes its "
        "experts from now on"
    ]


def fail(*request: Any) -> None:
    raise ConnectionLostError("its connection has failed")
