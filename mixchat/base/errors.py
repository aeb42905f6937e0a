"""The tree of errors. Each has its exit code and, usually, a hint.

Every error that a person can cause or cure is a `MixchatError`. Any other is a bug. The page
on scripts has the exit codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

_MESSAGE_LENGTH_MAX = 380  # characters
_FOREIGN_LENGTH_MAX = 200  # characters of a library's message


class MixchatError(Exception):
    """The base of all errors with a message for a person."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # A message may quote untrusted text of any length.
        super().__init__(
            message
            if len(message) <= _MESSAGE_LENGTH_MAX
            else f"{message[:_MESSAGE_LENGTH_MAX]}..."
        )
        self.hint = hint


class UsageError(MixchatError):
    """A value on the command line or in the environment is wrong."""

    exit_code = 2


class UnknownArgumentError(UsageError, TypeError):
    """A function has no argument of that name."""


class CutOffError(MixchatError):
    """An answer that has to be whole ended too early."""


class PromptError(MixchatError):
    """The prompt cannot be used."""

    exit_code = 3


class PromptTooLongError(PromptError):
    """The prompt leaves no room for an answer."""


class ModelNotFoundError(MixchatError):
    """No model of that name exists."""

    exit_code = 4


class ChatNotFoundError(MixchatError):
    """No saved chat has that name, or several match it."""

    exit_code = 4


class HubError(MixchatError):
    """The hub cannot be reached, refuses, or sends something wrong."""

    exit_code = 5


class ServerError(MixchatError):
    """A server or worker cannot be reached, refuses, or sends something wrong."""

    exit_code = 5


class CheckpointError(MixchatError):
    """A checkpoint, an installed model or a chat is damaged or unsupported."""

    exit_code = 6


class ResourceError(MixchatError):
    """There is not enough disk or memory."""

    exit_code = 7


class MissingDependencyError(MixchatError):
    """An optional package, a tool such as pip, or an instruction of the CPU is missing."""

    exit_code = 8


class NoCodeError(MixchatError):
    """An answer contains no code block."""

    exit_code = 9


def short_message(message: object) -> str:
    """Return a library's message on one line, at most 200 characters."""
    line = " ".join(str(message).split())
    return line if len(line) <= _FOREIGN_LENGTH_MAX else line[: _FOREIGN_LENGTH_MAX - 1] + "\u2026"


def short_repr(value: object) -> str:
    """Return the beginning of a value's `repr` on one line, or its type if it has none."""
    try:
        return " ".join(repr(value)[:80].split())
    except Exception:  # Python writes no number of 5,000 digits
        return f"a value of the type {type(value).__name__}"


def alternatives(words: Sequence[str]) -> str:
    """Return the words for a sentence, as in "show, hide, on or off"."""
    return " or ".join(", ".join(words).rsplit(", ", 1))


def unknown_argument(
    name: str, known: Collection[str], advice: Mapping[str, str]
) -> UnknownArgumentError:
    """Return the error for an argument of a function. A traceback shows no hint.

    advice: by names that others use, what to write instead.
    """
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    if name in advice:
        words = f": {advice[name]}"
    elif near:
        words = f"; did you mean {near[0]}?"
    else:
        words = f"; there are {', '.join(sorted(known))}"
    return UnknownArgumentError(f"there is no argument {name!r:.80}{words}")
