"""Sizes, rates and times as text, and amounts of memory from text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixchat.base.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:(%)|([KMGT]I?)?B?)\s*", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]+)?)\s*([smh])\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_FEWEST = 10_000  # bytes that can be meant without a unit


@dataclass(frozen=True)
class MemoryBudget:
    """An amount of memory, `size` bytes (300MB) or a `fraction` of some whole (50%)."""

    size: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, text: str) -> MemoryBudget:
        """Read `300MB`, `1.5 GiB`, `2000000` or `50%`. Raises `UsageError`."""
        match = _SIZE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"cannot read {text!r} as an amount of memory",
                hint="Write it like 300MB, 1.5GiB or 50%.",
            )
        number = float(match[1])
        percent = match[2]
        unit = (match[3] or "").upper()
        if number > 1e18:
            raise UsageError(f"{text[:20]}... is more memory than any machine has")
        if percent:
            if not 0 < number <= 100:
                raise UsageError(f"{text!r} is not between 0% and 100%")
            return cls(fraction=number / 100)
        # `--host-memory 8` was taken for 8 bytes.
        if text.strip()[-1].isdigit() and 0 < number < _FEWEST:
            raise UsageError(
                f"{text.strip()} means {number:.0f} bytes", hint=f"Did you mean {text.strip()}GB?"
            )
        return cls(size=int(number * (_UNITS | _BINARY_UNITS)[unit]))

    @classmethod
    def parse_list(cls, text: str) -> tuple[MemoryBudget, ...]:
        """Read amounts like `12GB,8GB`. Raises `UsageError`."""
        return tuple(cls.parse(amount) for amount in text.split(","))

    def __str__(self) -> str:
        return str(self.size) if self.fraction is None else f"{100 * self.fraction:.6g}%"

    def of(self, whole: int) -> int:
        """Return the budget in bytes. A fraction is taken of `whole` bytes."""
        return int(self.fraction * whole) if self.fraction is not None else self.size or 0


def parse_size(text: str) -> int:
    """Return `16GB` in bytes. Raises `UsageError`."""
    size = MemoryBudget.parse(text).size
    if size is None:
        raise UsageError(f"{text!r} is a part of nothing", hint="Write a size like 16GB.")
    return size


def parse_duration(text: str) -> float:
    """Return `90s`, `10m` or `1.5h` in seconds. Raises `UsageError`."""
    match = _DURATION.fullmatch(text)
    if match is None or not float(match[1]):
        raise UsageError(f"cannot read {text!r} as a time", hint="Write it like 90s, 10m or 2h.")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_least(size: int) -> str:
    """Return a number of bytes as text, rounded up."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            tenths = -(-size * 10 // factor)
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{size} bytes"


def format_size(size: int) -> str:
    """Return `93405585408` bytes as `93.4 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size} bytes"


def format_rate(rate: float) -> str:
    """Return `0.617` as `0.62`, and `18.3` as `18`."""
    return f"{rate:.0f}" if rate >= 9.95 else f"{rate:.2g}"


def format_count(count: int, noun: str) -> str:
    """Return `1 layer` or `2 layers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_age(seconds: float) -> str:
    """Return `7200` as `2 hours ago`, and less than a minute as `now`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count >= 1:
            return f"{format_count(count, unit)} ago"
    return "now"


def format_time(seconds: float) -> str:
    """Return `95` as `2 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
