"""Loads whose pieces are noted, and where a thread of a queue can be made to wait."""

import threading
from collections.abc import Callable
from functools import partial

from patience import PATIENCE_S

from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import PREDICTED, REQUESTED, ExpertLoad, Job, LoadQueue


class Stop:
    """A piece of a load where a thread of the queue waits for the test."""

    def __init__(self) -> None:
        self._reached, self._passed = threading.Event(), threading.Event()

    def reach(self) -> None:
        self._reached.set()
        assert self._passed.wait(PATIENCE_S)

    def wait(self) -> None:
        assert self._reached.wait(PATIENCE_S)

    def go(self) -> None:
        self._passed.set()


class Work:
    """Begins loads on a queue, and notes each of their pieces: `a0`, `a1`, `a there`."""

    def __init__(self, threads: int = 1, may_fill: Callable[[], bool] = lambda: True) -> None:
        self.counted: list[tuple[float, int]] = []
        self.queue = LoadQueue(
            threads,
            may_fill=may_fill,
            count_moved=lambda seconds, size: self.counted.append((seconds, size)),
        )
        self.others = set(threading.enumerate())
        self.log: list[str] = []
        self.stops: list[Stop] = []

    def begin(
        self,
        name: str,
        pieces: int = 1,
        *,
        layer: int = 0,
        priority: int = REQUESTED,
        stop: int = -1,
        slot: str | None = None,
    ) -> ExpertLoad:
        """Queue a load of so many pieces; in piece `stop` it waits for `self.stops[-1].go()`."""
        load = ExpertLoad(ExpertKey(layer, ord(name[0])), priority)
        here = Stop()
        if stop >= 0:
            self.stops.append(here)

        def carry_out(number: int) -> int:
            self.log.append(f"{name}{number}")
            if number == stop:
                here.reach()
            return 10

        job = Job(
            slot or name,
            lambda: [partial(carry_out, number) for number in range(pieces)],
            lambda: self.log.append(f"{name} there"),
        )
        self.queue.begin(load, job)
        return load

    def prefetch(self, name: str, pieces: int = 1, *, layer: int = 1, stop: int = -1) -> ExpertLoad:
        return self.begin(name, pieces, layer=layer, priority=PREDICTED, stop=stop)

    def hold(self) -> Stop:
        """Keep a thread busy until the stop that is returned is let go."""
        self.begin("-", stop=0)
        self.stops[-1].wait()
        return self.stops[-1]

    def finish(self) -> list[str]:
        """Let all go, and wait until there is nothing to do. The log, without the holds."""
        for stop in self.stops:
            stop.go()
        while threads := set(threading.enumerate()) - self.others:
            threads.pop().join(PATIENCE_S)
        return [entry for entry in self.log if not entry.startswith("-")]


def arrivals(log: list[str]) -> str:
    return "".join(entry[0] for entry in log if entry.endswith("there"))
