"""The service over one loaded model, whose thread computes a batch of answers, pass by pass.

Torch starts spinning threads for each thread that uses it, so this one loads the model, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from mixchat.serving.running_job import RunningJob
from mixchat.serving.service import (
    Done,
    Failed,
    Job,
    QueueFullError,
    ServiceStats,
    ShuttingDownError,
    Sink,
)

if TYPE_CHECKING:
    from mixchat.engine.batch import Batch
    from mixchat.engine.generate import Engine
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

_COUNTED_PASSES = 16  # from one time to the next at which the engine's counts are read


class ModelService:
    """A `Service` over the engine of `load`, which `close` closes at the end.

    `queue` more jobs may wait. Raises as `load` does.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        tokenizer: Tokenizer,
        template: Template,
        *,
        queue: int,
        close: Callable[[Engine], object] = lambda engine: engine.close(),
        shared_prefix: bool = True,
    ) -> None:
        self._close_engine, self._shared_prefix = close, shared_prefix
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self._waiting: list[RunningJob] = []
        self._running: list[RunningJob] = []
        self._changed = threading.Condition()
        self._closing = False
        self._passes = 0
        self._ended_stats = ServiceStats()  # without the tokens of running jobs
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=[load, loaded], name="model", daemon=True
        )
        self._thread.start()
        self._engine = loaded.result()
        self.context = self._engine.context
        self.most_jobs: int = len(self._engine.sequences) + queue

    def submit(self, *jobs: tuple[Job, Sink]) -> Callable[[], None]:
        for job, _ in jobs:
            self._engine.longest_answer(job.prompt_ids, job.max_tokens)
        new = [RunningJob(job, sink, self.tokenizer, self.context.tokens) for job, sink in jobs]
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            if len(self._waiting) + len(self._running) + len(new) > self.most_jobs:
                raise QueueFullError(f"{self.most_jobs} requests are here already")
            self._waiting += new
            self._changed.notify_all()

        def cancel() -> None:
            for job in new:
                job.cancel()
            self._wake()

        return cancel

    def stats(self) -> ServiceStats:
        with self._changed:
            stats = self._ended_stats
            for job in self._running:
                stats = stats.with_tokens(*job.counts())
            return replace(stats, running=len(self._running), waiting=len(self._waiting))

    def close(self) -> None:
        with self._changed:
            self._closing = True
            for job in (*self._waiting, *self._running):
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _run(self, load: Callable[[], Engine], loaded: Future[Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(engine)
        try:
            self._answer_jobs(engine)
        finally:
            with self._changed:
                self._closing = True
                left = (*self._waiting, *self._running)
                self._waiting.clear()
                self._running.clear()
            for job in left:  # only if an error ends the thread
                job.sink(Failed(ShuttingDownError("the service has ended")))
            self._close_engine(engine)

    def _answer_jobs(self, engine: Engine) -> None:
        batch = engine.new_batch(shared_prefix=self._shared_prefix)
        while self._wait(batch):
            try:
                while (job := self._take_next_job(batch)) is not None:
                    self._begin(job, batch)
                self._step(batch)
            except Exception as error:  # a fault of ours: nobody may wait for ever
                for failed in tuple(self._running):
                    self._end(failed, Failed(error))
                batch = engine.new_batch(shared_prefix=self._shared_prefix)

    def _wait(self, batch: Batch) -> bool:
        """Wait for something to do. Return False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._next_job(batch) or batch.size or (self._closing and not self._waiting)
            )
            return bool(self._waiting or batch.size)

    def _take_next_job(self, batch: Batch) -> RunningJob | None:
        with self._changed:
            job = self._next_job(batch)
            if job is not None:
                self._waiting.remove(job)
                self._running.append(job)
            return job

    def _next_job(self, batch: Batch) -> RunningJob | None:
        """Return a cancelled job, else the first one that can begin.

        No more constraints are compiled than answers fit at once.
        """
        for job in self._waiting:
            if job.is_cancelled:
                return job
        if batch.size == batch.capacity:
            return None
        prepared = sum(job.has_constraint for job in self._waiting)
        for job in self._waiting:
            before = job.has_constraint
            if job.is_ready(self._wake, may_prepare=prepared < batch.capacity):
                return job
            prepared += job.has_constraint - before
        return None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _begin(self, job: RunningJob, batch: Batch) -> None:
        if job.is_cancelled:
            self._end(job, job.done("interrupted"))
            return
        try:
            job.begin(batch)
        except Exception as error:
            self._end(job, Failed(error))

    def _step(self, batch: Batch) -> None:
        changed = batch.step() if batch.size else []
        self._passes += 1
        if self._passes % _COUNTED_PASSES == 0:
            self._count()
        for job in [job for job in self._running if job.answer in changed]:
            last = job.report()
            if last is not None:
                self._end(job, last)

    def _count(self) -> None:
        """Note what the engine has done. After each pass that would take too long."""
        experts = self._engine.experts.stats
        with self._changed:
            self._ended_stats = replace(
                self._ended_stats,
                busy_seconds=self._engine.passes.total_seconds,
                expert_hits=experts.hits.total(),
                expert_misses=experts.misses.total(),
                bytes_moved=experts.bytes_moved,
            )

    def _end(self, job: RunningJob, last: Done | Failed) -> None:
        self._count()
        with self._changed:
            self._running.remove(job)
            self._ended_stats = self._ended_stats.with_tokens(*job.counts()).with_end(last)
        job.sink(last)
