"""Doubles for a chat: an engine that says what a script tells it, one token a character."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from character_tokens import character_bytes

from mixchat.base.context import Context
from mixchat.base.errors import MixchatError
from mixchat.base.options import ChatOptions, SamplingOptions, with_numbers
from mixchat.chat.session import ChatSession
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.stats import GenerationStats
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.face.events import End, Failed, Piece
from mixchat.face.model import Model, ModelText
from mixchat.face.model_answer import Round
from mixchat.face.prompt import PromptMaker
from mixchat.face.request import Request
from mixchat.face.running_answer import RunningAnswer
from mixchat.text.messages import Message
from mixchat.text.thinking import ThinkingFormat

STOP = 0
KEY = ExpertKey(0, 0)
# Harmony's control tokens, each a private character.
_NAMES = ("channel", "message", "start", "end", "return", "call")
MARKS = {f"<|{name}|>": 0xE000 + place for place, name in enumerate(_NAMES)}


@dataclass
class Experts:
    """Two experts of one layer, of which the first is used, and held in RAM."""

    counts: ExpertStats = field(default_factory=ExpertStats)
    slots_by_tier: dict[str, int] = field(default_factory=lambda: {"host": 16})
    slots: int = 16
    is_filling: bool = False

    @property
    def stats(self) -> ExpertStats:
        return self.counts.copy()

    def tier(self, key: ExpertKey) -> str:
        return "host" if key == KEY else "disk"


@dataclass
class Config:
    eos_token_ids: tuple[int, ...] = (STOP,)
    vocab_size: int = 0x110000
    largest_context: int = 32768
    num_hidden_layers: int = 1
    num_local_experts: int = 2
    num_moe_layers: int = 1


class ScriptedEngine:
    """Gives the answers of `script` one after the other, each followed by the stop token.

    Where a script holds an exception in place of a character, it is raised there. A function is
    called there.
    """

    def __init__(self, *script: str | Sequence[Any], context_size: int = 1000) -> None:
        self.script = list(script)
        self.context_size = context_size
        self.config = Config()
        self.identity = "scripted"
        self.experts, self.blueprint = Experts(), SimpleNamespace(expert_count=32)
        self.slots_by_tier, self.expert_bytes = self.experts.slots_by_tier, 16_000_000
        self.passes = SimpleNamespace(total_tokens=1, total_seconds=1.0)
        self.sequences = [None]
        self.prompts: list[list[int]] = []
        self.requests: list[TokenAnswer] = []
        self.closed = 0  # answers
        self.load_seconds = 1.5
        self.is_closed = False
        self.delay = 0.0  # seconds before each token
        self.prompts_file: str | None = None  # gets the text of each prompt

    @property
    def context(self) -> Context:
        return Context(self.context_size, self.config.largest_context)

    @property
    def samplings(self) -> list[SamplingOptions]:
        return [request.sampling for request in self.requests]

    def longest_answer(self, ids: Sequence[int], max_tokens: int | None) -> int:
        room = self.context_size - len(ids)
        if room <= 0:
            raise self.context.prompt_too_long(len(ids))
        return room if max_tokens is None else min(max_tokens, room)

    def new_batch(self, *, shared_prefix: bool = True) -> "ScriptedBatch":
        return ScriptedBatch(self)

    def forget(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        self.is_closed = True


class ScriptedBatch:
    """A `Batch` of one answer, whose tokens a script gives."""

    capacity = 1

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._answer: TokenAnswer | None = None
        self._script = iter(())

    @property
    def size(self) -> int:
        return self._answer is not None

    def add(self, answer: TokenAnswer) -> None:
        engine = self._engine
        engine.prompts.append(list(answer.ids))
        engine.requests.append(answer)
        if engine.prompts_file:
            with open(engine.prompts_file, "a", encoding="utf-8") as file:
                file.write("".join(map(chr, answer.ids)) + "\n---\n")
        answer.stats.prefill_seconds, answer.stats.decode_seconds = 0.5, 0.25
        self._answer = answer
        self._script = iter([*engine.script.pop(0), chr(STOP)])

    def step(self) -> list[TokenAnswer]:
        answer = self._answer
        assert answer is not None
        if not answer.generated_tokens:
            answer.note_read(0)
        time.sleep(self._engine.delay)
        try:
            item = next(self._script)
            while callable(item):
                item()
                item = next(self._script)
            if isinstance(item, BaseException):
                raise item
            if not answer.has_ended:
                answer.ids.append(ord(item))
                answer.stats.generated_tokens += 1
                counts = self._engine.experts.counts
                counts.hits[KEY] += 3
                counts.misses[KEY] += 1
                counts.bytes_moved += 1000
                counts.bytes_read += 2000
                counts.stalled_seconds += 0.1
                counts.read_seconds += 0.1
        except MixchatError as error:
            answer.error = error
        if answer.has_ended:
            self._answer = None
            self._engine.closed += 1
        return [answer]


class ScriptedModel(Model):
    """A model without its thread: each event is computed when it is asked for."""

    def __init__(self, engine: ScriptedEngine, text: ModelText) -> None:
        self.engine, self.name = engine, "scripted"
        self.tokenizer, self.template = text.tokenizer, text.template
        self.sampling, self.advised_tokens = text.sampling, text.max_tokens
        self.forms = ScriptedForms()
        self._prompts = PromptMaker(text.tokenizer, text.template, engine.context, self.forms)

    @property
    def context(self) -> Context:
        return self.engine.context

    @property
    def identity(self) -> str:
        return self.engine.identity

    def do(self, work: Any) -> Any:
        return work(self.engine)

    def close(self) -> None:
        self.engine.close()

    def ask(self, request: Request) -> Any:
        return ScriptedEvents(self, request)


class ScriptedForms:
    """A form may be the function that starts a constraint. No other is held to anything."""

    def compile(self, form: Any, at_end: Any = None) -> Any:
        return form if callable(form) else what_was_asked


class ScriptedEvents:
    """The events of one answer. Exceptions of the script are raised in the caller."""

    def __init__(self, model: ScriptedModel, request: Request) -> None:
        self._events: list[Any] = []
        prompt = model.prompt(request)
        self._earlier = prompt.answered or Message("assistant", "")
        limit = model.longest_answer(request.max_tokens)
        most = model.engine.longest_answer(prompt.ids, limit)
        sampling = with_numbers(model.sampling, request.sampling)
        self._answer = RunningAnswer(
            replace(request, sampling=sampling, max_tokens=limit),
            prompt,
            self._events.append,
            model.tokenizer,
            model._prompts.parser(prompt),
            model.template.stop_ids,
            most,
        )
        self._shown: list[Piece] = []
        self._end: End | None = None
        self._iterator = self._computed(model.engine)

    @property
    def stats(self) -> GenerationStats:
        return replace(self._answer.stats)

    def cancel(self) -> None:
        self._answer.cancel()

    def close(self) -> None:
        self._answer.cancel()
        self._iterator.close()

    message = Round.message

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        event = next(self._iterator)
        if isinstance(event, Piece):
            self._shown.append(event)
        return event

    def _computed(self, engine: ScriptedEngine) -> Iterator[Any]:
        batch, last = engine.new_batch(), None
        self._answer.is_ready(may_prepare=True)
        self._answer.begin(batch, engine.experts)
        try:
            while last is None:
                yield from self._taken()
                if batch.size:
                    batch.step()
                last = self._answer.report(engine.experts)
            yield from self._taken()
        finally:
            engine.closed += batch.size
        if isinstance(last, Failed):
            raise last.error
        self._end = last
        yield last

    def _taken(self) -> Iterator[Any]:
        while self._events:
            yield self._events.pop(0)


class CharacterTokenizer:
    """A token is a character's code point; 0 is the control token that ends an answer."""

    control_tokens = MARKS
    token_bytes = character_bytes({STOP, *MARKS.values()})

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_template(self, text: str, inserts: Any = None) -> list[int]:
        for mark, token in MARKS.items():
            text = text.replace(mark, chr(token))
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        hidden = (STOP, *MARKS.values())
        return "".join(chr(token) for token in ids if token not in hidden)


@dataclass
class PlainTemplate:
    """`[user]Hi[assistant]Hello[user]...`, with the ids of an answer if it has some."""

    continues_prompt: bool = False
    stop_ids: frozenset[int] = field(default=frozenset({STOP}))
    thinking: ThinkingFormat | None = None
    tools: None = None
    prefix: str = ""  # before an answer
    variables: list[Any] = field(default_factory=list)  # of each prompt

    def encode(self, messages: Sequence[Any], variables: Any = None) -> list[int]:
        self.variables.append(variables)
        ids: list[int] = []
        for message in messages:
            own = message.content_ids or [ord(c) for c in message.content]
            ids += [ord(c) for c in f"[{message.role}]"] + list(own)
        return ids + [ord(c) for c in self.prefix]


class TinyTemplate:
    """Ids of a vocabulary of 97: 4 before a question, 5 before an answer, 2 ends one."""

    continues_prompt = False
    stop_ids = frozenset({2})
    thinking = tools = None

    def encode(self, messages: Sequence[Any], variables: Any = None) -> list[int]:
        ids = [1]
        for message in messages:
            own = message.ids or [10 + ord(character) % 80 for character in message.content]
            ids += [4, *own, 5] if message.role == "user" else own
        return ids


def what_was_asked(
    before: Sequence[int] = (), *, continued: bool = False, room: int | None = None
) -> Any:
    """Return what a form was asked for, in a constraint that is compiled."""
    constraint: Any = SimpleNamespace(asked=(list(before), continued, room), compiled=Future())
    constraint.close = lambda: None
    constraint.compiled.set_result(None)
    return constraint


def make_session(*script: str | Sequence[Any], **options: Any) -> Any:
    """A `ChatSession` with a scripted engine; it is `session.engine`."""
    template = PlainTemplate(
        continues_prompt=options.pop("continues_prompt", False),
        thinking=options.pop("thinking", None),
        prefix=options.pop("prefix", ""),
    )
    advised = options.pop("advised", SamplingOptions())
    advised_tokens, form = options.pop("advised_tokens", None), options.pop("form", None)
    tools = options.pop("tools", None)
    model = ScriptedModel(
        ScriptedEngine(*script, context_size=options.pop("context_size", 1000)),
        ModelText(CharacterTokenizer(), template, advised, advised_tokens),
    )
    return ChatSession(model, ChatOptions(**options), form, tools)
