"""A loaded model. Its thread computes a batch of answers, pass by pass, for whoever asks.

Torch starts spinning threads for each thread that uses it, so this one loads the model, too.
"""

from __future__ import annotations

import queue
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer_request import AnswerRequest
from mixchat.face.checks import checked_request
from mixchat.face.events import End, Event, Failed, LeftOut, Piece, Reading
from mixchat.face.forms import FormCompiler
from mixchat.face.prompt import Prompt, PromptMaker
from mixchat.face.request import (
    QueueFullError,
    Request,
    ShuttingDownError,
    request_of,
    shown_message,
)
from mixchat.face.running_answer import RunningAnswer, Sink
from mixchat.text.form.output_constraint import PATIENT_S
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from mixchat.engine.batch import Batch
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

_Result = TypeVar("_Result")
_COUNTED_PASSES = 16  # from one time to the next at which the engine's counts are read
_abandoned: list[threading.Thread] = []  # that still load a model, after Ctrl-C


@dataclass(frozen=True)
class ModelText:
    """The text side of a model, with the advice of its makers.

    max_tokens: of an answer, None without advice, 0 for as many as fit.
    """

    tokenizer: Tokenizer
    template: Template
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None


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

    def with_tokens(self, prompt: int, cached: int, generated: int) -> ModelStats:
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + prompt,
            cached_tokens=self.cached_tokens + cached,
            generated_tokens=self.generated_tokens + generated,
        )

    def with_end(self, last: End | Failed) -> ModelStats:
        if isinstance(last, Failed):
            return replace(self, failed=self.failed + 1)
        if last.reason == "interrupted":
            return replace(self, cancelled=self.cancelled + 1)
        return replace(self, finished=self.finished + 1)


class Model:
    """A model over the engine of `load`, and a context manager that closes it.

    Any thread may call it. Several requests at once are answered together, as many as the engine
    has caches. `waiting` more may wait.

    form_seconds: that compiling a form may take. shared_prefix: let an answer reuse other prompts.
    close: is called with the engine at the end. Raises as `load` does.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        text: ModelText,
        *,
        waiting: int = 64,
        form_seconds: float = PATIENT_S,
        shared_prefix: bool = True,
        close: Callable[[Engine], object] = lambda engine: engine.close(),
    ) -> None:
        self.name, self.tokenizer, self.template = name, text.tokenizer, text.template
        self.sampling, self.advised_tokens = text.sampling, text.max_tokens
        self._close_engine, self._shared_prefix = close, shared_prefix
        self._waiting: list[RunningAnswer] = []
        self._running: list[RunningAnswer] = []
        self._tasks: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._closing, self._passes = False, 0
        self._ended_stats = ModelStats()  # without the tokens of running answers
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=[load, loaded], name="model", daemon=True
        )
        while _abandoned:
            _abandoned.pop().join()  # its memory is needed
        self._thread.start()
        try:
            self.engine = loaded.result()
        except BaseException:
            self._closing = True
            _abandoned.append(self._thread)
            raise
        self.context, self.identity = self.engine.context, self.engine.identity
        self.capacity: int = len(self.engine.sequences) + waiting
        self.forms = FormCompiler(text.tokenizer, text.template, form_seconds)
        self._prompts = PromptMaker(text.tokenizer, text.template, self.context, self.forms)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def chat(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> ModelAnswer:
        """Answer a conversation. Iterate over the result for its events, the last of them `End`.

        messages: `{"role": "user", "content": "Hi"}`, or `Message`, such as an earlier
        `End.message`. A last message of the assistant is continued. Options:

        - temperature, top_p, top_k, min_p, repeat_penalty, presence_penalty, frequency_penalty,
          logit_bias, seed: as in `SamplingOptions`, by default the advice of the model's makers
        - max_tokens: of the answer, thinking included. 0 for as many as fit.
        - stop: a string or several that end the answer and are not shown
        - think: True and False turn thinking on and off if the model has a switch
        - tools: functions in OpenAI's form. `Piece.calls` and `End.message.calls` have the calls.
          Send `End.message` back, then `{"role": "tool", "tool_call_id": ..., "content": ...}`.
        - form: a JSON schema (a dict) or a grammar (GBNF or Lark) that the answer has to match
        - overflow: "drop-oldest" leaves out old turns that do not fit
        - top_logprobs: likeliest tokens to report with each token, in `Piece.tokens`

        The answer ends early if its iterator is closed or dropped. Raises `PromptError` if the
        prompt does not fit the context, `UsageError` for an option that cannot be used, and
        `QueueFullError` if too many requests wait.
        """
        return self.ask(request_of(messages=messages, **options))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> ModelAnswer:
        """Continue a text or token ids, which no template changes. Otherwise as `chat`."""
        return self.ask(request_of(prompt=prompt, **options))

    def ask(self, request: Request) -> ModelAnswer:
        thinking = self.template.thinking
        known = () if thinking is None else thinking.variables
        size = self.engine.config.vocab_size
        return ModelAnswer(self, checked_request(request, self.sampling, size, known))

    @property
    def stats(self) -> ModelStats:
        """Return the counts as they are now."""
        with self._changed:
            stats = self._ended_stats
            for answer in self._running:
                stats = stats.with_tokens(*answer.counts())
            return replace(stats, running=len(self._running), waiting=len(self._waiting))

    @property
    def can_skip_thinking(self) -> bool:
        return self.template.thinking is not None and self.template.thinking.switch is not None

    def about(self) -> dict[str, str]:
        from mixchat.engine.report import slots_in_words

        if self.engine.is_closed:
            raise ShuttingDownError("the model is closed")
        return {"experts": slots_in_words(self.engine.slots_by_tier)}

    def longest_answer(self, max_tokens: int | None) -> int | None:
        # A small model may never end by itself, so there is a limit by default.
        if max_tokens is None:
            max_tokens = self.advised_tokens
        if max_tokens is None:
            max_tokens = self.context.usual_answer
        return min(max_tokens, self.context.tokens) or None

    def used_tokens(self, messages: Sequence[Message]) -> int:
        return self._prompts.used_tokens(messages)

    def prompt(self, request: Request, at_end: ExitStack | None = None) -> Prompt:
        """Return the prompt of a request. `submit` takes both. Raises as `PromptMaker.make`."""
        return self._prompts.make(request, at_end)

    def submit(self, *answers: tuple[Request, Prompt, Sink]) -> list[RunningAnswer]:
        """Queue all answers or none, and return them, so that they can be cancelled.

        Raises `QueueFullError`, `ShuttingDownError`, and `PromptError` if a prompt leaves no room
        for an answer.
        """
        running = []
        for request, prompt, sink in answers:
            limit = self.longest_answer(request.max_tokens)
            self.engine.longest_answer(prompt.ids, limit)
            sampling = cast("SamplingOptions", request.sampling or self.sampling)
            if sampling.seed is None:
                sampling = replace(sampling, seed=secrets.randbelow(2**32))
            stop_ids = self.template.stop_ids
            asked = AnswerRequest(prompt.ids, sampling, stop_ids, limit)
            parser, size = self._prompts.parser(prompt), self.context.tokens
            running.append(
                RunningAnswer(request, prompt, sink, asked, self.tokenizer, parser, size)
            )
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the model is closed")
            if len(self._waiting) + len(self._running) + len(running) > self.capacity:
                raise QueueFullError(f"{self.capacity} requests are here already")
            self._waiting += running
            self._changed.notify_all()
        return running

    def cancel(self, answers: Sequence[RunningAnswer]) -> None:
        """End answers soon. A pass is given up after a layer if nobody waits for it."""
        for answer in answers:
            answer.cancel()
        self._wake()

    def do(self, work: Callable[[Engine], _Result]) -> _Result:
        """Run `work` in the model's thread, between two passes, and return its result."""
        done: Future[_Result] = Future()
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the model is closed")
            self._tasks.append((work, done))
            self._changed.notify_all()
        return done.result()

    def close(self) -> None:
        """Take no more requests, cut off the others, and give all memory back."""
        with self._changed:
            self._closing = True
            for answer in (*self._waiting, *self._running):
                answer.cancel()
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
        """Begin what waits, compute a pass, and report, until the model is closed."""
        batch = engine.new_batch(shared_prefix=self._shared_prefix)
        while self._wait(batch):
            while self._tasks:
                work, done = self._tasks.pop(0)
                try:
                    done.set_result(work(engine))
                except BaseException as error:
                    done.set_exception(error)
            try:
                while self._begin_next(batch):
                    pass
                changed = batch.step() if batch.size else []
                self._passes += 1
                if self._passes % _COUNTED_PASSES == 0:
                    self._count()
                for answer in [a for a in self._running if a.answer in changed]:
                    last = answer.report(engine.experts)
                    if last is not None:
                        self._end(answer, last)
            except Exception as error:  # a fault of ours: nobody may wait for ever
                for answer in tuple(self._running):
                    self._end(answer, Failed(error))
                batch = engine.new_batch(shared_prefix=self._shared_prefix)

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
            self._end(answer, answer.end("interrupted"))
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
        prepared = sum(answer.has_constraint for answer in self._waiting)
        for answer in self._waiting:
            had_constraint = answer.has_constraint
            if answer.is_ready(self._wake, may_prepare=prepared < batch.capacity):
                return answer
            prepared += answer.has_constraint - had_constraint
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
            self._ended_stats = self._ended_stats.with_tokens(*answer.counts()).with_end(last)
        answer.sink(last)


class ModelAnswer:
    """The `AnswerEvents` of a model here. If nobody holds it any longer, the answer ends."""

    def __init__(self, model: Model, request: Request) -> None:
        self._events = queue.SimpleQueue[LeftOut | Reading | Piece | End | Failed]()
        prompt = model.prompt(request)
        (self._answer,) = model.submit((request, prompt, self._events.put))
        self.cancel = self.close = weakref.finalize(self, model.cancel, [self._answer])
        self._earlier = prompt.answered or Message("assistant", "")
        self._shown: list[Piece] = []
        self._end: End | Failed | None = None

    @property
    def stats(self) -> GenerationStats:
        return self._answer.stats

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._end is not None:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, Piece):
            self._shown.append(event)
        elif isinstance(event, End | Failed):
            self._end = event
        if isinstance(event, Failed):
            raise event.error
        return event

    def message(self) -> Message | None:
        if isinstance(self._end, End):
            return self._end.message
        shown, computed = shown_message(self._earlier, self._shown), self._answer.message()
        if shown is None or computed is None or shown.content != computed.content:
            return shown
        return computed if shown.thinking == computed.thinking else shown
