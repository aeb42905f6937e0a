"""The fields that control a model's thinking, as the variables of its chat template."""

from __future__ import annotations

from typing import Any

from mixchat.serving.requests.errors import value_error
from mixchat.text.thinking import EFFORT, EFFORTS, SWITCHES, ThinkingFormat

_KWARGS, _OLLAMA = "chat_template_kwargs", "think"
_HIGHER_EFFORTS = ("xhigh", "max")  # than any that templates know


def take_thinking(
    body: dict[str, Any], format: ThinkingFormat | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a body without the fields that the model's template knows, and its variables.

    Only variables with a few known values are taken, since others could put control tokens into a
    prompt. Raises `RequestError` for a value of the wrong type.
    """
    if format is None:
        return body, {}
    rest = dict(body)
    variables = _from_fields(rest, format) | _from_kwargs(rest, format)
    for name, value in variables.items():
        if name in SWITCHES and not isinstance(value, bool):
            raise value_error(f"{_KWARGS}.{name}", "true or false", value)
        if name == EFFORT and value not in EFFORTS:
            raise value_error(f"{_KWARGS}.{name}", " or ".join(EFFORTS), value)
    return rest, variables


def _from_kwargs(rest: dict[str, Any], format: ThinkingFormat) -> dict[str, Any]:
    given = rest.get(_KWARGS)
    if not isinstance(given, dict):
        return {}
    variables = {name: given[name] for name in format.variables if name in given}
    rest[_KWARGS] = {name: value for name, value in given.items() if name not in variables}
    if not rest[_KWARGS]:
        del rest[_KWARGS]
    return variables


def _from_fields(rest: dict[str, Any], format: ThinkingFormat) -> dict[str, Any]:
    effort, switch, thinks = rest.get(EFFORT), format.switch, rest.get(_OLLAMA)
    effort = EFFORTS[-1] if effort in _HIGHER_EFFORTS else effort
    variables: dict[str, Any] = {}
    if switch is not None and isinstance(thinks, bool):
        variables[switch] = rest.pop(_OLLAMA)
    elif EFFORT in format.variables and thinks is True:
        del rest[_OLLAMA]  # a model with efforts always thinks
    if EFFORT in format.variables and effort in EFFORTS:
        del rest[EFFORT]
        variables[EFFORT] = effort
    elif switch is not None and effort == "none":
        del rest[EFFORT]
        variables[switch] = False
    return variables
