"""The declaration of an option: its flag, its help, and the values that it takes.

It makes a field of a dataclass, which has the option's name, type and default, as in

    top_k: int = Integer("Sample from N tokens.", "--top-k N", least=0, most=9).field(0)

Each door checks values by it, and calls the option by the door's own name.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cache
from inspect import cleandoc
from numbers import Integral, Real
from pathlib import Path
from textwrap import fill
from typing import Any, ClassVar, TypeVar

from mixchat.base.errors import UsageError, alternatives, short_repr

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DOC_WIDTH = 88  # characters
_THOUSANDS = re.compile(r"([0-9]{1,9})[kK]", re.ASCII)
_DECLARED = "option"  # in the metadata of a field


@dataclass(frozen=True)
class Option(ABC):
    """The declaration of an option.

    usage: its flags and metavar, as in "-n --max-tokens N", or "". The first long flag is its key
    in config.toml and its name in `/set`, too. shown_default: the default for a person, if no
    fixed value is the default.
    """

    help: str
    usage: str = ""
    _: KW_ONLY
    shown_default: str | None = None

    def field(self, default: Any) -> Any:
        """Return the field that declares the option."""
        return field(default=default, metadata={_DECLARED: self})

    @property
    def key(self) -> str:
        """Return its key in config.toml and its name in `/set`."""
        flags = (word for word in self.usage.split() if word.startswith("--"))
        return next(flags, "").partition("/")[0].removeprefix("--")

    @property
    def flag_type(self) -> Any:
        """Return the type of the value that a shell gives."""
        return str

    @property
    @abstractmethod
    def rule(self) -> str:
        """Return the end of the sentence "it has to be ..."."""

    @property
    def words(self) -> tuple[str, ...]:
        """Return the values, or usual ones."""
        return ()

    @abstractmethod
    def accepted(self, value: Any) -> Any:
        """Return the value as options hold it, or None if it cannot be used."""

    def checked(self, value: Any, name: str) -> Any:
        """Return the value as `accepted` does. Raises `UsageError` with the door's `name`."""
        usable = self.accepted(value)
        if usable is None:
            raise UsageError(f"{name} has to be {self.rule}, not {short_repr(value)}")
        return usable

    def read(self, text: str, name: str) -> Any:
        """Return the value that a text gives. Raises `UsageError`."""
        return self.checked(text, name)


@dataclass(frozen=True)
class Number(Option):
    """A number from `least` to `most`, above `above` and below `below`.

    zero: the meaning of 0, if it stands for something else than a number.
    """

    _: KW_ONLY
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    zero: str = ""
    number_type: ClassVar[type[int] | type[float]]
    abstract_type: ClassVar[type]

    @property
    def flag_type(self) -> Any:
        return self.number_type

    @property
    def rule(self) -> str:
        least = 1 if self.zero else self.least
        if self.above > -math.inf:
            rule = f"above {self.above} and at most {self.most}"
        elif self.below < math.inf:
            rule = f"at least {least} and below {self.below}"
        else:
            rule = (
                f"{least} or more" if self.most == math.inf else f"between {least} and {self.most}"
            )
        return f"{rule}, or 0 for {self.zero}" if self.zero else rule

    def accepted(self, value: Any) -> int | float | None:
        """Return the value as Python's int or float, or None if it is not within the limits.

        A number of another library, such as numpy's, is converted. NaN and True are never accepted.
        """
        if not isinstance(value, self.abstract_type) or isinstance(value, bool):
            return None
        number_type: Any = self.number_type
        try:
            number = number_type(value)
        except OverflowError:  # a double holds no whole number of 400 digits
            return None
        is_within = self.least <= number <= self.most and self.above < number < self.below
        return number if is_within else None

    def read(self, text: str, name: str) -> Any:
        try:
            value = self.number_type(text)
        except ValueError:
            raise UsageError(f"{name} has to be {self.rule}, not {text!r:.80}") from None
        return self.checked(value, name)


@dataclass(frozen=True)
class Integer(Number):
    """A whole number."""

    number_type = int
    abstract_type = Integral


@dataclass(frozen=True)
class Tokens(Integer):
    """A number of tokens. A text may give it in units of 1,024, as in 8k."""

    def accepted(self, value: Any) -> int | float | None:
        if isinstance(value, str):
            try:
                value = self.parse(value)
            except ValueError:
                return None
        return super().accepted(value)

    def read(self, text: str, name: str) -> Any:
        return self.checked(text, name)

    @staticmethod
    def parse(text: str) -> int:
        """Return 8192 for "8k" and for "8192". Raises `ValueError`."""
        match = _THOUSANDS.fullmatch(text.strip())
        return int(text) if match is None else int(match[1]) * 1024


@dataclass(frozen=True)
class Float(Number):
    """A finite number with a fraction."""

    number_type = float
    abstract_type = Real


@dataclass(frozen=True)
class Choice(Option):
    """One of a few words or numbers."""

    _: KW_ONLY
    values: tuple[Any, ...]

    @property
    def flag_type(self) -> Any:
        return type(self.values[0])

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(map(str, self.values))

    @property
    def rule(self) -> str:
        return alternatives(self.words)

    def accepted(self, value: Any) -> Any:
        is_usable = isinstance(value, self.flag_type) and not isinstance(value, bool)
        return value if is_usable and value in self.values else None


@dataclass(frozen=True)
class Switch(Option):
    """True or False."""

    flag_type = bool
    rule = "True or False"

    def accepted(self, value: Any) -> bool | None:
        return value if isinstance(value, bool) else None


@dataclass(frozen=True)
class Text(Option):
    """A text. `parse` reads it, and raises `UsageError` without the option's name."""

    _: KW_ONLY
    parse: Callable[[str], Any] = str
    words: tuple[str, ...] = ()  # for completion
    rule = "a text"

    def accepted(self, value: Any) -> Any:
        return self.parse(value) if isinstance(value, str) else None

    def checked(self, value: Any, name: str) -> Any:
        try:
            usable = self.accepted(value)
        except UsageError as error:
            raise UsageError(f"{name}: {error}", hint=error.hint) from None
        return super().checked(value, name) if usable is None else usable


@dataclass(frozen=True)
class Texts(Text):
    """Several texts. `parse` reads all of them together."""

    _: KW_ONLY
    parse: Callable[[Any], Any] = tuple
    flag_type = list[str]
    rule = "a list of texts"

    def accepted(self, value: Any) -> Any:
        is_usable = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        return self.parse(value) if is_usable else None

    def read(self, text: str, name: str) -> Any:
        return self.checked([text], name)


@dataclass(frozen=True)
class File(Option):
    """The path of a file."""

    flag_type = Path
    rule = "the path of a file"

    def accepted(self, value: Any) -> Path | None:
        # No shell expands ~ in --key-file=~/FILE or in a variable.
        return Path(os.path.expanduser(value)) if isinstance(value, str | Path) else None


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which stands for a byte not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@cache
def options_of(declaring: type) -> Mapping[str, Option]:
    """Return the options that a dataclass declares, by the names of its fields."""
    return {
        each.name: each.metadata[_DECLARED]
        for each in fields(declaring)
        if _DECLARED in each.metadata
    }


def documented(*declaring: type) -> Callable[[_Function], _Function]:
    """Put the options that dataclasses declare in place of {options} in a docstring."""
    lines = [
        fill(f"- {name} ({option.rule}): {option.help}", _DOC_WIDTH, subsequent_indent="  ")
        for options in map(options_of, declaring)
        for name, option in options.items()
    ]

    def add(function: _Function) -> _Function:
        text = cleandoc(function.__doc__ or "")
        function.__doc__ = text.replace("{options}", "\n".join(lines))
        return function

    return add
