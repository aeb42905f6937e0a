"""The body of a chat, turned into jobs.

| field                              | taken as                                              |
| ---------------------------------- | ----------------------------------------------------- |
| messages                           | system, developer, user, assistant; text only         |
| messages[-1] of the assistant      | the beginning of the answer, which continues it       |
| messages[].name                    | ignored: no template of these models has a place      |
| max_completion_tokens              | as max_tokens                                         |
| logprobs, top_logprobs             | at most 20                                            |
| response_format                    | text, json_object, json_schema                        |
| grammar                            | GBNF or Lark                                          |
| modalities, reasoning_effort       | ["text"] and "none", which is what these models do    |
| tools, functions                   | ignored and named, since the model calls none;        |
|                                    | refused where a choice of them forces a call          |
| audio, and so on                   | refused: these models cannot do that                  |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixchat.serving.requests.fields import Fields, fields_of, refuse, refuse_value
from mixchat.serving.requests.forms import Compile, read_response_format
from mixchat.serving.requests.options import TOP_LOGPROBS, Defaults, ParsedRequest, read_options
from mixchat.serving.service import Service
from mixchat.text.messages import Message, Role

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_NO_TOOLS = "is not supported: the model cannot call tools"
_UNSUPPORTED = "unsupported_value"
_NOT_TEXT = "is not supported: the model reads and writes text alone"
_MOST_MESSAGES = 10_000
_MOST_PARTS = 1000


def read_chat(
    body: dict[str, Any], service: Service, defaults: Defaults, compile_form: Compile
) -> ParsedRequest:
    """Return what a body asks for. It may take seconds to encode a long conversation.

    Raises `RequestError`, and `PromptError` where the template cannot express the conversation.
    """
    fields = Fields(body)
    options = read_options(fields, service, defaults)
    # Open WebUI and others offer tools with each question, and can do without a call.
    offered = tuple(name for name in ("tools", "functions") if fields.is_given(name))
    top_logprobs = _top_logprobs(fields)
    _refuse_what_the_model_cannot_do(fields)
    messages = _messages(fields)
    service.context.check_text("".join(message.content for message in messages), "the prompt")
    template, continued = service.template, messages[-1].role == "assistant"
    start = service.tokenizer.encode(messages.pop().content) if continued else []
    constraint = read_response_format(
        fields, compile_form, before=start, continued=template.continues_prompt
    )
    fields.end()
    return replace(options, ignored=options.ignored + offered).asked(
        [[*template.encode(messages), *start]],
        stop_ids=template.stop_ids,
        top_logprobs=top_logprobs,
        constraint=constraint,
        continues_prompt=continued or template.continues_prompt,
    )


def _top_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.number("top_logprobs", TOP_LOGPROBS)
    if top and not wanted:
        fields.refuse("top_logprobs", "needs logprobs: true", "invalid_value")
    return (top or 0) if wanted else None


def _refuse_what_the_model_cannot_do(fields: Fields) -> None:
    fields.ignore("parallel_tool_calls")
    for name in ("tool_choice", "function_call"):
        if fields.take(name) not in (None, "none", "auto"):
            fields.refuse(name, "cannot be followed: the model cannot call tools", _UNSUPPORTED)
    fields.refuse_if_given(_NOT_TEXT, "audio", "web_search_options")
    if (modalities := fields.take("modalities")) not in (None, ["text"]):
        fields.wrong("modalities", '["text"]', modalities)
    if (effort := fields.text("reasoning_effort")) not in (None, "none"):
        fields.wrong("reasoning_effort", '"none": the model does not reason apart', effort)


def _messages(fields: Fields) -> list[Message]:
    items = fields.items("messages", _MOST_MESSAGES)
    if not items:
        fields.refuse("messages", "is missing or empty", "missing_required_parameter")
    return [_message(fields_of(item, f"messages[{i}]")) for i, item in enumerate(items)]


def _message(fields: Fields) -> Message:
    role = fields.text("role")
    if role in ("tool", "function"):
        fields.refuse("role", _NO_TOOLS, _UNSUPPORTED)
    if role not in _ROLES:
        fields.wrong("role", f"one of {', '.join(_ROLES)}", role)
    fields.ignore("name")
    fields.refuse_if_given(_NO_TOOLS, "tool_calls", "function_call", "tool_call_id")
    fields.refuse_if_given(_NOT_TEXT, "audio", "refusal", "annotations")
    content = _content(fields.take("content"), fields.where("content"))
    fields.end()
    return Message(_ROLES[role], content)


def _content(value: Any, path: str) -> str:
    """Return the text of a message, whose parts are joined as they are."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse_value(path, "a string or a list of parts", value)
    if len(value) > _MOST_PARTS:
        refuse(path, f"has more than {_MOST_PARTS} parts")
    return "".join(_part(fields_of(part, f"{path}[{i}]")) for i, part in enumerate(value))


def _part(fields: Fields) -> str:
    if (kind := fields.text("type")) != "text":
        fields.wrong("type", '"text": the model reads text alone', kind)
    text = fields.text("text")
    if text is None:
        fields.refuse("text", "is missing", "missing_required_parameter")
    fields.end()
    return text
