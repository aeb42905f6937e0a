"""The form of an answer that calls tools, as a grammar that holds calls to the tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mixchat.base.errors import UsageError
from mixchat.text.form.grammar import find_fault, grammar_error
from mixchat.text.form.schema import check_schema, json_rule
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import ToolFormat

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_BLANKS = r"/[ \n]{1,2}/?"


@dataclass(frozen=True)
class CallForm:
    """The calls that an answer may have.

    An answer that `must_call` begins with the opening of a call, or with `answer`, the JSON of this
    schema. Another one has any text in front of the opening, of which the form has only a few
    tokens. `control_tokens` has the ids of the format's control tokens by name.
    """

    format: ToolFormat
    tools: Sequence[Tool]
    control_tokens: Mapping[str, int] = field(default_factory=dict)
    must_call: bool = False
    parallel: bool = True
    answer: Mapping[str, Any] | None = None

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> CallForm:
        """Read what `to_text` has written."""
        given = json.loads(text)
        tools = [Tool(**tool) for tool in given["tools"]]
        return cls(**{**given, "format": ToolFormat(**given["format"]), "tools": tools})


def call_grammar(text: str) -> str:
    """Return the Lark grammar of a form. Raises `UsageError` if a schema cannot be met or used.

    A tool that is not strict may have a schema with unknown keys, which have no effect.
    """
    form = CallForm.parse(text)
    for tool in form.tools:
        _check(tool)
    if form.answer is not None:
        check_schema(dict(form.answer))
    fault = find_fault(_grammar(replace(form, control_tokens={})))
    if fault is not None:
        raise grammar_error(fault)
    return _grammar(form)


def _check(tool: Tool) -> None:
    options = {} if tool.strict else {"x-guidance": {"lenient": True}}
    try:
        check_schema({**_schema(tool), **options})
    except UsageError as error:
        raise UsageError(f"the arguments of {tool.name}: {error}", hint=error.hint) from None


def _schema(tool: Tool) -> dict[str, Any]:
    return _NO_ARGUMENTS if tool.parameters is None else {"type": "object", **tool.parameters}


def _grammar(form: CallForm) -> str:
    rules = [
        f"start: {'calls' if form.answer is None else 'calls | answer'}",
        f"calls: {_harmony(form) if form.format.kind == 'harmony' else _json_calls(form)}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(form.tools)))}",
    ]
    if not form.must_call:
        rules.append(f"before[lazy]: /(.|\\n)*{re.escape(form.format.opening)}/")
    if form.answer is not None:
        rules.append(f"answer: {_answer(form)}{json_rule(dict(form.answer))}")
    for number, tool in enumerate(form.tools):
        rules.append(f"call_{number}: {_call(form, tool.name, f'arguments_{number}')}")
        rules.append(f"arguments_{number}: {json_rule(_schema(tool), lenient=not tool.strict)}")
    return "\n".join(rules)


def _json_calls(form: CallForm) -> str:
    opening = _text(form, form.format.opening)
    is_control = form.format.opening in form.control_tokens
    first = opening if form.must_call else f"({opening} | before)" if is_control else "before"
    if form.format.kind == "list":
        more = '(", " call)*' if form.parallel else ""
        return f'{first} {_BLANKS} "[" call {more} "]"'
    one = f"{_BLANKS} call {_BLANKS} {_text(form, form.format.closing)}"
    return f"{first} {one}" + (f" ({_BLANKS} {opening} {one})*" if form.parallel else "")


def _harmony(form: CallForm) -> str:
    channel = _text(form, "<|channel|>")
    return f'{channel} "commentary to=functions" call' if form.must_call else "before call"


def _answer(form: CallForm) -> str:
    if form.format.kind != "harmony":
        return ""
    return f'{_text(form, "<|channel|>")} "final" {_text(form, "<|message|>")} '


def _call(form: CallForm, name: str, arguments: str) -> str:
    if form.format.kind != "harmony":
        head, end = f'{{"name": "{name}", "arguments": ', "}"
        return f"{json.dumps(head)} {arguments} {json.dumps(end)}"
    channel, constrain, message = (
        _text(form, f"<|{token}|>") for token in ("channel", "constrain", "message")
    )
    order = f'(" "? {channel} "commentary")? (" "? {constrain} "json" | " json")? " "?'
    return f'".{name}" {order} {message} {arguments}'


def _text(form: CallForm, text: str) -> str:
    token = form.control_tokens.get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"
