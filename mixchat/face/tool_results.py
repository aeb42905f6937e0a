"""The calls of tools as functions and servers get them, and results as a model reads them."""

from __future__ import annotations

import json
from typing import Any

from mixchat.base.sanitize import sanitize
from mixchat.text.tool_call import ToolCall

MAX_ROUNDS = 10  # answers with calls to one question
STOPPED = "Error: the user stopped this call."
MAX_RESULT = 20_000  # characters


class ToolError(Exception):
    """A tool gave no result. The message is for the model."""


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call by name. Raises `ToolError`."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ToolError("the arguments are no JSON object.")
    return arguments


def bounded_result(text: str, most: int) -> str:
    """Return at most `most` characters of a result, and never more than 20,000."""
    text = sanitize(text)
    most = min(most, MAX_RESULT)
    if len(text) <= most:
        return text
    return f"{text[:most]}\n(cut off: {len(text) - most:,} more characters)"
