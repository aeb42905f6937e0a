"""Tools, calls of them, and pieces of calls."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
TOOL_NAME_RULE = "has to be 1 to 128 of the characters a-z A-Z 0-9 _ . -"
_ID_LENGTH, _ID_LETTERS = 9, string.ascii_letters + string.digits  # as Mistral's models want them


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments.

    If `strict`, a schema that cannot be followed in every part is refused.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the schemas of the arguments by their names. A required one may have none."""
        return properties_of(self.parameters or {})

    def takes_text(self, argument: str) -> bool:
        """Return whether an argument is always a string."""
        schema = self.arguments.get(argument)
        return isinstance(schema, dict) and schema.get("type") == "string"

    def to_json(self) -> dict[str, Any]:
        """Return the tool as chat templates know it."""
        optional = {"description": self.description, "parameters": self.parameters}
        known = {name: value for name, value in optional.items() if value is not None}
        return {"type": "function", "function": {"name": self.name, **known}}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """Return the call as chat templates know it."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class CallDelta:
    """The next piece of an answer's call `index`. Only its first piece has an id and a name."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


def new_call_id() -> str:
    """Return a random id of 9 letters and digits."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def call_object(call: ToolCall | CallDelta) -> dict[str, Any]:
    """Return a call as a message of OpenAI's has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def properties_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of an object's properties, {} for a required one without a schema."""
    properties = schema.get("properties")
    required = schema.get("required")
    known = properties if isinstance(properties, dict) else {}
    needed = required if isinstance(required, list) else ()
    names = [name for name in needed if isinstance(name, str)]
    return {**known, **{name: {} for name in names if name not in known}}


def whole_arguments(text: str) -> str:
    """Return the arguments of a call as a JSON object, closed if a limit cut them off.

    `{"path": "a", "text": "Once up` becomes `{"path": "a", "text": "Once up"}`. Raises `ValueError`
    if the text is not the beginning of an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise
        from pydantic_core import from_json

        value = from_json(text or "{}", allow_partial="trailing-strings", allow_inf_nan=False)
        text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return text


def joined_calls(deltas: tuple[CallDelta, ...]) -> tuple[ToolCall, ...]:
    """Return the calls of an answer whose pieces these are."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.get(delta.index, ToolCall(delta.id, delta.name, ""))
        arguments = call.arguments + delta.arguments
        calls[delta.index] = ToolCall(call.id, call.name, arguments)
    return tuple(calls.values())
