"""A double of `Service`: it answers from a script in threads, a token a character.

The answer to a prompt is what follows `say:` in its last line, and "Hello" without that. Words in
braces do something: {seed} is the seed, {wait} a pause of 50 ms, {hang} one until it is cancelled,
{gate} one until there is the file that GATE names, {fail} an error, {crash} an exception that is no
error of mixchat's.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from character_tokens import character_bytes
from mixchat.serving.service import (
    Delta,
    Done,
    Failed,
    Job,
    QueueFullError,
    Reading,
    ServiceStats,
    ShuttingDownError,
    Sink,
    TokenLogprob,
)

from mixchat.base.errors import ResourceError
from mixchat.base.model_config import Context
from mixchat.text.detokenizer import StopStrings
from mixchat.text.messages import Message, require_question
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tokenizer import require_unicode
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import PLAIN, ToolFormat
from mixchat.text.tool_parser import answer_parser

STOP, BOS = 0, 1
PAUSE = 0.05
_PARTS = re.compile(r"\{\w+\}|.", re.DOTALL)


class CharacterTokenizer:
    """A token is a character's code point; 0 ends an answer, 1 begins a text."""

    vocab_size = 0x110000
    bos_id, eos_id = BOS, STOP
    adds_bos = True
    control_tokens: ClassVar = {"</s>": STOP, "<s>": BOS}

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        return [ord(character) for character in text]

    def encode_template(self, text: str, inserts: Any = None) -> list[int]:
        parts = [(inserts or {}).get(character, character) for character in text]
        return [i for part in parts for i in (self.encode(part) if type(part) is str else part)]

    token_bytes = character_bytes({STOP, BOS})

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i not in (STOP, BOS))

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)


class LineTemplate:
    """`user: Hi`, a line for each message."""

    stop_ids = frozenset({STOP})
    continues_prompt = False
    thinking: ThinkingFormat | None = None
    tools: ToolFormat | None = PLAIN

    def __init__(self) -> None:
        self.variables: list[Any] = []  # of each prompt

    def encode(
        self, messages: Sequence[Message], variables: Any = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        self.variables.append(variables)
        require_question(messages)
        lines = [f"{tool.name}: {tool.description}" for tool in tools]
        for message in messages:
            calls = "".join(f" {call.name} {call.arguments}" for call in message.calls)
            lines.append(f"{message.role}: {message.content}{calls}")
        return [ord(c) for line in lines for c in f"{line}\n"]


@dataclass
class Running:
    """A job that was submitted."""

    job: Job
    sink: Sink
    cancelled: threading.Event


class ScriptedService:
    """Answers up to `parallel` jobs at once, each in a thread; `queue` more may wait."""

    def __init__(self, *, parallel: int = 4, queue: int = 64, context_size: int = 4000) -> None:
        self.name = "scripted"
        self.context = Context(context_size, 8000)
        self.tokenizer = CharacterTokenizer()
        self.template = LineTemplate()
        self.jobs: list[Job] = []
        self._places = threading.Semaphore(parallel)
        self.most_jobs = parallel + queue
        self._lock = threading.Lock()
        self._running: list[Running] = []
        self._stats = ServiceStats()
        self._closing = False
        self._empty = threading.Event()
        self._empty.set()

    def submit(self, *jobs: tuple[Job, Sink]) -> Callable[[], None]:
        with self._lock:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            if len(self._running) + len(jobs) > self.most_jobs:
                raise QueueFullError(f"{len(self._running)} requests are here already")
            for job, _ in jobs:
                if len(job.prompt_ids) >= self.context.tokens:
                    raise self.context.prompt_too_long(len(job.prompt_ids))
            self.jobs += [job for job, _ in jobs]
            new = [Running(job, sink, threading.Event()) for job, sink in jobs]
            self._running += new
            self._empty.clear()
        for running in new:
            threading.Thread(target=self._work, args=(running,), daemon=True).start()

        def cancel() -> None:
            for running in new:
                running.cancelled.set()

        return cancel

    def stats(self) -> ServiceStats:
        with self._lock:
            return replace(self._stats, running=len(self._running))

    def close(self) -> None:
        with self._lock:
            self._closing = True
        for running in list(self._running):
            running.cancelled.set()
        self._empty.wait(5)

    def _work(self, running: Running) -> None:
        with self._places:
            try:
                last = self._answer(running)
            except Exception as error:
                last = Failed(error)
        with self._lock:
            self._running.remove(running)
            self._count(last)
            if not self._running:
                self._empty.set()
        running.sink(last)

    def _count(self, last: Done | Failed) -> None:
        if isinstance(last, Failed):
            name = "failed"
        else:
            name = "cancelled" if last.reason == "interrupted" else "finished"
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + 1})

    def _answer(self, running: Running) -> Done:
        job, total = running.job, len(running.job.prompt_ids)
        for done in range(0, total + 1, max(total // 2, 1)):
            running.sink(Reading(done, total))
        stops, tokens, reason = StopStrings(job.stop), 0, "stop"
        parser = answer_parser(job.thinking, job.tools, self.tokenizer, job.prompt_ids)
        thought = 0
        for part in self._script(job):
            if len(part) > 1:  # a word in braces
                self._act(part, running)
            if running.cancelled.is_set():
                reason = "interrupted"
                break
            if len(part) > 1:  # a word in braces
                continue
            if tokens == job.max_tokens:
                reason = "length"
                break
            tokens += 1
            new = parser.add(part)
            thought += parser.start is None
            text, stopped = stops.add(new.text)
            running.sink(Delta(text, self._logprobs(job, part), new.thinking, new.calls))
            if stopped:
                reason = "stop_string"
                break
        else:
            if rest := stops.add(parser.flush().text)[0] + stops.flush():
                running.sink(Delta(rest))
            reason = "tool_calls" if parser.calls else "stop"
        return Done(reason, total, 0, tokens, thought)

    def _script(self, job: Job) -> Iterator[str]:
        prompt = self.tokenizer.decode(job.prompt_ids)
        _, found, script = prompt.rpartition("say:")
        text = script.strip("\n") if found else "Hello"
        return iter(_PARTS.findall(text.replace("{seed}", str(job.sampling.seed))))

    def _act(self, part: str, running: Running) -> None:
        if part == "{wait}":
            running.cancelled.wait(PAUSE)
        elif part == "{hang}":
            running.cancelled.wait()
        elif part == "{gate}":
            while not (os.path.exists(os.environ["GATE"]) or running.cancelled.wait(PAUSE)):
                pass
        elif part == "{fail}":
            raise ResourceError("there is no memory", hint="Close other programs.")
        elif part == "{crash}":
            raise RuntimeError("a secret of the machine")

    def _logprobs(self, job: Job, part: str) -> tuple[TokenLogprob, ...]:
        if job.top_logprobs is None:
            return ()
        others = [(ord(part), -0.5), (ord("x"), float("-inf")), (STOP, -3.0)]
        return (TokenLogprob(ord(part), -0.5, tuple(others[: job.top_logprobs])),)
