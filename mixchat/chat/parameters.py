"""The parameters of a chat, by the names of the flags, and their changes."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mixchat.base.errors import UsageError
from mixchat.base.option import options_of
from mixchat.base.options import ChatOptions, SamplingOptions

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession

_NONE = ("none", "off", "default")
# The options that a chat can change, by their names here, each with its name in Python.
_OPTIONS = {
    option.key: (name, option)
    for declaring in (SamplingOptions, ChatOptions)
    for name, option in options_of(declaring).items()
    if option.key and name != "system"  # which /system changes
}
NAMES = (*_OPTIONS,)


def values(session: ChatSession) -> dict[str, str]:
    """Return all parameters as they are now."""
    advised = {} if session.model.sampling is None else vars(session.model.sampling)
    longest = session.model.longest_answer(session.max_tokens)
    known = {
        **advised,
        **session.sampling,
        "max_tokens": "what fits" if session.max_tokens == 0 else longest,
        "stop": ", ".join(map(repr, session.stop)) or "none",
        "overflow": session.overflow,
        "think": session.think,
    }
    shown = {key: known.get(name) for key, (name, _) in _OPTIONS.items()}
    return {
        key: "left to the server" if value is None else str(value) for key, value in shown.items()
    }


def change(session: ChatSession, name: str, text: str) -> None:
    """Set a parameter from the next turn on. The text `none` sets its default.

    Raises `UsageError` if no parameter has this name, or if the value is not allowed.
    """
    key = name.lstrip("-").replace("_", "-")
    key = "temp" if key == "temperature" else key
    if key not in _OPTIONS:
        near = difflib.get_close_matches(key, NAMES, 1)
        hint = f"Did you mean {near[0]}?" if near else f"The parameters are {', '.join(NAMES)}."
        raise UsageError(f"there is no parameter {key!r}", hint=hint)
    field, option = _OPTIONS[key]
    is_sampled = hasattr(SamplingOptions, field)
    if text.lower() not in _NONE or text in option.words:
        value = option.read(unquoted(text), key)
        if is_sampled:
            session.changed[field] = value
        else:
            setattr(session, field, value)
    elif is_sampled:
        session.changed.pop(field, None)
    else:
        setattr(session, field, getattr(ChatOptions, field))


def completions(text: str) -> list[str]:
    """Return the names, or the values of a parameter that takes one of a few words."""
    key, space, _ = text.partition(" ")
    if space and key in _OPTIONS and (words := _OPTIONS[key][1].words):
        return [f"{key} {word}" for word in words]
    return [f"{name} " for name in NAMES]


def unquoted(text: str) -> str:
    """Return the text without quotes around it, as a shell would."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
