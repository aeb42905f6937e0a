"""The forms in which models call tools, and one for models that learned none.

- tags: `<tool_call>`, a call as JSON, `</tool_call>`, once for each call
- list: an opening token, then a JSON list of calls
- named: `[TOOL_CALLS]NAME[ARGS]` and the arguments as JSON, once for each call
- harmony: a message to `functions.NAME`, whose text is the arguments
- markup: as tags, but with a tag around each argument, whose text may stand there without quotes
- literals: `NAME(ARGUMENT=VALUE, ...)`, whose values are literals
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mixchat.text.literals import GEMMA, PYTHON, literal_of
from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool, ToolCall

_RESULT = "<tool_response>\n{}\n</tool_response>"
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_INTRODUCTION = """\
You can call functions. Each line here is a function, with a JSON schema of its arguments:
{}

To call a function, write its name and its arguments as JSON between two tags:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
The next message brings the result between the tags <tool_response> and </tool_response>."""


@dataclass(frozen=True)
class ToolFormat:
    """A form of calls. `opening` begins the first call, and no other text of an answer.

    With `short_ids` the template takes only ids of 9 letters and digits. `markup` has the texts
    before and after a name, before and after an argument's name, after its value, and at the end.
    For literals, the text after a value stands only between two values, and `quote` is as in
    literals.py. With `in_list`, the calls are a list between two tokens. For named calls, `markup`
    has the texts before the id, if there is one, and before the arguments.
    """

    name: str
    kind: Literal["tags", "list", "named", "harmony", "markup", "literals"]
    opening: str
    closing: str = ""
    short_ids: bool = False
    markup: Sequence[str] = ()
    quote: str = ""
    in_list: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the texts that may be control tokens."""
        quotes = (GEMMA,) if self.quote == GEMMA else ()
        return (self.opening, self.closing, *quotes, *_TAG.findall("".join(self.markup)))

    def text_of(self, calls: Iterable[ToolCall]) -> str:
        """Return calls as a model writes them after the opening of the first one."""
        texts = [self._text_of_call(call) for call in calls]
        if self.in_list or self.kind == "list":
            return f"[{', '.join(texts)}]{self.closing}"
        if self.kind == "named":
            return self.opening.join(texts)
        blank = "" if self.quote else "\n"
        between = f"{blank}{self.closing}{blank}{self.opening}{blank}"
        return f"{blank}{between.join(texts)}{blank}{self.closing}"

    def _text_of_call(self, call: ToolCall) -> str:
        if self.kind == "named":
            *id_start, args_start = self.markup
            id = "".join(f"{text}{call.id}" for text in id_start)
            return f"{call.name}{id}{args_start}{call.arguments}"
        if not self.quote:
            return f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}'
        name_start, name_end, _, equals, comma, end = self.markup
        arguments = (
            f"{name}{equals}{literal_of(value, self.quote)}"
            for name, value in json.loads(call.arguments).items()
        )
        return f"{name_start}{call.name}{name_end}{comma.join(arguments)}{end}"

    def with_its_ids(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the conversation with ids of calls that the template takes."""
        if not self.short_ids:
            return messages
        return [
            replace(
                message,
                call_id=_shortened(message.call_id),
                calls=tuple(replace(call, id=_shortened(call.id)) for call in message.calls),
            )
            for message in messages
        ]


_TAG = re.compile(r"</?\w+>|\[\w+\]")
PLAIN = ToolFormat("tags", "tags", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "list", "[TOOL_CALLS]", short_ids=True)
_MISTRAL_IDS = ToolFormat(  # of V11
    "mistral-ids", "named", "[TOOL_CALLS]", short_ids=True, markup=("[CALL_ID]", "[ARGS]")
)
_MISTRAL_ARGS = ToolFormat(  # since V13
    "mistral-args", "named", "[TOOL_CALLS]", short_ids=True, markup=("[ARGS]",)
)
_HARMONY = ToolFormat("harmony", "harmony", "to=functions")
_GRANITE = ToolFormat("granite", "list", "<|tool_call|>")
_GRANITE_TEXT = ToolFormat("granite-text", "list", "<tool_call>")  # of version 3.1
_QWEN_CODER = ToolFormat("qwen-coder", "markup", "<tool_call>", "</tool_call>", markup=(
    "<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>"
))  # fmt: skip
_GLM = ToolFormat("glm", "markup", "<tool_call>", "</tool_call>", markup=(
    "", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", ""
))  # fmt: skip
_GLM_INLINE = ToolFormat("glm-inline", "markup", "<tool_call>", "</tool_call>", markup=(
    "", "", "<arg_key>", "</arg_key><arg_value>", "</arg_value>", ""  # since version 4.7
))  # fmt: skip
_GEMMA = ToolFormat("gemma", "literals", "<|tool_call>", "<tool_call|>", markup=(
    "call:", "{", "", ":", ",", "}"
), quote=GEMMA)  # fmt: skip
_LFM = ToolFormat("lfm", "literals", "<|tool_call_start|>", "<|tool_call_end|>", markup=(
    "", "(", "", "=", ", ", ")"
), quote=PYTHON, in_list=True)  # fmt: skip
_ALL = (
    *(_HARMONY, _MISTRAL_IDS, _MISTRAL_ARGS, MISTRAL, _GRANITE, _GEMMA, _LFM),
    *(_QWEN_CODER, _GLM_INLINE, _GLM, PLAIN, _GRANITE_TEXT),
)
FORMATS = {each.name: each for each in _ALL}
_LFM_TOOLS = "List of tools: "  # its templates have no token of a call
_NAME = re.compile(r'\\?"name\\?": ')
# Matches the place at which a template begins the list of calls, or writes it at once.
_MISTRAL_LIST = re.compile(r"\[TOOL_CALLS\](\s*\[|\W+([\w.]+\W+)?tool_calls)")


def tool_format_of(
    source: str, variables: Collection[str], control_tokens: Collection[str] = ()
) -> ToolFormat | None:
    """Return the form of calls of a chat template, which knows these variables and tokens.

    Returns None if the template knows no tools, or only calls of another form.
    """
    if "tools" not in variables:
        return None
    if "<|channel|>" in source:
        return _HARMONY if "functions." in source else None
    if _LFM_TOOLS in source and _LFM.opening in control_tokens:
        return _LFM
    for format in _ALL[1:]:
        sign = {PLAIN: _NAME, MISTRAL: _MISTRAL_LIST}.get(format)
        key_end = format.markup[3:4] if format is _GLM_INLINE else ()
        marks = format.markup if format.kind == "named" else (*format.markup[2:3], *key_end)
        texts = (format.opening, format.closing, *marks)
        if all(text in source for text in texts) and (sign is None or sign.search(source)):
            return None if format is _GRANITE_TEXT and PLAIN.closing in source else format
    return None


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with one call in an answer, each with its result after it.

    An answer with both has its thinking, but no text.
    """
    # Harmony's template shows only the first call of an answer, and takes all results for results
    # of that call.
    parted: list[Message] = []
    waiting: list[ToolCall] = []
    for message in messages:
        if message.role == "tool":
            call = next((call for call in waiting if call.id == message.call_id), None)
            if call is not None and parted[-1].role == "tool":
                parted.append(Message("assistant", "", calls=(call,)))
            elif call is not None:
                parted[-1] = replace(parted[-1], calls=(call,))
        if message.calls:
            waiting = list(message.calls)
            content = "" if message.thinking else message.content
            message = replace(message, content=content, calls=message.calls[:1])
        parted.append(message)
    return parted


def in_plain_text(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Message]:
    """Return the conversation for a template that knows no tools.

    The system text describes the tools. A call is text, and a result is part of a question.
    """
    plain, texts = list[Message](), list[list[str]]()  # texts: the parts of each plain message
    for message in messages:
        if message.role == "tool":
            message = Message("user", _RESULT.format(message.content))
        if message.calls:
            calls = f"{PLAIN.opening}{PLAIN.text_of(message.calls)}"
            message = Message("assistant", f"{message.content}{calls}")
        if plain and plain[-1].role == message.role == "user":
            texts[-1].append(message.content)
        else:
            plain.append(message)
            texts.append([message.content])
    plain = [
        message if len(parts) == 1 else Message(message.role, "\n".join(parts))
        for message, parts in zip(plain, texts, strict=True)
    ]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool.to_json()["function"], ensure_ascii=False) for tool in tools)
    system = _INTRODUCTION.format(lines)
    if plain and plain[0].role == "system":
        system = f"{plain.pop(0).content}\n\n{system}"
    return [Message("system", system), *plain]


def _shortened(id: str) -> str:
    """Return an id of 9 letters and digits, the same one for the same id."""
    is_short = not id or _SHORT_ID.fullmatch(id)
    return id if is_short else hashlib.sha256(id.encode()).hexdigest()[:9]
