"""The thread of a loaded model. It computes a batch of answers, pass by pass, for whoever asks.

Torch starts spinning threads for each thread that uses it, so this one loads the model, too.

It has no reference to `Model`. So a model that nobody holds any longer is freed.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from mixchat.base.errors import UsageError
from mixchat.face.events import End, Failed
from mixchat.face.request import QueueFullError, ShuttingDownError

if TYPE_CHECKING:
    from mixchat.engine.answer import TokenAnswer
    from mixchat.engine.batch import Batch
    from mixchat.engine.generate import Engine
    from mixchat.face.running_answer import RunningAnswer

_Result = TypeVar("_Result")
_COUNTED_PASSES = 16  # from one time to the next at which the engine's counts are read


@dataclass(frozen=True)
class ModelStats:
    """The counts of a model since it was loaded.

    running and waiting are answers now. prompt_tokens does not count cached_tokens. bytes_moved:
    of experts that were not in memory.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    busy_seconds: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0
    bytes_moved: int = 0

    def plus(self, other: ModelStats) -> ModelStats:
        return ModelStats(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def with_tokens(self, answer: TokenAnswer) -> ModelStats:
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + answer.tokens_read,
            cached_tokens=self.cached_tokens + answer.stats.reused_tokens,
            generated_tokens=self.generated_tokens + answer.generated_tokens,
        )

    def with_end(self, last: End | Failed) -> ModelStats:
        if isinstance(last, Failed):
            return replace(self, failed=self.failed + 1)
        if last.reason == "interrupted":
            return replace(self, cancelled=self.cancelled + 1)
        return replace(self, finished=self.finished + 1)


class ModelThread:
    """Answers requests with the engine of `load` until `end` is called, and closes the engine.

    Any thread may call it. As many answers are computed at once as the engine has caches.
    `waiting` more may wait. close: is called with the engine at the end. Raises as `load` does.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        close: Callable[[Engine], object],
        *,
        waiting: int,
        shared_prefix: bool,
    ) -> None:
        self._close_engine = close
        self._shared_prefix = shared_prefix
        self._waiting: list[RunningAnswer] = []
        self._running: list[RunningAnswer] = []
        self._tasks: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._is_copy = False
        self._passes = 0
        self._ended_stats = ModelStats()  # without the tokens of running answers
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=[load, loaded], name="model", daemon=True
        )
        for thread in _alive.copy():
            if thread._closing:
                thread._thread.join()  # its memory is needed
        self._thread.start()
        try:
            self.engine = loaded.result()
        except BaseException:
            self._closing = True  # after Ctrl-C it still loads
            raise
        self.capacity: int = len(self.engine.sequences) + waiting

    @property
    def stats(self) -> ModelStats:
        """Return the counts as they are now."""
        with self._changed:
            stats = self._ended_stats
            for answer in self._running:
                stats = stats.with_tokens(answer)
            return replace(stats, running=len(self._running), waiting=len(self._waiting))

    def check_process(self) -> None:
        """Raise `UsageError` in a forked process, which has no copy of the thread."""
        if self._is_copy:
            hint = "Load a model in each process, or let one process ask for all."
            raise UsageError("the model was loaded before this process was forked", hint=hint)

    def submit(self, answers: Sequence[RunningAnswer]) -> None:
        """Queue all answers or none. Raises `QueueFullError` and `ShuttingDownError`."""
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(self._running) + len(answers) > self.capacity:
                raise QueueFullError(f"{self.capacity} requests are here already")
            for answer in answers:
                answer.wake = self._wake
            self._waiting += answers
            self._changed.notify_all()

    def do(self, work: Callable[[Engine], _Result]) -> _Result:
        """Run `work` in this thread, between two passes, and return its result."""
        done: Future[_Result] = Future()
        with self._changed:
            self._check_open()
            self._tasks.append((work, done))
            self._changed.notify_all()
        return done.result()

    def end(self) -> None:
        """Take no more requests, and cut off the others. Do not wait for that.

        Any thread may collect a model as garbage, also one that this thread waits for.
        """
        with self._changed:
            self._closing = True
            for answer in (*self._waiting, *self._running):
                answer.cancel()
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more requests, cut off the others, and give all memory back."""
        self.end()
        self._thread.join()

    def _check_open(self) -> None:
        self.check_process()
        if self._closing:
            raise ShuttingDownError("the model is closed")

    def _run(self, load: Callable[[], Engine], loaded: Future[Engine]) -> None:
        _alive.add(self)
        try:
            self._load_and_answer(load, loaded)
        finally:
            _alive.discard(self)

    def _load_and_answer(self, load: Callable[[], Engine], loaded: Future[Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(engine)
        try:
            if not self._closing:
                self._answer_all(engine)
        finally:
            with self._changed:
                self._closing = True
                cut_off = (*self._waiting, *self._running)
                self._waiting.clear()
                self._running.clear()
            for answer in cut_off:  # only if an error ends the thread
                answer.sink(Failed(ShuttingDownError("the model has failed")))
            for _, done in self._tasks:
                done.cancel()
            self._close_engine(engine)

    def _answer_all(self, engine: Engine) -> None:
        """Compute passes until the model is closed."""
        batch = engine.new_batch(shared_prefix=self._shared_prefix)
        # A local name here would hold the last answer or task, and so perhaps the model, for ever.
        while self._wait(batch):
            self._do_tasks(engine)
            try:
                self._compute(batch)
            except Exception as error:  # a fault of ours: nobody may wait for ever
                self._fail(error)
                batch = engine.new_batch(shared_prefix=self._shared_prefix)

    def _do_tasks(self, engine: Engine) -> None:
        while self._tasks:
            work, done = self._tasks.pop(0)
            try:
                done.set_result(work(engine))
            except BaseException as error:
                done.set_exception(error)

    def _compute(self, batch: Batch) -> None:
        """Begin what waits, compute a pass, and report."""
        while self._begin_next(batch):
            pass
        changed = batch.step() if batch.size else []
        self._passes += 1
        if self._passes % _COUNTED_PASSES == 0:
            self._count()
        for answer in [a for a in self._running if a in changed]:
            last = answer.report(self.engine.experts)
            if last is not None:
                self._end(answer, last)

    def _fail(self, error: Exception) -> None:
        for answer in tuple(self._running):
            self._end(answer, Failed(error))

    def _wait(self, batch: Batch) -> bool:
        """Wait for something to do. Return False at the end."""

        def has_work() -> bool:
            is_over = self._closing and not self._waiting
            return bool(self._tasks or self._next(batch) or batch.size or is_over)

        with self._changed:
            self._changed.wait_for(has_work)
            return bool(self._tasks or self._waiting or batch.size)

    def _begin_next(self, batch: Batch) -> bool:
        """Begin the next answer, or end it if it is cancelled. Return False if there is none."""
        with self._changed:
            answer = self._next(batch)
            if answer is None:
                return False
            self._waiting.remove(answer)
            self._running.append(answer)
        if answer.is_cancelled:
            self._end(answer, answer.last_event(self.engine.experts))
            return True
        try:
            answer.begin(batch, self.engine.experts)
        except Exception as error:
            self._end(answer, Failed(error))
        return True

    def _next(self, batch: Batch) -> RunningAnswer | None:
        """Return a cancelled answer, else the first one that can begin.

        No more constraints are compiled than answers fit at once.
        """
        for answer in self._waiting:
            if answer.is_cancelled:
                return answer
        if batch.size == batch.capacity:
            return None
        prepared = sum(answer.constraint is not None for answer in self._waiting)
        for answer in self._waiting:
            had_constraint = answer.constraint is not None
            if answer.is_ready(may_prepare=prepared < batch.capacity):
                return answer
            prepared += (answer.constraint is not None) - had_constraint
        return None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count(self) -> None:
        """Note what the engine has done. After each pass that would take too long."""
        experts = self.engine.experts.stats
        with self._changed:
            self._ended_stats = replace(
                self._ended_stats,
                busy_seconds=self.engine.passes.total_seconds,
                expert_hits=experts.hits.total(),
                expert_misses=experts.misses.total(),
                bytes_moved=experts.bytes_moved,
            )

    def _end(self, answer: RunningAnswer, last: End | Failed) -> None:
        self._count()
        with self._changed:
            self._running.remove(answer)
            self._ended_stats = self._ended_stats.with_tokens(answer).with_end(last)
        try:
            # A constraint's process may have died. This answer and the others are whole.
            with suppress(OSError):
                answer.close()
        finally:  # or its reader would wait for ever
            answer.sink(last)


_alive: set[ModelThread] = set()  # whose threads run


def _close_all() -> None:
    """Close what nobody has closed. Python ends a daemon in the midst of native code."""
    for thread in _alive.copy():
        if hasattr(thread, "engine"):  # else it still loads, after Ctrl-C
            thread.close()


def _forget_all() -> None:
    """Let a forked process wait for no thread, and for no lock of one."""
    for thread in _alive:
        thread._changed = threading.Condition()
        thread._is_copy = True
    _alive.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
