"""The tools of a chat: asks before one runs, and bounds its result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mixchat.face.tool_results import MAX_RESULT, ToolError, arguments_of, bounded_result
from mixchat.text.tool_call import Tool, ToolCall

Permission = Literal["once", "always", "no"]
_REFUSED = "the user does not allow this call."


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

    def run(self, call: ToolCall, most: int = MAX_RESULT) -> str:
        """Return the result of a call, at most `most` characters of it, or the error."""
        try:
            text = self._run(call)
        except ToolError as error:
            text = f"Error: {error}"
        return bounded_result(text, most)

    def _run(self, call: ToolCall) -> str:
        if all(call.name != tool.name for tool in self.tools):
            raise ToolError(f"there is no tool {call.name}.")
        arguments = arguments_of(call)
        if not self._is_allowed(call.name):
            self.refused.add(call.name)
            raise ToolError(_REFUSED)
        return self.servers.call(call.name, arguments)

    def _is_allowed(self, name: str) -> bool:
        if name in self.allowed:
            return True
        permission = self.confirm(name)
        if permission == "always":
            self.allowed.add(name)
        return permission != "no"
