"""Functions of Python as tools, and types of Python as forms of answers, by pydantic."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, get_origin

from mixchat.base.errors import UsageError, short_message, short_repr
from mixchat.face.tool_results import ToolError
from mixchat.text.tool_call import Tool


class PythonTool:
    """A function that a model may call, with the schema of its signature and its docstring.

    Raises `UsageError` if a parameter has no name or no JSON schema.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", None)
        if not isinstance(name, str):
            raise UsageError(f"a tool needs a name, and {short_repr(function)} has no __name__")

        @wraps(function)
        def collect(*args: Any, **kwargs: Any) -> Any:
            return args, kwargs

        self._function = function
        self._collector, schema = _adapter(collect, f"the signature of {name}")
        if schema.get("type") != "object":
            raise UsageError(f"the model gives arguments by name, so {name} can have no / or *args")
        for parameter in schema["properties"].values():
            parameter.pop("title", None)  # the name again
        self.tool = Tool(name, inspect.getdoc(function), schema)
        self.is_async = inspect.iscoroutinefunction(function)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Return the result as text. Raises `ToolError`, and what the function raises."""
        return _as_text(self._bound(arguments)())

    async def call_async(self, arguments: Mapping[str, Any]) -> str:
        """Return the result as `call` does. A function that is not async runs in a thread."""
        call = self._bound(arguments)
        value = await (call() if self.is_async else asyncio.to_thread(call))
        return _as_text(value)

    def _bound(self, arguments: Mapping[str, Any]) -> Callable[[], Any]:
        """Return the function with its arguments, converted and checked by its signature."""
        from pydantic import ValidationError

        try:
            args, kwargs = self._collector.validate_json(json.dumps(arguments))
        except ValidationError as error:
            faults = [
                ": ".join((".".join(map(str, fault["loc"])), fault["msg"]))
                for fault in error.errors(include_url=False)
            ]
            raise ToolError(f"the arguments do not fit. {'. '.join(faults)}") from None
        return partial(self._function, *args, **kwargs)


def is_type(form: object) -> bool:
    """Return whether a form is a class or an annotation such as `list[int]`."""
    return isinstance(form, type) or get_origin(form) is not None


def form_of(type_: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """Return the JSON schema of a type, and what reads its objects. Raises `UsageError`."""
    adapter, schema = _adapter(type_, f"the form {short_repr(type_)}")
    return schema, adapter.validate_json


def _adapter(type_: Any, subject: str) -> tuple[Any, dict[str, Any]]:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(type_)
        return adapter, adapter.json_schema()
    except (PydanticUserError, NameError, TypeError, ValueError) as error:
        raise UsageError(f"{subject} has no JSON schema: {short_message(error)}") from None


def _as_text(value: Any) -> str:
    from pydantic_core import to_json

    return value if isinstance(value, str) else to_json(value, fallback=str).decode()
