"""The form of an answer that calls tools, as a grammar that holds calls to the tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from mixchat.base.errors import UsageError
from mixchat.text.form.grammar import checked_lark
from mixchat.text.form.literal_form import LiteralRules, unsupported
from mixchat.text.form.schema import alone, checked_closed, constants, escaped, json_rule
from mixchat.text.literals import GEMMA
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import ToolFormat

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_MARKUP_KEYS = {
    *("type", "properties", "required", "additionalProperties", "title", "description"),
    *("$schema", "$defs", "definitions"),
}
_TEXT_KEYS = {
    *("type", "enum", "const", "maxLength", "title", "description", "default", "examples"),
}
_HIDING_KEYS = {"$ref", "allOf", "anyOf", "oneOf"}
_NOTHING = '""'
_ID = "/[a-zA-Z0-9]{9}/"
_BLANKS = r"/[ \n]{1,2}/?"


@dataclass(frozen=True)
class CallForm:
    """The calls that an answer may have.

    If `must_call` is set, an answer begins with the opening of a call, or it is `answer`, the JSON
    of this schema. Otherwise any text may come before the opening. The form has only the last
    tokens of such a text. `control_tokens` has the ids of the format's control tokens by name.
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
        fields = json.loads(text)
        tools = [Tool(**tool) for tool in fields["tools"]]
        return cls(**{**fields, "format": ToolFormat(**fields["format"]), "tools": tools})


def call_grammar(text: str) -> str:
    """Return the Lark grammar of a form. Raises `UsageError` if a schema cannot be met or used.

    Objects are closed as in `schema_grammar`. A tool that is not strict may have a schema with
    unknown keys, which have no effect.
    """
    form = CallForm.parse(text)
    closed_tools = [_closed(tool) for tool in form.tools]
    for tool in form.tools if form.format.kind in ("markup", "literals") else ():
        _check_arguments(tool, have_quotes=form.format.kind == "literals")
    answer = None if form.answer is None else checked_closed(dict(form.answer))
    form = replace(form, tools=closed_tools, answer=answer)
    checked_lark(_grammar(replace(form, control_tokens={})))
    return _grammar(form)


def _closed(tool: Tool) -> Tool:
    """Return a tool whose arguments are closed. Raises `UsageError` if they cannot be used."""
    try:
        parameters = checked_closed(_schema(tool), lenient=not tool.strict)
        return replace(tool, parameters=parameters)
    except UsageError as error:
        raise UsageError(f"the arguments of {tool.name}: {error}", hint=error.hint) from None


def _check_arguments(tool: Tool, *, have_quotes: bool) -> None:
    """Raise `UsageError` for keys without effect if each argument is written by itself.

    Without `strict` only keys that hide the arguments' names are refused.
    """
    texts = [schema for name, schema in tool.arguments.items() if tool.takes_text(name)]
    unknown = {*(tool.parameters or {})} - _MARKUP_KEYS
    if tool.strict and not have_quotes:
        unknown |= {key for schema in texts for key in schema} - _TEXT_KEYS
    if not tool.strict:
        unknown &= set() if tool.arguments else _HIDING_KEYS
    if unknown:
        raise UsageError(f"the arguments of {tool.name}: {unsupported(unknown)}")


def _schema(tool: Tool) -> dict[str, Any]:
    return _NO_ARGUMENTS if tool.parameters is None else {"type": "object", **tool.parameters}


def _grammar(form: CallForm) -> str:
    rules = [
        f"start: {'calls' if form.answer is None else 'calls | answer'}",
        f"calls: {_calls(form)}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(form.tools)))}",
    ]
    if not form.must_call:
        rules.append(f"before[lazy]: /(.|\\n)*{re.escape(form.format.opening)}/")
    if form.answer is not None:
        rules.append(f"answer: {_answer(form)}{json_rule(dict(form.answer))}")
    for number, tool in enumerate(form.tools):
        rules.append(f"call_{number}: {_call(form, tool.name, f'arguments_{number}')}")
        if form.format.kind == "markup":
            rules += _markup_arguments(form, tool, number)
        elif form.format.kind == "literals":
            rules += _literal_arguments(form, tool, number)
        else:
            rules.append(f"arguments_{number}: {json_rule(_schema(tool), lenient=not tool.strict)}")
    if form.format.kind == "markup" or form.format.quote == GEMMA:
        rules.append(_open_text(form, "text", {}))
    return "\n".join(rules)


def _calls(form: CallForm) -> str:
    if form.format.kind == "harmony":
        channel = _text(form, "<|channel|>")
        return f'{channel} "commentary to=functions" call' if form.must_call else "before call"
    opening = _text(form, form.format.opening)
    is_control = form.format.opening in form.control_tokens
    first = opening if form.must_call else f"({opening} | before)" if is_control else "before"
    blanks = "" if form.format.kind in ("named", "literals") else _BLANKS
    closing = _text(form, form.format.closing)
    if form.format.kind == "list" or form.format.in_list:
        more = '(", " call)*' if form.parallel else ""
        return f'{first} {blanks} "[" call {more} "]" {closing}'
    call = f"{blanks} call {blanks} {closing}"
    return f"{first} {call}" + (f" ({blanks} {opening} {call})*" if form.parallel else "")


def _literal_arguments(form: CallForm, tool: Tool, number: int) -> list[str]:
    *_, equals, comma, _ = form.format.markup
    spell = partial(_tags, form)
    quote = form.format.quote
    rules = LiteralRules(
        *(_schema(tool), f"arguments_{number}", spell),
        quote=quote, equals=equals, comma=comma, lenient=not tool.strict,
        open_text=partial(_open_text, form),
    )  # fmt: skip
    try:
        return rules.rules()
    except UsageError as error:
        raise UsageError(f"the arguments of {tool.name}: {error}") from None


def _markup_arguments(form: CallForm, tool: Tool, number: int) -> Iterator[str]:
    """Yield the rules of a tool's arguments, in the order of its schema."""
    required = _schema(tool).get("required", ())
    names = list[str]()
    for i, name in enumerate(tool.arguments):
        rule = f"argument_{number}_{i}"
        rules = [*_markup_argument(form, tool, name, rule)]
        if rules:
            names.append(rule if name in required else f"{rule}?")
            yield from rules
    yield f"arguments_{number}: {' '.join(names) or _NOTHING}"


def _markup_argument(form: CallForm, tool: Tool, name: str, rule: str) -> Iterator[str]:
    """Yield the rules of an argument, none if no value is allowed."""
    _, _, name_start, name_end, end, _ = form.format.markup
    head = _tags(form, f"{name_start}{name}{name_end}")
    close = _tags(form, end)
    schema_part = tool.arguments[name]
    if not tool.takes_text(name):
        if '"$ref"' in json.dumps(schema_part):
            schema_part = alone(_schema(tool), f"/properties/{escaped(name)}")
        schema = schema_part if isinstance(schema_part, dict) else {}
        yield f"{rule}_value: {json_rule(schema, lenient=not tool.strict)}"
        yield f"{rule}: {head} {rule}_value {close}"
    elif "enum" in schema_part or "const" in schema_part:
        if texts := [json.dumps(text) for text in constants(schema_part) if isinstance(text, str)]:
            yield f"{rule}: {head} ({' | '.join(texts)}) {close}"
    elif "maxLength" in schema_part:
        yield _open_text(form, f"{rule}_text", schema_part)
        yield f"{rule}: {head} {rule}_text"
    else:
        yield f"{rule}: {head} text"


def _open_text(form: CallForm, name: str, schema: Mapping[str, Any]) -> str:
    """Return the rule `name` of a text without escapes, up to what ends it."""
    end = form.format.markup[4] if form.format.kind == "markup" else form.format.quote
    count = f"{{0,{schema['maxLength']}}}" if "maxLength" in schema else "*"
    tag = next((tag for tag in form.control_tokens if tag in end), None)
    text_end = end if tag is None else end[: end.index(tag)]
    pattern = re.escape(text_end).replace("\\\n", "\\n").replace("/", "\\/")
    if tag is None:
        return f"{name}[lazy]: /(.|\\n){count}{pattern}/"
    return f"{name}: /(.|\\n){count}{pattern}/ {_tags(form, end[len(text_end) :])}"


def _tags(form: CallForm, text: str) -> str:
    """Return a text as a part of a grammar. Control tokens in it stay tokens."""
    known = "|".join(map(re.escape, form.control_tokens)) or r"(?!)"
    return " ".join(_text(form, segment) for segment in re.split(f"({known})", text) if segment)


def _answer(form: CallForm) -> str:
    if form.format.kind != "harmony":
        return ""
    return f'{_text(form, "<|channel|>")} "final" {_text(form, "<|message|>")} '


def _call(form: CallForm, name: str, arguments: str) -> str:
    if form.format.kind in ("markup", "literals"):
        name_start, name_end, *_, call_end = (_tags(form, text) for text in form.format.markup)
        return f"{name_start} {json.dumps(name)} {name_end} {arguments} {call_end}"
    if form.format.kind == "named":
        *id_start, args_start = (_text(form, text) for text in form.format.markup)
        id = " ".join(f"{text} {_ID}" for text in id_start)
        return f"{json.dumps(name)} {id} {args_start} {arguments}"
    if form.format.kind != "harmony":
        head = f'{{"name": "{name}", "arguments": '
        call_end = "}"
        return f"{json.dumps(head)} {arguments} {json.dumps(call_end)}"
    channel, constrain, message = (
        _text(form, f"<|{token}|>") for token in ("channel", "constrain", "message")
    )
    order = f'(" "? {channel} "commentary")? (" "? {constrain} "json" | " json")? " "?'
    return f'".{name}" {order} {message} {arguments}'


def _text(form: CallForm, text: str) -> str:
    token = form.control_tokens.get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"
