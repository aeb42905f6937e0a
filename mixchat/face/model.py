"""A loaded model, and its answers as a program reads them."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mixchat.base.option import documented
from mixchat.base.options import AnswerOptions, SamplingOptions
from mixchat.face.arguments import turn_of
from mixchat.face.forms import FormCompiler
from mixchat.face.model_answer import AsyncAnswer, ModelAnswer
from mixchat.face.model_thread import ModelStats, ModelThread
from mixchat.face.prompt import Prompt, PromptMaker
from mixchat.face.request import Request, ShuttingDownError, checked_request
from mixchat.face.running_answer import RunningAnswer, Sink
from mixchat.face.turn import Turn
from mixchat.text.form.output_constraint import PATIENT_S
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mixchat.engine.generate import Engine
    from mixchat.face.arguments import ChatArguments
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ModelText:
    """The text side of a model, with the advice of its makers.

    max_tokens: of an answer, None without advice, 0 for as many as fit.
    """

    tokenizer: Tokenizer
    template: Template
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None


class Model:
    """A model over the engine of `load`, and a context manager that closes it.

    One that nobody holds any longer ends as if it were closed.

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
        self.name = name
        self.tokenizer = text.tokenizer
        self.template = text.template
        self.sampling = text.sampling
        self.advised_tokens = text.max_tokens
        self._thread = ModelThread(load, close, waiting=waiting, shared_prefix=shared_prefix)
        weakref.finalize(self, self._thread.end).atexit = False  # all are closed then
        self.engine = self._thread.engine
        self.capacity = self._thread.capacity
        self.context = self.engine.context
        self.identity = self.engine.identity
        self.forms = FormCompiler(text.tokenizer, text.template, form_seconds)
        self._prompts = PromptMaker(text.tokenizer, text.template, self.context, self.forms)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @documented(SamplingOptions, AnswerOptions)
    def chat(
        self,
        messages: str | Sequence[Message | Mapping[str, Any]],
        **options: Unpack[ChatArguments],
    ) -> ModelAnswer:
        """Answer a conversation: `model.chat("Hi").text()`, or iterate over it for its events.

        messages: a question as a text, or a list of `{"role": "user", "content": "Hi"}` and
        `Message`, such as an earlier `End.message`. A last message of the assistant is continued.
        Options:

        {options}
        - think: True and False turn thinking on and off if the model has a switch
        - tools: functions of Python's, or in OpenAI's form. A function's signature and docstring
          tell the model what it takes. It runs when the model calls it, the event `ToolResult` has
          its result, and the model answers again. `messages()` has all answers and results, for the
          next request. An exception is a result, too. A call of OpenAI's form ends the answer.
          `End.message.calls` has it. Send `End.message` back, then
          `{"role": "tool", "tool_call_id": ..., "content": ...}`.
        - tool_choice: "auto", "none", "required", or the name of the tool that has to be called
        - max_rounds (1 or more): Answers whose calls run functions, 10 by default. The next one is
          offered no tools.
        - form: a class, such as pydantic's, or a JSON schema (a dict), whose object `parsed()`
          returns. Or a grammar (GBNF or Lark). The answer has to match it.

        The makers of the model advise the sampling that is not chosen. `Piece.tokens` has the
        log probabilities. The last event is `End`. The answer ends early if it is closed or
        dropped. Raises `PromptError` if the prompt does not fit the context, `UsageError` for an
        option that cannot be used, and `QueueFullError` if too many requests wait.
        """
        return ModelAnswer(self, self._turn(messages=messages, **options))

    def achat(
        self,
        messages: str | Sequence[Message | Mapping[str, Any]],
        **options: Unpack[ChatArguments],
    ) -> AsyncAnswer:
        """Answer a conversation in asyncio, otherwise as `chat`.

        `async for event in model.achat("Hi")`, or `await model.achat("Hi").text()`. Functions may
        be async. Others run in a thread. Wrong options raise at once, and a prompt that is too long
        raises when the answer is read.
        """
        return AsyncAnswer(self, self._turn(messages=messages, **options))

    def generate(
        self, prompt: str | Sequence[int], **options: Unpack[ChatArguments]
    ) -> ModelAnswer:
        """Continue a text or token ids, which no template changes. Otherwise as `chat`."""
        return ModelAnswer(self, self._turn(prompt=prompt, **options))

    def ask(self, request: Request) -> ModelAnswer:
        return ModelAnswer(self, Turn(self._checked(request)))

    def _turn(self, **options: Any) -> Turn:
        # A token has about four characters, so a result is at most a quarter of the context.
        return turn_of(self._checked, self.context.tokens, **options)

    def _checked(self, request: Request) -> Request:
        thinking = self.template.thinking
        known = () if thinking is None else thinking.variables
        return checked_request(request, self.sampling, self.engine.config.vocab_size, known)

    @property
    def stats(self) -> ModelStats:
        """Return the counts as they are now."""
        return self._thread.stats

    @property
    def can_skip_thinking(self) -> bool:
        return self.template.thinking is not None and self.template.thinking.switch is not None

    @property
    def knows_tools(self) -> bool:
        return self.template.tools is not None

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
            most = self.engine.longest_answer(prompt.ids, limit)
            sampling = cast("SamplingOptions", request.sampling or self.sampling)
            if sampling.seed is None:
                sampling = replace(sampling, seed=secrets.randbelow(2**32))
            asked = replace(request, sampling=sampling, max_tokens=limit)
            parser = self._prompts.parser(prompt)
            stop_ids = self.template.stop_ids
            running.append(
                RunningAnswer(asked, prompt, sink, self.tokenizer, parser, stop_ids, most)
            )
        self._thread.submit(running)
        return running

    def do(self, work: Callable[[Engine], _Result]) -> _Result:
        """Run `work` in the model's thread, between two passes, and return its result."""
        return self._thread.do(work)

    def check_process(self) -> None:
        """Raise `UsageError` in a process that was forked after the model was loaded."""
        self._thread.check_process()

    def close(self) -> None:
        """Take no more requests, cut off the others, and give all memory back."""
        self._thread.close()
