"""Loads whose steps are noted, and where a mover's thread can be made to wait."""

import threading

from mixchat.experts.cache import ExpertKey
from mixchat.experts.mover import PREDICTED, REQUESTED, ExpertLoad, Mover, Steps

PATIENCE = 60  # seconds, after which a test fails instead of hanging


class Stop:
    """A point in the steps of a load where the mover's thread waits for the test."""

    def __init__(self) -> None:
        self._reached, self._passed = threading.Event(), threading.Event()

    def reach(self) -> None:
        self._reached.set()
        assert self._passed.wait(PATIENCE)

    def wait(self) -> None:
        assert self._reached.wait(PATIENCE)

    def go(self) -> None:
        self._passed.set()


class Work:
    """Begins loads on a mover, and notes each of their steps: `a0`, `a1`, `a there`."""

    def __init__(self) -> None:
        self.mover = Mover()
        self.others = set(threading.enumerate())
        self.log: list[str] = []
        self.stops: list[Stop] = []

    def begin(
        self,
        name: str,
        steps: int = 1,
        *,
        layer: int = 0,
        priority: int = REQUESTED,
        stop: int = -1,
    ) -> ExpertLoad:
        """Queue a load of so many steps; in step `stop` it waits for `self.stops[-1].go()`."""
        load = ExpertLoad(ExpertKey(layer, ord(name[0])), priority)
        here = Stop()
        if stop >= 0:
            self.stops.append(here)
        self.mover.begin(load, self._steps(name, steps, here, stop))
        return load

    def prefetch(self, name: str, steps: int = 1, *, layer: int = 1, stop: int = -1) -> ExpertLoad:
        return self.begin(name, steps, layer=layer, priority=PREDICTED, stop=stop)

    def hold(self) -> Stop:
        """Keep the mover busy until the stop that is returned is let go."""
        self.begin("-", stop=0)
        self.stops[-1].wait()
        return self.stops[-1]

    def finish(self) -> list[str]:
        """Let all go, and wait until there is nothing to do. The log, without the holds."""
        for stop in self.stops:
            stop.go()
        for thread in set(threading.enumerate()) - self.others:
            thread.join(PATIENCE)
        return [entry for entry in self.log if not entry.startswith("-")]

    def _steps(self, name: str, count: int, here: Stop, stop: int) -> Steps:
        try:
            for step in range(count):
                self.log.append(f"{name}{step}")
                if step == stop:
                    here.reach()
                yield
        except GeneratorExit:
            self.log.append(f"{name} closed")
            raise
        self.log.append(f"{name} there")


def arrivals(log: list[str]) -> str:
    return "".join(entry[0] for entry in log if entry.endswith("there"))
