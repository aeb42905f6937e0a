"""The parameters of a chat, by the names of the flags, and their changes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from mixchat.base.errors import UsageError, alternatives
from mixchat.base.options import Overflow, Think
from mixchat.face.numbers import LENGTHS, SAMPLING

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession

OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
THINKS: tuple[Think, ...] = get_args(Think)
_NONE = ("none", "off", "default")
NAMES = (*SAMPLING, "max-tokens", "stop", "overflow", "think")  # of what a chat can change


def values(session: ChatSession) -> dict[str, str]:
    """Return all parameters as they are now."""
    longest = session.model.longest_answer(session.max_tokens)
    advised = {} if session.model.sampling is None else vars(session.model.sampling)
    numbers = {**advised, **session.sampling}
    known = {
        **{name: numbers.get(number.field) for name, number in SAMPLING.items()},
        "max-tokens": "what fits" if session.max_tokens == 0 else longest,
        "stop": ", ".join(map(repr, session.stop)) or "none",
        "overflow": session.overflow,
        "think": session.think,
    }
    return {
        name: "left to the server" if value is None else str(value) for name, value in known.items()
    }


def change(session: ChatSession, name: str, text: str) -> None:
    """Set a parameter from the next turn on. The text `none` sets its default.

    Raises `UsageError` if no parameter has this name, or if the value is not allowed.
    """
    name = name.lstrip("-").replace("_", "-")
    nothing = text.lower() in _NONE
    name = "temp" if name == "temperature" else name
    if name in SAMPLING:
        number = SAMPLING[name]
        if nothing:
            session.changed.pop(number.field, None)
        else:
            session.changed[number.field] = number.read(name, text)
    elif name == "max-tokens":
        session.max_tokens = None if nothing else int(LENGTHS[name].read(name, text))
    elif name == "stop":
        session.stop = () if nothing else (unquoted(text),)
    elif name == "overflow":
        session.overflow = checked_word(OVERFLOWS, name, text)
    elif name == "think":
        session.think = checked_word(THINKS, name, text)
    else:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"Did you mean {near[0]}?" if near else f"The parameters are {', '.join(NAMES)}."
        raise UsageError(f"there is no parameter {name!r}", hint=hint)


def completions(text: str) -> list[str]:
    """Return the names, or the values of a parameter that takes one of a few words."""
    if text.startswith("overflow "):
        return [f"overflow {policy}" for policy in OVERFLOWS]
    if text.startswith("think "):
        return [f"think {mode}" for mode in THINKS]
    return [f"{name} " for name in NAMES]


def unquoted(text: str) -> str:
    """Return the text without quotes around it, as a shell would."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def checked_word(words: Sequence[str], name: str, text: str) -> Any:
    """Return the text. Raises `UsageError` about `name` if it is none of the words."""
    if text not in words:
        raise UsageError(f"{name} has to be {alternatives(words)}, not {text!r}")
    return text
