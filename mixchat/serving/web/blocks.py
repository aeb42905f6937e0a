"""Answers whose parts come one after the other: thinking, text, calls of tools."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mixchat.serving.requests.options import LoadedModel, ParsedRequest
from mixchat.serving.service import Delta, Done
from mixchat.serving.web.responses import JSON, ResponseBuilder

Change: TypeAlias = Literal["open", "add", "close"]
Kind: TypeAlias = Literal["thinking", "text", "call"]


@dataclass
class Block:
    """A part of an answer. `content` is its text so far, a call's arguments for one."""

    index: int
    kind: Kind
    content: str = ""
    id: str = ""  # of a call, as is its name
    name: str = ""


class BlockResponses(ResponseBuilder):
    """The answers of an API that sends blocks."""

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self.blocks: list[Block] = []
        self._open: Block | None = None

    @abstractmethod
    def whole_answer(self, done: Done) -> JSON:
        """Return the body of an answer with all `blocks`."""

    @abstractmethod
    def events(self, change: Change, block: Block, piece: str) -> Iterator[bytes]:
        """Yield the events of a block that is opened, gets a piece of content, or is closed."""

    @abstractmethod
    def last(self, done: Done) -> bytes:
        """Return the end of an answer with all `blocks`."""

    def whole(self, answers: Sequence[tuple[Delta, Done]]) -> JSON:
        ((delta, done),) = answers
        self.piece(0, delta)
        return self.whole_answer(done)

    def piece(self, number: int, delta: Delta) -> bytes:
        return b"".join(self._take(delta))

    def ending(self, number: int, done: Done) -> bytes:
        return b"".join(self._close()) + self.last(done)

    def _take(self, delta: Delta) -> Iterator[bytes]:
        texts: dict[Kind, str] = {"thinking": delta.thinking, "text": delta.text}
        for kind, content in texts.items():
            if content and (self._open is None or self._open.kind != kind):
                yield from self._begin(Block(len(self.blocks), kind))
            yield from self._extend(content)
        for call in delta.calls:
            if call.id:
                yield from self._begin(Block(len(self.blocks), "call", id=call.id, name=call.name))
            yield from self._extend(call.arguments)

    def _begin(self, block: Block) -> Iterator[bytes]:
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
