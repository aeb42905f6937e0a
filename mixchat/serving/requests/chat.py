"""The body of a chat, turned into jobs.

| field                         | taken as                                           |
| ----------------------------- | -------------------------------------------------- |
| messages                      | system, developer, user, assistant, in text only   |
| messages[-1] of the assistant | the beginning of the answer                        |
| messages[].name               | ignored                                            |
| logprobs, top_logprobs        | at most 20                                         |
| messages[].reasoning_content  | ignored, as templates do                           |
| modalities                    | only ["text"]                                      |
| chat_template_kwargs,         | as far as the model's template knows them, else    |
| reasoning_effort, think       | ignored and named, or refused if strict            |
| tools, functions              | ignored and named, or refused if they force a call |
| audio, and so on              | refused                                            |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, FailFast, Field, WrapValidator

from mixchat.serving.requests.errors import field_error
from mixchat.serving.requests.fields import (
    RequestObject,
    max_items,
    number,
    only,
    wrong,
)
from mixchat.serving.requests.forms import Compile, constraint_of
from mixchat.serving.requests.options import (
    TOP_LOGPROBS,
    Defaults,
    ParsedRequest,
    SharedFields,
    parsed,
    read_fields,
)
from mixchat.serving.requests.thinking import take_thinking
from mixchat.serving.service import Service
from mixchat.text.messages import Message

_MAX_MESSAGES = 10_000
_MAX_PARTS = 1000  # of a message
_NO_TOOLS = "is not supported: the model cannot call tools"
_NO_CALL = "cannot be followed: the model cannot call tools"
_TEXT_ONLY = "is not supported: the model reads and writes text alone"
# An empty list counts as not given.
_ToolField: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _NO_TOOLS)]
_MediaField: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _TEXT_ONLY)]
_ToolChoice: TypeAlias = Annotated[Any, only(("none", "auto"), "unsupported_value", _NO_CALL)]


class _Part(RequestObject):
    never_null = ("type",)
    type: Literal["text"]
    text: str


def _no_tool(given: Any) -> Any:
    if given in ("tool", "function"):
        raise wrong("unsupported_value", _NO_TOOLS)
    return given


def _text(given: Any, parts_of: Callable[[Any], list[_Part]]) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong("invalid_value", "has to be a string or a list of parts")
    return "".join(part.text for part in parts_of(given))


class _ChatMessage(RequestObject):
    ignored = ("name", "reasoning_content", "reasoning")
    never_null = ("role", "content")
    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_no_tool)]
    tool_calls: _ToolField = None
    function_call: _ToolField = None
    tool_call_id: _ToolField = None
    audio: _MediaField = None
    refusal: _MediaField = None
    annotations: _MediaField = None
    # A string in the end, by `_text`.
    content: Annotated[list[_Part], FailFast(), max_items(_MAX_PARTS), WrapValidator(_text)]

    def message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, str(self.content))


class _ChatFields(SharedFields):
    ignored = (*SharedFields.ignored, "parallel_tool_calls")
    tools: Any = None
    functions: Any = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, number(TOP_LOGPROBS)] = None
    tool_choice: _ToolChoice = None
    function_call: _ToolChoice = None
    audio: _MediaField = None
    web_search_options: _MediaField = None
    modalities: Annotated[Any, only((["text"],), "invalid_value", 'has to be ["text"]')] = None
    reasoning_effort: Annotated[
        Any, only(("none",), "invalid_value", 'has to be "none": the model does not reason apart')
    ] = None
    messages: Annotated[list[_ChatMessage], FailFast(), max_items(_MAX_MESSAGES)] = Field([])


def read_chat(
    body: dict[str, Any], service: Service, defaults: Defaults, compile_form: Compile
) -> ParsedRequest:
    """Return the jobs of a body, which takes seconds for a long conversation.

    Raises `RequestError` and `PromptError`.
    """
    template, tokenizer = service.template, service.tokenizer
    body, variables = take_thinking(body, template.thinking)
    fields, job, ignored = read_fields(_ChatFields, body, service, defaults)
    # Open WebUI and others offer tools with each question, and need no call.
    ignored += tuple(n for n in ("tools", "functions") if getattr(fields, n) not in (None, []))
    if fields.top_logprobs and not fields.logprobs:
        raise field_error("top_logprobs", "needs logprobs: true", "invalid_value")
    if not fields.messages:
        raise field_error("messages", "is missing or empty", "missing_required_parameter")
    messages = [message.message() for message in fields.messages]
    service.context.check_text("".join(message.content for message in messages), "the prompt")
    continued, thinking = messages[-1].role == "assistant", template.thinking
    start = tokenizer.encode(messages.pop().content) if continued else []
    constraint = constraint_of(fields, compile_form, start, template.continues_prompt)
    if constraint is not None and thinking is not None and thinking.switch is not None:
        variables = {**variables, thinking.switch: False}
    ids = template.encode(messages, variables)
    if thinking is not None and (continued or constraint is not None):
        start = [*thinking.to_answer(tokenizer, ids), *start]
    job = replace(
        job,
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        constraint=constraint,
        continues_prompt=continued or template.continues_prompt,
        thinking=thinking,
        begun=len(start),
    )
    return parsed(fields, job, [[*ids, *start]], ignored)
