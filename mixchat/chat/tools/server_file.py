"""Reads the file of MCP servers, in the form that Claude, Cursor and LM Studio use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError, UsageError, short_repr
from mixchat.base.files import read_json_object

_MAX_BYTES = 10**6
_MAX_SERVERS = 32
_NAME = re.compile(r"[\w .@/-]{1,64}")
_HINT = 'Write {"mcpServers": {"time": {"command": "mcp-server-time", "args": []}}}.'


@dataclass(frozen=True)
class ServerEntry:
    """A server of the file: a command that is started, or a URL. `is_sse` is the older HTTP."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_sse: bool = False


def read_servers(path: Path) -> list[ServerEntry]:
    """Return the servers of a file that are not disabled. Raises `UsageError`."""
    try:
        raw = read_json_object(path, max_bytes=_MAX_BYTES)
    except CheckpointError as error:
        raise UsageError(str(error), hint=_HINT) from None
    servers = raw.get("mcpServers")
    if not isinstance(servers, dict) or not servers:
        raise UsageError(f"{path} has no object mcpServers", hint=_HINT)
    if len(servers) > _MAX_SERVERS:
        raise UsageError(f"{path} names {len(servers)} servers, more than {_MAX_SERVERS}")
    return [
        _entry(f"{path}: {short_repr(name)}", name, each)
        for name, each in servers.items()
        if not (isinstance(each, dict) and each.get("disabled") is True)
    ]


def _entry(place: str, name: str, raw: Any) -> ServerEntry:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{place} cannot be the name of a server")
    if not isinstance(raw, dict):
        raise UsageError(f"{place} has to be an object", hint=_HINT)
    command = _text(place, raw, "command")
    url = _text(place, raw, "url")
    if bool(command) == bool(url):
        raise UsageError(f"{place} needs either a command or a url", hint=_HINT)
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"{place}: the url has to begin with http:// or https://")
    args = raw.get("args", [])
    if not isinstance(args, list) or not all(isinstance(each, str) for each in args):
        raise UsageError(f"{place}: args has to be a list of texts")
    cwd = _text(place, raw, "cwd")
    return ServerEntry(
        name,
        os.path.expanduser(command),
        tuple(args),
        _texts(place, raw, "env"),
        os.path.expanduser(cwd) if cwd else None,
        url,
        _texts(place, raw, "headers"),
        raw.get("type") == "sse",
    )


def _text(place: str, raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"{place}: {key} has to be a text")
    return value


def _texts(place: str, raw: Mapping[str, Any], key: str) -> dict[str, str]:
    value = raw.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise UsageError(f"{place}: {key} has to be an object of texts")
    return value
