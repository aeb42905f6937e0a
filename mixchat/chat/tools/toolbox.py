"""The tools of a chat: asks before one runs, and bounds its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mixchat.base.sanitize import sanitize
from mixchat.text.tool_call import Tool, ToolCall

Permission = Literal["once", "always", "no"]
MAX_ROUNDS = 10  # answers with calls to one question
STOPPED = "Error: the user stopped this call."
_REFUSED = "Error: the user does not allow this call."
_MAX_RESULT = 20_000  # characters


class ToolError(Exception):
    """A tool gave no result. The message is for the model."""


class ToolServers(Protocol):
    """What runs tools, such as `MCPServers`."""

    @property
    def tools(self) -> tuple[Tool, ...]: ...

    def call(self, name: str, arguments: Mapping[str, Any]) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ToolStart:
    """The event that a model called a tool, before anybody was asked."""

    call: ToolCall


@dataclass(frozen=True)
class ToolResult:
    """The event that a call has its result, which may be an error or a refusal."""

    call: ToolCall
    text: str


class Toolbox:
    """The tools of `servers`. Those in `allowed` run without a question.

    `confirm` gets a tool's name, and returns whether it may run.
    """

    def __init__(self, servers: ToolServers, allowed: Collection[str] = ()) -> None:
        self.servers = servers
        self.allowed = set(allowed)
        self.confirm: Callable[[str], Permission] = lambda name: "no"
        self.refused: set[str] = set()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Return the tools that a model may call, which may wait for the servers."""
        return self.servers.tools

    def run(self, call: ToolCall, most: int = _MAX_RESULT) -> str:
        """Return the result of a call, at most `most` characters of it, or the error."""
        if all(call.name != tool.name for tool in self.tools):
            return f"Error: there is no tool {call.name}."
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            return "Error: the arguments are no JSON object."
        if not self._is_allowed(call.name):
            self.refused.add(call.name)
            return _REFUSED
        try:
            text = self.servers.call(call.name, arguments)
        except ToolError as error:
            text = f"Error: {error}"
        return _bounded(text, min(most, _MAX_RESULT))

    def _is_allowed(self, name: str) -> bool:
        if name in self.allowed:
            return True
        permission = self.confirm(name)
        if permission == "always":
            self.allowed.add(name)
        return permission != "no"


def _bounded(text: str, most: int) -> str:
    text = sanitize(text)
    if len(text) <= most:
        return text
    return f"{text[:most]}\n(cut off: {len(text) - most:,} more characters)"
