"""The parameters of sampling and of a chat, with the names of the flags, limits and changes."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mixchat.base.errors import UsageError
from mixchat.base.options import Overflow, Think

if TYPE_CHECKING:
    from mixchat.base.options import RequestedSampling, SamplingOptions
    from mixchat.chat.session import ChatSession

    Sampling = TypeVar("Sampling", bound=SamplingOptions | RequestedSampling)

OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
THINKS: tuple[Think, ...] = get_args(Think)
_NONE = ("none", "off", "default")


@dataclass(frozen=True)
class NumberParameter:
    """A number that controls sampling or a length. `field` is its name in Python."""

    field: str
    kind: Callable[[str], Any]
    fits: Callable[[Any], bool]
    limits: str

    def read(self, name: str, text: str) -> Any:
        """Return the value. Raises `UsageError` if it is not a number within the limits."""
        try:
            value = self.kind(text)
        except ValueError:
            raise UsageError(f"{name} has to be {self.limits}, not {text!r}") from None
        self.check(name, value)
        return value

    def check(self, name: str, value: Any) -> None:
        """Raise `UsageError` if the value is outside the limits, as NaN always is."""
        if not self.fits(value):
            raise UsageError(f"{name} has to be {self.limits}, not {value}")


SAMPLING = {
    "temp": NumberParameter("temperature", float, lambda x: 0 <= x < math.inf, "0 or more"),
    "top-p": NumberParameter("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top-k": NumberParameter("top_k", int, lambda x: x >= 0, "0 or more"),
    "min-p": NumberParameter("min_p", float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repeat-penalty": NumberParameter(
        "repeat_penalty", float, lambda x: 0.01 <= x <= 100, "between 0.01 and 100"
    ),
    "seed": NumberParameter(
        "seed", int, lambda x: 0 <= x < 2**63, "between 0 and 9223372036854775807"
    ),
}
LENGTHS = {
    "max-tokens": NumberParameter(
        "max_tokens", int, lambda x: x >= 0, "1 or more, or 0 for what fits"
    ),
    "ctx-size": NumberParameter("ctx_size", int, lambda x: x >= 1, "1 or more"),
}
NAMES = (*SAMPLING, "max-tokens", "stop", "overflow", "think")  # of what a chat can change


def values(session: ChatSession) -> dict[str, str]:
    """Return all parameters as they are now."""
    sampling = {name: getattr(session.sampling, number.field) for name, number in SAMPLING.items()}
    stop = ", ".join(map(repr, session.stop)) or "none"
    longest = session.backend.longest_answer(session.max_tokens)
    limit = "what fits" if session.max_tokens == 0 else longest
    others = {"max-tokens": limit, "stop": stop, "overflow": session.overflow}
    others["think"] = session.think
    return {
        name: "left to the server" if value is None else str(value)
        for name, value in {**sampling, **others}.items()
    }


def change(session: ChatSession, name: str, text: str) -> None:
    """Set a parameter from the next turn on. The text `none` sets its default.

    Raises `UsageError` if no parameter has this name, or if the value is not allowed.
    """
    name, nothing = name.lstrip("-").replace("_", "-"), text.lower() in _NONE
    name = "temp" if name == "temperature" else name
    if name in SAMPLING:
        field = SAMPLING[name].field
        value = getattr(session.advised, field) if nothing else SAMPLING[name].read(name, text)
        session.sampling = dataclasses.replace(session.sampling, **{field: value})
    elif name == "max-tokens":
        session.max_tokens = None if nothing else LENGTHS[name].read(name, text)
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


def unquoted(text: str) -> str:
    """Return the text without quotes around it, as a shell would."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def checked_word(words: Sequence[str], name: str, text: str) -> Any:
    """Return the text. Raises `UsageError` about `name` if it is none of the words."""
    if text not in words:
        raise UsageError(f"{name} has to be {' or '.join(words)}, not {text!r}")
    return text


def numbers_of(sampling: SamplingOptions | RequestedSampling) -> dict[str, Any]:
    """Return the numbers that a chat can change, by their names in Python."""
    return {number.field: getattr(sampling, number.field) for number in SAMPLING.values()}


def with_numbers(sampling: Sampling, numbers: Mapping[str, Any]) -> Sampling:
    """Return `sampling` with these numbers, by their names in Python. Bad ones are ignored."""
    known = {number.field: number for number in SAMPLING.values()}
    good = {
        field: value
        for field, value in numbers.items()
        if field in known and value is not None and known[field].fits(value)
    }
    for field in ("top_k", "seed"):
        if field in good:
            good[field] = int(good[field])
    return dataclasses.replace(sampling, **good)
