"""Workers for the tests, which end with them."""

from collections.abc import Iterator

import pytest
from worker_double import ThreadedWorker, WorkerProcess

from mixchat.experts.workers.link import Link


@pytest.fixture
def worker() -> Iterator[ThreadedWorker]:
    """A worker in a thread of this process."""
    threaded = ThreadedWorker()
    yield threaded
    threaded.stop()


@pytest.fixture
def link(worker: ThreadedWorker) -> Iterator[Link]:
    opened = worker.open()
    yield opened
    opened.close()


@pytest.fixture
def process() -> Iterator[WorkerProcess]:
    """A worker in a process of its own."""
    started = WorkerProcess()
    yield started
    started.end()
