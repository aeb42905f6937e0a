"""Calls of tools, taken apart from an answer while it is generated."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixchat.text.literals import LiteralEnd, checked_json, json_of
from mixchat.text.thinking import AnswerText, ThinkingFormat, ThinkingParser, parser_of, pending
from mixchat.text.tool_call import CallDelta, Tool, new_call_id
from mixchat.text.tool_formats import ToolFormat

if TYPE_CHECKING:
    from mixchat.text.tokenizer import Tokenizer

# Matches the text before the arguments of a call, as in `call_grammar`.
_HEAD = r'\{"name": "([\w.-]+)", "arguments": (?=\{)'
_FIRST = re.compile(rf"[ \n]{{0,2}}\[?{_HEAD}")
_NEXT = re.compile(_HEAD)
_MAX_HEAD, _MAX_TAG = 300, 32  # characters


def answer_parser(
    thinking: ThinkingFormat | None,
    tools: ToolFormat | None,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    begun: Sequence[int] = (),
    offered: Sequence[Tool] = (),
) -> ThinkingParser:
    """Return the parser of an answer, in which calls of `offered` tools have the form `tools`.

    `prompt_ids` and `begun` are as in `parser_of`.
    """
    is_harmony = tools is not None and tools.kind == "harmony"
    parser = parser_of(thinking, tokenizer, prompt_ids, begun, harmony_calls=is_harmony)
    if tools is None or is_harmony:
        return parser
    if tools.kind == "markup":
        return _MarkupParser(parser, tools, tokenizer, offered)
    if tools.kind == "literals":
        return _LiteralsParser(parser, tools, tokenizer, offered)
    if tools.kind == "named":
        return _NamedParser(parser, tools, tokenizer, offered)
    return _CallParser(parser, tools.opening, tokenizer)


class _CallParser(ThinkingParser):
    """Finds calls in the answer that another parser takes apart from the thinking.

    The white space before the first call is dropped, and all text after it that is no call. If what
    follows the opening is no call, both are text.
    """

    def __init__(self, inner: ThinkingParser, opening: str, tokenizer: Tokenizer) -> None:
        known = tokenizer.control_tokens
        super().__init__({**inner.marks, **({known[opening]: opening} if opening in known else {})})
        self._inner = inner
        self._opening = opening
        self._blanks = ""
        self.start = inner.start
        self._first = _FIRST
        self._next = _NEXT
        self._object: _ObjectEnd | None = None  # the end of the arguments that are coming

    def add(self, text: str) -> AnswerText:
        return self._found(self._inner.add(text))

    def ends_at(self, name: str) -> bool:
        return name != self._opening and self._inner.ends_at(name)

    def mark(self, name: str) -> AnswerText:
        may_open = self.may_call and not self.opens_call  # else its text came before
        if name == self._opening and may_open and self._inner.begin_answer():
            return AnswerText(self._open(len(self._held), 0))
        return self._found(self._inner.mark(name))

    def flush(self) -> AnswerText:
        last = self._found(self._inner.flush())
        text = "" if self.calls else self._without_call() if self.opens_call else self._held
        self._held = ""
        return last + AnswerText(text)

    def _found(self, new: AnswerText) -> AnswerText:
        self.start = self._inner.start
        self._held += new.text
        text = "" if self.opens_call else self._before()
        calls: list[CallDelta] = []
        while self.opens_call and self.may_call and (more := self._call()):
            calls += more
        if self.opens_call and not self.calls:
            self.may_call = self.may_call and len(self._held) <= _MAX_HEAD
            text += "" if self.may_call else self._without_call()
        return AnswerText(text, new.thinking, tuple(calls))

    def _before(self) -> str:
        """Return the text before the opening of a call, as far as it is certain."""
        if not self.may_call:
            return self._take(len(self._held))
        start = self._held.find(self._opening)
        if start < 0:
            return self._take(len(self._held) - pending(self._held, self._opening))
        return self._open(start, len(self._opening))

    def _open(self, start: int, size: int) -> str:
        """Begin a call at an opening of this size. Return the text before it."""
        text_before = self._take(start)
        self._take(size)
        self.opens_call = True
        text = text_before.rstrip()
        self._blanks = text_before[len(text) :]
        return text

    def _call(self) -> list[CallDelta]:
        """Return the next pieces of calls, none if more text is needed."""
        if self._object is not None:
            size = self._object.take(self._held)
            if self._object.is_over:
                self._object = None
            return [CallDelta(self.calls - 1, self._take(size))] if size else []
        head = self._next.search(self._held) if self.calls else self._first.match(self._held)
        self._object = None if head is None else _ObjectEnd()
        return self._begin(head)

    def _begin(self, head: re.Match[str] | None) -> list[CallDelta]:
        """Return the name of the next call, if its head has come."""
        if head is None:
            return []
        self._take(head.end())
        self.calls += 1
        id = head.groupdict().get("id") or new_call_id()
        return [CallDelta(self.calls - 1, id=id, name=head[1])]

    def _without_call(self) -> str:
        self.opens_call = False
        return self._blanks + self._opening + self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken = self._held[:count]
        self._held = self._held[count:]
        return taken


class _TaggedParser(_CallParser, ABC):
    """Finds calls that have control tokens besides the opening of the first call."""

    def __init__(
        self,
        inner: ThinkingParser,
        format: ToolFormat,
        tokenizer: Tokenizer,
        offered: Sequence[Tool],
    ) -> None:
        super().__init__(inner, format.opening, tokenizer)
        known = tokenizer.control_tokens
        self._tags = [name for name in format.marks if name in known]
        self.marks = {**self.marks, **{known[name]: name for name in self._tags}}
        self._tools = {tool.name: tool for tool in offered}
        self._name = ""
        self._count = 0
        self._came = ""
        self._read_format(format)

    @abstractmethod
    def _read_format(self, format: ToolFormat) -> None:
        """Compile the regular expressions for this form of calls."""

    def add(self, text: str) -> AnswerText:
        self._came = (self._came + text)[-_MAX_TAG:]
        return super().add(text)

    def ends_at(self, name: str) -> bool:
        return name not in self._tags and super().ends_at(name)

    def mark(self, name: str) -> AnswerText:
        """Take a mark. A tag in a call counts as text, unless its text has come already."""
        came = self._came.endswith(name)
        self._came = ""
        if self.opens_call and name in self._tags and not came:
            return self._found(AnswerText(name))
        return super().mark(name)

    def _begin(self, head: re.Match[str] | None) -> list[CallDelta]:
        self._name = "" if head is None else head[1]
        self._count = 0
        return super()._begin(head)

    def _takes_text(self, argument: str) -> bool:
        """Return whether the called tool takes only a text there."""
        tool = self._tools.get(self._name)
        return tool is not None and tool.takes_text(argument)

    def _argument_of(self, name: str, value: str) -> list[CallDelta]:
        """Return an argument, whose value is JSON."""
        self._count += 1
        separator = "{" if self._count == 1 else ", "
        return [CallDelta(self.calls - 1, f"{separator}{json.dumps(name)}: {value}")]

    def _end_call(self, size: int) -> list[CallDelta]:
        self._take(size)
        self._name = ""
        return [CallDelta(self.calls - 1, "}" if self._count else "{}")]


class _NamedParser(_TaggedParser):
    """Finds calls whose arguments are JSON after a name. A call keeps the id that a model wrote."""

    def _read_format(self, format: ToolFormat) -> None:
        *id_start, args_start = map(re.escape, format.markup)
        id = "".join(rf"(?:{text}\s*(?P<id>[a-zA-Z0-9]{{9}})\s*)?" for text in id_start)
        head = rf"\s*([\w.-]+)\s*{id}{args_start}\s*(?=\{{)"
        self._first = re.compile(head)
        self._next = re.compile(re.escape(format.opening) + head)


class _MarkupParser(_TaggedParser):
    """Finds calls with a tag around each argument, which comes as soon as it is complete."""

    def _read_format(self, format: ToolFormat) -> None:
        name_start, name_end, key, value, end, last = map(re.escape, format.markup)
        last = rf"[ \n]{{0,2}}{last or re.escape(format.closing)}"
        # A name that no text follows ends at the next argument or at the end of the call.
        name_end = name_end or rf"(?=[ \n]{{0,2}}{key}|{last})"
        head = rf"[ \n]{{0,2}}{name_start}([\w.-]+){name_end}"
        self._first = re.compile(head)
        self._next = re.compile(re.escape(format.opening) + head)
        self._end = format.markup[4]
        # This is tried only once the end has come. If it was tried for each token, a page of HTML
        # took cubic time.
        self._argument = re.compile(
            rf"[ \n]{{0,2}}{key}((?:(?!{value}).)*){value}(.*?){end}", re.DOTALL
        )
        self._last = re.compile(last)

    def _call(self) -> list[CallDelta]:
        if not self._name:
            return self._begin(
                self._next.search(self._held) if self.calls else self._first.match(self._held)
            )
        # The end is searched first, because this runs for each token of a long argument.
        if self._end in self._held and (match := self._argument.match(self._held)):
            self._take(match.end())
            name, text = match.groups()
            value = None if self._takes_text(name) else checked_json(text)
            return self._argument_of(name, value or json.dumps(text))  # what is no JSON is a text
        match = self._last.match(self._held)
        return [] if match is None else self._end_call(match.end())


class _LiteralsParser(_TaggedParser):
    """Finds calls whose arguments are literals. An argument comes as soon as it is complete.

    If a system text asks for it, LFM2 writes its list in JSON. That is read, too.
    """

    def _read_format(self, format: ToolFormat) -> None:
        name_start, name_end, _, equals, _, end = map(re.escape, format.markup)
        before = r"\s*\["
        between = r"\s*,"
        if not format.in_list:
            before = ""
            between = rf"\s*{re.escape(format.closing)}\s*{re.escape(format.opening)}"
        head = rf"\s*{name_start}\s*([\w.-]+)\s*{name_end}"
        self._first = re.compile(before + head)
        self._next = re.compile(between + head)
        self._key = re.compile(rf"\s*(?:,\s*)?([^\s:=,(){{}}]+)\s*{equals}\s*")
        self._last = re.compile(rf"\s*(?:,\s*)?{end}")
        self._quote = format.quote
        self._argument = ""
        self._may_be_json = format.in_list
        self._is_json = False
        self._literal = LiteralEnd(format.quote)

    def _call(self) -> list[CallDelta]:
        if self._may_be_json and not self.calls and _FIRST.match(self._held):
            self._is_json = True
            self._first = _FIRST
            self._next = _NEXT
        if self._is_json:
            return super()._call()
        if not self._name:
            return self._begin((self._next if self.calls else self._first).match(self._held))
        if not self._argument:
            if match := self._last.match(self._held):
                return self._end_call(match.end())
            match = self._key.match(self._held)
            if match is None:
                return []
            self._take(match.end())
            self._argument = match[1]
            self._literal = LiteralEnd(self._quote)
        size = self._literal.find(self._held)
        if size is None:
            return []
        name = self._argument
        self._argument = ""
        text = self._take(size).strip()
        value = json_of(text, self._quote)
        is_other = self._takes_text(name) and not value.startswith('"')
        return self._argument_of(name, json.dumps(text) if is_other else value)


class _ObjectEnd:
    """Finds the end of a JSON object in its text."""

    def __init__(self) -> None:
        self.is_over = self._in_string = self._is_escaped = False
        self._depth = 0

    def take(self, text: str) -> int:
        """Return how many characters of the next text belong to the object."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string and character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0 and character in "}]":
                    self.is_over = True
                    return index + 1
        return len(text)
