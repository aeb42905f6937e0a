"""A model's thinking, taken apart from its answer while both are generated.

- tags: `<think>`, the thinking, `</think>`, the answer. A prompt may end with the first tag.
- channel: as tags, but with Gemma's `<|channel>thought` and `<channel|>`
- brackets: as tags, but with Mistral's `[THINK]` and `[/THINK]`
- harmony: messages in channels. `final` is the answer, all others are thinking.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mixchat.text.messages import PRESERVES
from mixchat.text.tokenizer import TokenTexts
from mixchat.text.tool_call import CallDelta, new_call_id

if TYPE_CHECKING:
    from mixchat.text.tokenizer import Tokenizer

# By the name of a format: the control token that opens the thinking, the text after it, the control
# token that closes the thinking, and the white space before the answer.
_TAGS = {
    "tags": ("<think>", "", "</think>", "\n\n"),
    "channel": ("<|channel>", "thought", "<channel|>", ""),
    "brackets": ("[THINK]", "", "[/THINK]", ""),
}
_CHANNEL = "<|channel|>"
_MESSAGE = "<|message|>"
_FINAL = "final"
_TO_FUNCTION = "to=functions"
_FUNCTION = re.compile(r"to=functions\.([\w.-]+)")
_TO_ANSWER = f"{_CHANNEL}{_FINAL}{_MESSAGE}"
_CONSTRAIN = "<|constrain|>"  # between two words of a header
# Marks that lead from a message to the next one, or into its header.
_HARMONY = (_CONSTRAIN, _CHANNEL, _MESSAGE, "<|start|>", "<|end|>", "<|return|>", "<|call|>")
# Stands for a mark between characters. No decoded text has half a surrogate pair.
_MARK_CHAR = re.compile("[\ud800-\udfff]")
_TAIL = 16  # tokens at a prompt's end that hold a tag and the newlines after it
# Variables of templates.
SWITCHES = ("enable_thinking", "thinking")  # true or false
EFFORT = "reasoning_effort"
EFFORTS = ("minimal", "low", "medium", "high")


@dataclass(frozen=True)
class AnswerText:
    """The text that a token adds to an answer, the thinking before it, and the calls after it."""

    text: str = ""
    thinking: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __add__(self, later: AnswerText) -> AnswerText:
        text = self.text + later.text
        thinking = self.thinking + later.thinking
        return AnswerText(text, thinking, self.calls + later.calls)


@dataclass(frozen=True)
class ThinkingFormat:
    """The form in which a model thinks, and the variables of its template that control it."""

    kind: Literal["tags", "channel", "brackets", "harmony"]
    variables: tuple[str, ...] = ()

    @property
    def switch(self) -> str | None:
        """Return the variable that turns thinking on and off, None if the template has none."""
        return next((name for name in SWITCHES if name in self.variables), None)

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """Return the control tokens that end an answer. In harmony `<|end|>` ends a message."""
        return _HARMONY[-2:] if self.kind == "harmony" else ()

    def to_answer(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
        """Return the ids that lead from a prompt to an answer without thinking."""
        if self.kind == "harmony":
            return tokenizer.encode_template(_TO_ANSWER)
        tag, name, close, space = _TAGS[self.kind]
        is_open = _ends_open(tokenizer, prompt_ids, tag + name)
        return tokenizer.encode_template(close + space) if is_open else []


def format_of(source: str, variables: Collection[str]) -> ThinkingFormat | None:
    """Return the format of a chat template, which knows these variables. None without one."""
    known = tuple(name for name in (*SWITCHES, PRESERVES, EFFORT) if name in variables)
    if _CHANNEL in source and _MESSAGE in source:
        return ThinkingFormat("harmony", known)
    opening, name, closing, _ = _TAGS["channel"]
    if opening + name in source and closing in source:
        return ThinkingFormat("channel", known)
    if _TAGS["brackets"][0] in source:
        return ThinkingFormat("brackets", known)
    opening, _, closing, _ = _TAGS["tags"]
    return ThinkingFormat("tags", known) if opening in source or closing in source else None


class ThinkingParser(ABC):
    """Takes the text of an answer, and the marks in it.

    A place in an answer counts its characters, and each mark as one. `start` is the place at which
    the answer begins, None while the thinking lasts. `marks` are names by token id. `opens_call` is
    set if a call of a tool begins, and `calls` counts the calls with a name. Without `may_call` no
    call is found.
    """

    def __init__(self, marks: Mapping[int, str] | None = None) -> None:
        self.marks = marks or {}
        self.start: int | None = None
        self.opens_call = False
        self.may_call = True
        self.calls = 0
        self._place = 0
        self._held = ""

    @abstractmethod
    def add(self, text: str) -> AnswerText:
        """Take the next text. Return the text that is certain."""

    def flush(self) -> AnswerText:
        """Return the text that was held back, at the end of the answer."""
        return AnswerText()

    def mark(self, name: str) -> AnswerText:
        """Handle a control token. Return the separator between two messages' thinking."""
        return AnswerText()

    def ends_at(self, name: str) -> bool:
        """Return whether a mark ends the answer."""
        return self.start is not None

    def begin_answer(self) -> bool:
        """Begin the answer here, unless a thinking is open. Return whether it has begun."""
        return self.start is not None

    def replay(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        """Take the text of an answer that is continued. Places are counted after it."""
        run: list[int] = []
        for token in ids:
            if token in self.marks:
                self.add(tokenizer.decode(run))
                self.mark(self.marks[token])
                run = []
            else:
                run.append(token)
        self.add(tokenizer.decode(run))
        self._place = -len(self._held)
        if self.start is not None:
            self.start = 0


def parser_of(
    format: ThinkingFormat | None,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    begun: Sequence[int] = (),
    *,
    harmony_calls: bool = False,
) -> ThinkingParser:
    """Return the parser of the answer to a prompt that a template has made.

    The ids `begun` follow the prompt, and are the beginning of the answer. Without a format all
    text is the answer. With `harmony_calls` the messages to functions are calls.
    """
    parser: ThinkingParser = _NoThinking()
    if format is None:
        return parser
    if format.kind == "harmony":
        known = tokenizer.control_tokens
        marks = {known[name]: name for name in _HARMONY if name in known}
        parser = _HarmonyParser(marks, finds_calls=harmony_calls)
    else:
        opening, name, closing, _ = _TAGS[format.kind]
        tags = _unseen(tokenizer, opening, closing)
        is_open = _ends_open(tokenizer, prompt_ids, opening + name)
        parser = _TagParser(opening, name, closing, tags, is_open=is_open)
    if begun:
        parser.replay(tokenizer, begun)
    return parser


def _ends_open(tokenizer: Tokenizer, prompt_ids: Sequence[int], opening: str) -> bool:
    texts = TokenTexts(tokenizer)
    end = b"".join(map(texts.bytes_of, prompt_ids[-_TAIL:]))
    return end.decode(errors="replace").rstrip().endswith(opening)


def _unseen(tokenizer: Tokenizer, *names: str) -> dict[int, str]:
    """Return the names of the control tokens that a decoded text does not show, by id."""
    known = tokenizer.control_tokens
    shown = tokenizer.token_bytes.names
    ids = {known[name]: name for name in names if name in known}
    return {token: name for token, name in ids.items() if token not in shown}


class _NoThinking(ThinkingParser):
    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def add(self, text: str) -> AnswerText:
        return AnswerText(text)


class _TagParser(ThinkingParser):
    r"""Finds the tags in the text. Only a tag at the answer's beginning opens a thinking.

    White space around the thinking is dropped. With "<think>\nHm" and "\n</think>\n\nA" the parts
    are thinking "Hm", then the text "A", which starts at 22. `name` is the text after the opening
    tag. `marks` are the tags that are tokens without text.
    """

    def __init__(
        self, opening: str, name: str, closing: str, marks: Mapping[int, str], *, is_open: bool
    ) -> None:
        super().__init__(marks)
        self._chars = {tag: chr(0xD800 + n) for n, tag in enumerate(marks.values())}
        self._open = self._chars.get(opening, opening) + name
        self._close = self._chars.get(closing, closing)
        self._state: Literal["before", "thinking", "between", "answer"]
        self._state = "thinking" if is_open else "before"
        self._has_thought = False

    def add(self, text: str) -> AnswerText:
        self._held += text
        if self._state == "before":
            self._begin()
        thinking = self._think() if self._state == "thinking" else ""
        if self._state == "between":
            self._drop_space()
            if self._held:
                self._state = "answer"
                self.start = self._place
        answer = self._take(len(self._held)) if self._state == "answer" else ""
        return AnswerText(_MARK_CHAR.sub("", answer), _MARK_CHAR.sub("", thinking))

    def mark(self, name: str) -> AnswerText:
        return self.add(self._chars.get(name, "\udfff"))

    def ends_at(self, name: str) -> bool:
        return False

    def begin_answer(self) -> bool:
        if self._state == "between" or (self._state == "before" and not self._held.strip()):
            self._drop_space()
            self.start = self._place if self._state == "between" else 0
            self._state = "answer"
        return super().begin_answer()

    def flush(self) -> AnswerText:
        if self._state != "before":
            return AnswerText()  # white space, or the beginning of the closing tag
        self._state = "answer"
        self.start = 0
        return AnswerText(_MARK_CHAR.sub("", self._take(len(self._held))))

    def _begin(self) -> None:
        begins = self._held.lstrip()
        if begins.startswith(self._open):
            self._drop_space()
            self._take(len(self._open))
            self._state = "thinking"
        elif not self._open.startswith(begins):
            self._state = "answer"
            self.start = 0

    def _think(self) -> str:
        if not self._has_thought:
            self._drop_space()
        end = self._held.find(self._close)
        certain = len(self._held) - pending(self._held, self._close) if end < 0 else end
        thinking = self._take(certain)
        if end >= 0:
            thinking = thinking.rstrip()
            self._take(len(self._close))
            self._state = "between"
        self._has_thought = self._has_thought or thinking != ""
        return thinking

    def _take(self, count: int) -> str:
        taken = self._held[:count]
        self._held = self._held[count:]
        self._place += count
        return taken

    def _drop_space(self) -> None:
        self._take(len(self._held) - len(self._held.lstrip()))


def pending(text: str, tag: str) -> int:
    """Return the length of the end that may be the start of a tag, with white space before it."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    begun = next((size for size in sizes if tag.startswith(text[-size:])), 0)
    return len(text) - len(text[: len(text) - begun].rstrip())


class _HarmonyParser(ThinkingParser):
    """Follows the marks of harmony's messages, `<|channel|>NAME<|message|>TEXT<|end|>`.

    The answer is the first message that is in the channel `final` or in none. Text without any
    mark is an answer, too. The text of a message to `functions.NAME` is the arguments of a call.
    """

    def __init__(self, marks: Mapping[int, str], *, finds_calls: bool = False) -> None:
        super().__init__(marks)
        self._header: str | None = ""  # None within a message
        self._has_channel = self._has_marks = self._has_thought = False
        self.may_call = finds_calls
        self._function = ""

    def add(self, text: str) -> AnswerText:
        self._place += len(text)
        if self._header is not None:
            self._header += text
            self.opens_call = self.may_call and (self.opens_call or _TO_FUNCTION in self._header)
            return AnswerText()
        if self.calls:
            return AnswerText(calls=(CallDelta(self.calls - 1, text),) if text else ())
        if self.start is not None:
            return AnswerText(text)
        self._has_thought = self._has_thought or text != ""
        return AnswerText(thinking=text)

    def ends_at(self, name: str) -> bool:
        return name != _CONSTRAIN and super().ends_at(name)

    def mark(self, name: str) -> AnswerText:
        self._place += 1
        self._has_marks = True
        if name == _CONSTRAIN:
            self._header = None if self._header is None else f"{self._header} "
            return AnswerText()
        header = self._header or ""
        self._header = None if name == _MESSAGE else ""
        if self.may_call and (match := _FUNCTION.search(header)):
            self._function = match[1]
        if name != _MESSAGE:
            self._has_channel = name == _CHANNEL
            return AnswerText()
        if self._function:
            self.start = self._place
            self.calls = 1
            return AnswerText(calls=(CallDelta(0, id=new_call_id(), name=self._function),))
        if not self._has_channel or header.split()[:1] in ([], [_FINAL]):
            self.start = self._place
            return AnswerText()
        return AnswerText(thinking="\n\n" if self._has_thought else "")

    def flush(self) -> AnswerText:
        if self._has_marks or self._header is None:
            return AnswerText()
        self.start = 0
        return AnswerText(self._header)
