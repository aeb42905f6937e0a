"""A request to a model, checked before anything is computed: what to answer, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast, get_args

from mixchat.base.errors import PromptError, ResourceError, UsageError, short_repr
from mixchat.base.option import Option, options_of
from mixchat.base.options import AnswerOptions, SamplingOptions
from mixchat.face.events import Event, Piece
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.messages import Message, Role
from mixchat.text.tool_call import Tool, ToolCall, whole_arguments

if TYPE_CHECKING:
    from mixchat.base.context import Context
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats

_NOT_LISTS = (str, bytes, Mapping)
_BIAS = "logit_bias"
Choice: TypeAlias = Literal["none", "auto", "required"]  # of calling tools
# A JSON schema, the text of a grammar (GBNF or Lark), either of them checked, or calls of tools.
Form: TypeAlias = "dict[str, Any] | str | OutputConstraint | CallForm"


@dataclass(frozen=True)
class ToolOffer:
    """The tools that an answer may call. If it `must_call`, it calls one or more of `callable`."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must_call: bool = False
    parallel: bool = True

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool],
        choice: Choice = "auto",
        only: str | None = None,
        *,
        parallel: bool = True,
    ) -> ToolOffer | None:
        """Return the offer of tools with different names, None if no tool may be called.

        only: the one that has to be called, whatever the choice.
        """
        if not tools or (choice == "none" and only is None):
            return None
        usable = tuple(tool for tool in tools if only in (None, tool.name))
        must_call = choice == "required" or only is not None
        return cls(tuple(tools), usable, must_call, parallel)


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

    @property
    def knows_tools(self) -> bool:
        """Return whether the model's template has a form of calls."""

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


def checked_request(
    request: Request, advised: SamplingOptions, vocab_size: int, variables: Collection[str]
) -> Request:
    """Return a request whose values can be used, with each of its messages as a `Message`.

    Its numbers are Python's own. What was not chosen of the sampling is as `advised`. variables: of
    the model's template. Raises `UsageError`, and `PromptError` for a message.
    """
    _require(isinstance(request, Request), "the request", "a Request", request)
    for name, is_usable, rule in (
        ("sampling", _is(SamplingOptions | Mapping), "SamplingOptions, or some of them by name"),
        ("think", _is(bool | None), "True, False or None"),
        ("variables", _is(Mapping), "a dict"),
        ("tools", _is(ToolOffer | None), "a list of functions"),
        ("messages", _is_list, "a text or a list of messages"),
        ("prompt", lambda value: _is(str | None)(value) or _is_list(value), "a text or token ids"),
    ):
        _require(is_usable(getattr(request, name)), name, rule, getattr(request, name))
    options = {
        name: option.checked(value, name)
        for name, option in options_of(AnswerOptions).items()
        if (value := getattr(request, name)) is not None
    }
    for name, value in request.variables.items():
        if name not in variables:
            hint = f"It has {', '.join(variables) or 'none'}."
            raise UsageError(f"the chat template has no variable {name!r}", hint=hint)
        _require(_is(str | int | float | None)(value), name, "a text or a number", value)
    prompt = request.prompt
    if prompt is not None and not isinstance(prompt, str):
        prompt = _token_ids(prompt, vocab_size)
    messages = tuple(_message(message, vocab_size) for message in request.messages)
    sampling = _sampling(request.sampling, advised, vocab_size)
    changed: Any = {"messages": messages, "prompt": prompt, "sampling": sampling, **options}
    return replace(request, **changed)


def _sampling(
    chosen: SamplingOptions | Mapping[str, Any], advised: SamplingOptions, vocab_size: int
) -> SamplingOptions:
    values = vars(chosen) if isinstance(chosen, SamplingOptions) else chosen
    declared = options_of(SamplingOptions)
    usable: dict[str, Any] = {}
    for name, value in values.items():
        if name == _BIAS:
            usable[name] = _biases(value, declared[name], vocab_size)
        elif name not in declared:
            raise UsageError(f"there is no option {short_repr(name)} of sampling")
        elif value is not None or name != "seed":
            usable[name] = declared[name].checked(value, name)
    return replace(advised, **usable)


def _biases(biases: Any, declared: Option, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = list(biases.items()) if isinstance(biases, Mapping) else biases
    is_usable = _is_list(pairs) and all(_is_list(pair) and len(pair) == 2 for pair in pairs)
    _require(is_usable, _BIAS, "numbers by token id", biases)
    tokens = _token_ids([token for token, _ in pairs], vocab_size)
    amounts = [declared.checked(amount, f"{_BIAS} of a token") for _, amount in pairs]
    return tuple(zip(tokens, amounts, strict=True))


def _token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    _require(_is_list(ids), "a message's ids", "token ids", ids)
    # Arrays and tensors give numbers of Python's.
    ids = tuple(ids.tolist() if hasattr(ids, "tolist") else ids)
    for token in ids:
        is_number = type(token) is int or isinstance(token, Integral)
        if not is_number or not 0 <= int(token) < vocab_size:
            raise UsageError(f"token ids are 0 to {vocab_size - 1}, not {short_repr(token)}")
    return tuple(map(int, ids))


def _message(message: Any, vocab_size: int) -> Message:
    if isinstance(message, Mapping):
        role = message.get("role")
        content = message.get("content")
        tool_calls = message.get("tool_calls")
        call_id = message.get("tool_call_id")
        if tool_calls is None:
            tool_calls = ()
        calls = tuple(map(_call, tool_calls if _is_list(tool_calls) else [tool_calls]))
        if calls and content is None:  # as OpenAI's answers with calls have it
            content = ""
        call_id = "" if call_id is None else str(call_id)
        text = _joined_parts(content) if isinstance(content, list | tuple) else content
        message = Message(cast("Role", role), cast("str", text), calls=calls, call_id=call_id)
    role = message.role if isinstance(message, Message) else None
    has_role = isinstance(role, str) and role in get_args(Role)
    if not has_role or not isinstance(message.content, str):
        raise PromptError("a message needs a role (system, user, assistant, tool) and its content")
    return _with_own_values(message, vocab_size)


def _joined_parts(parts: Iterable[Any]) -> str:
    """Return the text of a content in OpenAI's parts. Raises `PromptError`."""
    texts = list[str]()
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                rule = 'a part of a content is {"type": "text", "text": ...}'
                raise PromptError(f"{rule}, not {short_repr(part)}: models read text alone")
    return "".join(texts)


def _with_own_values(message: Message, vocab_size: int) -> Message:
    """Return a message with token ids of Python's, and with whole arguments of its calls."""
    if message.ids is not None:
        message = replace(message, ids=_token_ids(message.ids, vocab_size))
    try:
        calls = tuple(
            replace(call, arguments=whole_arguments(call.arguments)) for call in message.calls
        )
    except (TypeError, ValueError, RecursionError):
        raise PromptError("the arguments of a call have to be a JSON object") from None
    return replace(message, calls=calls) if calls else message


def _call(call: Any) -> ToolCall:
    match call:
        case {"id": str(id), "function": {"name": str(name), "arguments": str(arguments)}}:
            return ToolCall(id, name, arguments)
    raise PromptError('a call is {"id": ..., "function": {"name": ..., "arguments": "{...}"}}')


def _is(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_list(value: Any) -> bool:
    has_items = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return has_items and not isinstance(value, _NOT_LISTS)


def _require(is_usable: bool, name: str, rule: str, value: object) -> None:
    if not is_usable:
        raise UsageError(f"{name} has to be {rule}, not {short_repr(value)}")


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
