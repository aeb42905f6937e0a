"""What a model is asked, whoever asks: a conversation or a text, and how to answer it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mixchat.base.errors import ResourceError, UsageError, short_repr
from mixchat.base.options import AnswerOptions, SamplingOptions
from mixchat.face.events import Event, Piece
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.output_constraint import OutputConstraint, schema_text
from mixchat.text.messages import Message
from mixchat.text.tool_call import TOOL_NAME, TOOL_NAME_RULE, Tool

if TYPE_CHECKING:
    from mixchat.base.context import Context
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats

# A JSON schema, the text of a grammar (GBNF or Lark), either of them checked, or calls of tools.
Form: TypeAlias = "dict[str, Any] | str | OutputConstraint | CallForm"


@dataclass(frozen=True)
class ToolOffer:
    """The tools that an answer may call. If it `must_call`, it calls one or more of `callable`."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must_call: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class Request(AnswerOptions):
    """A request for one answer, with the options of `AnswerOptions`.

    - messages: the conversation. A last message of the assistant begins the answer.
    - prompt: a text or token ids, instead of messages. The answer continues them.
    - think: True and False turn thinking on and off if the model has a switch. None leaves it to
      the model's template.
    - sampling: all options, or the chosen ones by the names of `SamplingOptions`. The model's
      makers advise the rest.
    - variables: of the chat template, those in its `ThinkingFormat`
    - tools: None if the answer may call none
    - form: what the answer has to match
    """

    messages: Sequence[Message] = ()
    prompt: str | Sequence[int] | None = None
    sampling: SamplingOptions | Mapping[str, Any] = field(default_factory=dict)
    think: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolOffer | None = None
    form: Form | None = None


class FormError(UsageError):
    """A form that cannot be read or met. `subject` is schema, grammar or tools."""

    subject = "schema"


class QueueFullError(ResourceError):
    """Too many requests are waiting."""


class ShuttingDownError(ResourceError):
    """The model is closed, or will be."""


class AnswerEvents(Protocol):
    """The events of an answer while it is computed. The last one is `End`.

    Raises `MixchatError` if the answer cannot be finished.
    """

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and seconds so far."""

    def message(self) -> Message | None:
        """Return the message to remember of what was yielded so far, None if it shows nothing."""

    def cancel(self) -> None:
        """End the answer soon. Any thread or signal handler may call it."""

    def close(self) -> None:
        """End the answer, if it has not ended."""

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...


class ChatModel(Protocol):
    """A model that answers, on this machine or on a server.

    identity: differs if the weights do. sampling: the advice of the model's makers. engine, and
    sampling: None on a server. context: None if its size is not known.
    """

    @property
    def identity(self) -> str: ...

    @property
    def sampling(self) -> SamplingOptions | None: ...

    @property
    def engine(self) -> Engine | None: ...

    @property
    def context(self) -> Context | None: ...

    @property
    def can_skip_thinking(self) -> bool:
        """Return whether `Request.think` has an effect."""

    def about(self) -> dict[str, str]:
        """Return facts of the model for a person, by label."""

    def longest_answer(self, max_tokens: int | None) -> int | None:
        """Return how many tokens an answer may have, None for what fits, or a server allows."""

    def used_tokens(self, messages: Sequence[Message]) -> int | None:
        """Return how many tokens a conversation takes, None if that is not known."""

    def ask(self, request: Request) -> AnswerEvents:
        """Begin an answer. Raises `PromptTooLongError` if the prompt does not fit the context."""

    def close(self) -> None:
        """Give the memory back. Answers that run are cut off."""


def request_of(
    messages: Sequence[Message | Mapping[str, Any]] = (),
    **options: Any,
) -> Request:
    """Return a request with options by the names of `Request` and `SamplingOptions`.

    Tools are OpenAI's objects. Raises `UsageError` for an unknown option and for tools.
    `checked_request` checks the other values.
    """
    names = {field.name for field in fields(Request)}
    sampled = {field.name for field in fields(SamplingOptions)}
    for name in options:
        if name not in names | sampled:
            listed = ", ".join(sorted((names | sampled) - {"messages", "prompt", "sampling"}))
            raise UsageError(f"there is no option {name!r}", hint=f"The options are {listed}.")
    options = {name: value for name, value in options.items() if value is not None}
    numbers = {name: options.pop(name) for name in sampled & options.keys()}
    if isinstance(stop := options.get("stop"), str | list | tuple):
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(tools := options.get("tools"), list | tuple):
        offered = tuple(map(_tool, tools))
        if len({tool.name for tool in offered}) < len(offered):
            raise UsageError("two tools have the same name")
        options["tools"] = ToolOffer(offered, offered) if offered else None
    sampling = options.pop("sampling", {})
    if isinstance(sampling, SamplingOptions):
        sampling = replace(sampling, **numbers)
    elif isinstance(sampling, Mapping):
        sampling = {**sampling, **numbers}
    raw: Any = messages  # mappings become messages in `checked_request`
    return Request(raw, sampling=sampling, **options)


def _tool(tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        tool = Tool(function["name"], function.get("description"), function.get("parameters"))
    if not isinstance(tool, Tool):
        raise UsageError('a tool is {"type": "function", "function": {"name": ..., ...}}')
    if not TOOL_NAME.fullmatch(tool.name):
        raise UsageError(f"the name of a tool {TOOL_NAME_RULE}, not {short_repr(tool.name)}")
    schema = {} if tool.parameters is None else tool.parameters
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UsageError(f"the parameters of {tool.name} have to be the schema of an object")
    schema_text(schema)
    if not isinstance(tool.description, str | None):
        raise UsageError(f"the description of {tool.name} has to be a text")
    return tool


def shown_message(earlier: Message, pieces: Sequence[Piece]) -> Message | None:
    """Return the message of an answer that was not ended, joined to the `earlier` answer.

    It has no ids, because the last token may have added more text than was shown.
    """
    text = "".join(piece.text for piece in pieces)
    thinking = "".join(piece.thinking for piece in pieces)
    if not text and not thinking:
        return None
    return replace(
        earlier,
        content=earlier.content + text,
        ids=None,
        partial=True,
        thinking=earlier.thinking + thinking,
        thinking_tokens=earlier.thinking_tokens + pieces[-1].thinking_tokens,
    )
