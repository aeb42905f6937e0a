"""A `Model` over an engine that answers from a script, a token a character.

The answer to a prompt is what follows `say:` in its last line, and "Hello" without that. Words in
braces do something: {seed} is the seed, {wait} a pause of 50 ms, {hang} one until it is cancelled,
{gate} one until there is the file that GATE names, {fail} an error, {crash} an exception that is no
error of mixchat's.
"""

import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from copy import copy
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from character_tokens import character_bytes

from mixchat.base.context import Context
from mixchat.base.errors import ResourceError
from mixchat.base.options import SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.experts.cache import ExpertStats
from mixchat.face.model import Model, ModelText
from mixchat.text.messages import Message, require_question
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tokenizer import require_unicode
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import PLAIN, ToolFormat

STOP, BOS = 0, 1
PAUSE_S = 0.05
_PARTS = re.compile(r"\{\w+\}|.", re.DOTALL)
_ADVICE = SamplingOptions(temperature=0.5)


class CharacterTokenizer:
    """A token is a character's code point; 0 ends an answer, 1 begins a text."""

    vocab_size = 0x110000
    bos_id, eos_id = BOS, STOP
    adds_bos = True
    control_tokens: ClassVar = {"</s>": STOP, "<s>": BOS}
    token_bytes = character_bytes({STOP, BOS})

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        return [ord(character) for character in text]

    def encode_template(self, text: str, inserts: Any = None) -> list[int]:
        parts = [(inserts or {}).get(character, character) for character in text]
        return [i for part in parts for i in (self.encode(part) if type(part) is str else part)]

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
        self.messages: list[Sequence[Message]] = []

    def encode(
        self, messages: Sequence[Message], variables: Any = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        self.variables.append(variables)
        self.messages.append(messages)
        require_question(messages)
        lines = [f"{tool.name}: {tool.description}" for tool in tools]
        for message in messages:
            calls = "".join(f" {call.name} {call.arguments}" for call in message.calls)
            lines.append(f"{message.role}: {message.content}{calls}")
        return [ord(c) for line in lines for c in f"{line}\n"]


class Script:
    """What an answer says."""

    def __init__(self, answer: TokenAnswer) -> None:
        self.answer = answer
        _, has_script, script = CharacterTokenizer().decode(answer.ids).rpartition("say:")
        text = script.strip("\n") if has_script else "Hello"
        self._parts = _PARTS.findall(text.replace("{seed}", str(answer.sampling.seed)))
        self._wakes_at = 0.0

    def step(self) -> bool:
        """Read the prompt, or generate a token. Return whether there is something new."""
        answer = self.answer
        if answer.has_ended:
            return True
        if not answer.tokens_read:
            answer.note_read(0)
            answer.tokens_read = answer.tokens_to_read
            answer.note_read(answer.tokens_read)
        if time.monotonic() < self._wakes_at or self._parts[:1] == ["{hang}"]:
            return False
        if self._parts[:1] == ["{gate}"] and not os.path.exists(os.environ["GATE"]):
            return False
        part = self._parts.pop(0) if self._parts else chr(STOP)
        if part == "{wait}":
            self._wakes_at = time.monotonic() + PAUSE_S
        elif part == "{fail}":
            answer.error = ResourceError("there is no memory", hint="Close other programs.")
        elif part == "{crash}":
            raise RuntimeError("a secret of the machine")
        elif part != "{gate}":
            answer.ids.append(ord(part))
            answer.stats.generated_tokens += 1
            answer.stats.decode_seconds += 1e-6
            # The stop token has what a token with a log probability of -0.5 leaves.
            answer.logits = torch.full([max(256, ord(part) + 1)], float("-inf"))
            answer.logits[STOP] = math.log(1 - math.exp(-0.5))
            answer.logits[ord(part)] = -0.5 if part != "~" else float("-inf")
        return len(part) == 1 or answer.has_ended


class ScriptedBatch:
    def __init__(self, engine: Any) -> None:
        self._engine, self._scripts = engine, list[Script]()
        self.capacity = len(engine.sequences)

    @property
    def size(self) -> int:
        return len(self._scripts)

    def add(self, answer: TokenAnswer) -> None:
        request = copy(answer)
        request.ids = list(answer.ids)
        self._engine.requests.append(request)
        self._scripts.append(Script(answer))

    def step(self) -> list[TokenAnswer]:
        changed = [script for script in self._scripts if script.step()]
        # Another thread may have cancelled an answer since its step. It ends in the next one.
        for script in changed:
            if script.answer.has_ended:
                self._scripts.remove(script)
        if not changed:
            time.sleep(0.002)
        return [script.answer for script in changed]


class ScriptedEngine:
    identity = "scripted"
    slots_by_tier: ClassVar = {"host": 16}

    def __init__(self, parallel: int, context_size: int) -> None:
        self.context = Context(context_size, 8000)
        self.sequences = range(parallel)
        self.requests: list[TokenAnswer] = []  # as they were begun
        self.config = SimpleNamespace(vocab_size=CharacterTokenizer.vocab_size)
        self.experts = SimpleNamespace(stats=ExpertStats())
        self.passes = SimpleNamespace(total_seconds=0.0)
        self.is_closed = False

    def new_batch(self, *, shared_prefix: bool) -> ScriptedBatch:
        return ScriptedBatch(self)

    def longest_answer(self, ids: Sequence[int], max_tokens: int | None) -> int:
        if len(ids) >= self.context.tokens:
            raise self.context.prompt_too_long(len(ids))
        room = self.context.tokens - len(ids)
        return room if max_tokens is None else min(room, max_tokens)

    def close(self) -> None:
        self.is_closed = True


class Anything:
    """A constraint that allows every token."""

    def __init__(self) -> None:
        self.compiled: Future[Any] = Future()
        self.compiled.set_result(None)

    def close(self) -> None:
        pass


def take_any_form(form: Any, at_end: Any = None) -> Any:
    """Stands for `FormCompiler.compile`."""
    return lambda *begun, **options: Anything()


def scripted_model(
    name: str = "scripted",
    *,
    parallel: int = 4,
    waiting: int = 64,
    context_size: int = 4000,
    sampling: SamplingOptions = _ADVICE,
    max_tokens: int | None = None,
    form_seconds: float = 60,
    compile_form: Any = take_any_form,
) -> Any:
    """Return the model. `None` for `compile_form` compiles forms as for any model."""
    text: Any = ModelText(CharacterTokenizer(), LineTemplate(), sampling, max_tokens)  # type: ignore[arg-type]
    engine: Any = ScriptedEngine(parallel, context_size)
    model = Model(name, lambda: engine, text, waiting=waiting, form_seconds=form_seconds)
    if compile_form is not None:
        model.forms.compile = compile_form  # type: ignore[method-assign]
    return model
