"""Answers whose parts come one after the other: thinking, text, calls of tools."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from mixchat.face.events import COMPLETE, End, Piece
from mixchat.serving.requests.fields import JSON
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web.responses import ResponseBuilder

if TYPE_CHECKING:
    from mixchat.face.model import Model

Change: TypeAlias = Literal["open", "add", "close"]
Kind: TypeAlias = Literal["thinking", "text", "call"]


@dataclass
class AnswerBlock:
    """A part of an answer. `content` is its text so far, a call's arguments for one.

    is_cut_off: if the answer's limit ended it.
    """

    index: int
    kind: Kind
    content: str = ""
    id: str = ""  # of a call, as is its name
    name: str = ""
    is_cut_off: bool = False


class BlockResponses(ResponseBuilder):
    """The answers of an API that sends blocks."""

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        self.blocks: list[AnswerBlock] = []
        self._open: AnswerBlock | None = None

    @abstractmethod
    def whole_answer(self, end: End) -> JSON:
        """Return the body of an answer with all `blocks`."""

    @abstractmethod
    def events(self, change: Change, block: AnswerBlock, content: str) -> Iterator[bytes]:
        """Yield the events of a block that is opened, gets a piece of content, or is closed."""

    @abstractmethod
    def last(self, end: End) -> bytes:
        """Return the end of an answer with all `blocks`."""

    def whole(self, answers: Sequence[tuple[Piece, End]]) -> JSON:
        ((piece, end),) = answers
        self.piece(0, piece)
        self._finish(end)
        return self.whole_answer(end)

    def piece(self, number: int, piece: Piece) -> bytes:
        events = list[bytes]()
        texts: dict[Kind, str] = {"thinking": piece.thinking, "text": piece.text}
        for kind, content in texts.items():
            if content and (self._open is None or self._open.kind != kind):
                events += self._begin(AnswerBlock(len(self.blocks), kind))
            events += self._extend(content)
        for call in piece.calls:
            if call.id:
                block = AnswerBlock(len(self.blocks), "call", id=call.id, name=call.name)
                events += self._begin(block)
            events += self._extend(call.arguments)
        return b"".join(events)

    def ending(self, number: int, end: End) -> bytes:
        return self._finish(end) + self.last(end)

    def _finish(self, end: End) -> bytes:
        if self._open is not None:
            self._open.is_cut_off = end.reason not in COMPLETE
        return b"".join(self._close())

    def _begin(self, block: AnswerBlock) -> Iterator[bytes]:
        yield from self._close()
        self.blocks.append(block)
        self._open = block
        yield from self.events("open", block, "")

    def _extend(self, content: str) -> Iterator[bytes]:
        if content and self._open is not None:
            self._open.content += content
            yield from self.events("add", self._open, content)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            yield from self.events("close", self._open, "")
            self._open = None
