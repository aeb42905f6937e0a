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


class Blocks:
    """Divides the pieces of an answer into blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def add(self, delta: Delta) -> Iterator[tuple[Change, Block, str]]:
        """Yield what changes: a block is opened, gets a piece of content, or is closed."""
        texts: dict[Kind, str] = {"thinking": delta.thinking, "text": delta.text}
        for kind, content in texts.items():
            if content:
                if self._open is None or self._open.kind != kind:
                    yield from self._begin(Block(len(self.blocks), kind))
                yield self._extend(content)
        for call in delta.calls:
            if call.id:
                yield from self._begin(Block(len(self.blocks), "call", id=call.id, name=call.name))
            if call.arguments:
                yield self._extend(call.arguments)

    def end(self) -> Iterator[tuple[Change, Block, str]]:
        if self._open is not None:
            yield "close", self._open, ""
            self._open = None

    def _begin(self, block: Block) -> Iterator[tuple[Change, Block, str]]:
        yield from self.end()
        self.blocks.append(block)
        self._open = block
        yield "open", block, ""

    def _extend(self, content: str) -> tuple[Change, Block, str]:
        assert self._open is not None
        self._open.content += content
        return "add", self._open, content


class BlockResponses(ResponseBuilder):
    """The answers of an API that sends blocks."""

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._blocks = Blocks()

    @abstractmethod
    def whole_answer(self, blocks: Sequence[Block], done: Done) -> JSON: ...

    @abstractmethod
    def events(self, change: Change, block: Block, piece: str) -> Iterator[bytes]: ...

    @abstractmethod
    def last(self, done: Done) -> bytes: ...

    def whole(self, answers: Sequence[tuple[Delta, Done]]) -> JSON:
        ((delta, done),) = answers
        for _ in (*self._blocks.add(delta), *self._blocks.end()):
            pass
        return self.whole_answer(self._blocks.blocks, done)

    def piece(self, number: int, delta: Delta) -> bytes:
        return self._joined(self._blocks.add(delta))

    def ending(self, number: int, done: Done) -> bytes:
        return self._joined(self._blocks.end()) + self.last(done)

    def _joined(self, changes: Iterator[tuple[Change, Block, str]]) -> bytes:
        return b"".join(event for change in changes for event in self.events(*change))
