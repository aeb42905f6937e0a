"""Jobs for a service over a tiny model, and a sink that waits for their answers."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from mixchat.serving.model_service import ModelService
from mixchat.serving.service import Delta, Done, Failed, Job, JobEvent

from mixchat.base.options import SamplingOptions

WAIT = 60  # seconds after which something hangs


class Waiter:
    """A sink that keeps the events, and may cancel the job after some of them."""

    def __init__(self, service: ModelService, job: Job, cancel_after: int | None = None) -> None:
        self.events: list[JobEvent] = []
        self.threads: set[str] = set()
        self._ended, self._deltas = threading.Event(), 0
        self._cancel_after = cancel_after
        self._cancel: queue.Queue[Callable[[], None]] = queue.Queue()
        self._cancel.put(service.submit((job, self._take)))

    def cancel(self) -> None:
        self._cancel.get(timeout=WAIT)()

    def _take(self, event: JobEvent) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread().name)
        self._deltas += isinstance(event, Delta)
        if self._deltas and self._deltas == self._cancel_after:
            self._cancel_after = None
            self.cancel()
        if isinstance(event, Done | Failed):
            self._ended.set()

    def result(self) -> tuple[str, Any]:
        """Return the text, and the last event."""
        assert self._ended.wait(WAIT)
        ends = [event for event in self.events if isinstance(event, Done | Failed)]
        assert ends == [self.events[-1]]
        return "".join(event.text for event in self.events if isinstance(event, Delta)), ends[0]


def job(number: int, **options: Any) -> Job:
    given: dict[str, Any] = {
        "prompt_ids": tuple(3 + (number * 7 + n * 11) % 250 for n in range(5 + number % 30)),
        "stop_ids": frozenset({2}),
        "sampling": SamplingOptions(temperature=1.0, seed=number),
        "max_tokens": 20,
    }
    return Job(**{**given, **options})
