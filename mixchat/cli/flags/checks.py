"""Checks for the values of flags, whether a flag, a variable or config.toml gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from mixchat.base.errors import UsageError
from mixchat.base.options import CacheBits, NetworkAddress, device_names
from mixchat.chat.parameters import LENGTHS, SAMPLING
from mixchat.cli.flags.arguments import STDIN, checked
from mixchat.experts.cache import POLICIES

# By its name in Python: the flag, and the limits of its value.
_NUMBERS = {of.field: (f"--{name}", of) for name, of in {**SAMPLING, **LENGTHS}.items()}


def within_limits(name: str) -> Callable[[Any], None]:
    """Return a check that raises `UsageError` outside the limits of a flag; NaN always is."""
    flag, number = _NUMBERS[name]
    return lambda value: number.check(flag, value)


def checked_bits(bits: int | None) -> CacheBits | None:
    """Return the bits, if a number of the KV cache can have them. Raises `UsageError`."""
    if bits in (None, *get_args(CacheBits)):
        return cast("CacheBits | None", bits)
    raise UsageError(f"--kv-bits has to be 8 or 16, not {bits}")


def checked_policy(name: str) -> str:
    """Return the name, if it is that of a cache policy. Raises `UsageError`."""
    if name not in POLICIES:
        raise UsageError(f"--cache-policy has to be {', '.join(POLICIES)}, not {name!r}")
    return name


def checked_device(text: str) -> str:
    """Return the text, if it names kinds of devices that go together. Raises `UsageError`."""
    for name in map(str.strip, text.split(",")):
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
            raise UsageError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N")
    device_names(text)
    return text


def checked_workers(addresses: list[str]) -> list[str]:
    """Return the addresses, if each can be read and is given once. Raises `UsageError`."""
    seen: set[NetworkAddress] = set()
    for address in map(NetworkAddress.parse, addresses):
        if address in seen:
            raise UsageError(f"--worker {address} is given twice")
        seen.add(address)
    return addresses


def checked_stops(texts: list[str]) -> list[str]:
    """Return the texts, if none is empty and all are UTF-8. Raises `UsageError`."""
    return [checked(text, "--stop") for text in texts]


def checked_system(text: str) -> str:
    """Return the system prompt, if it is empty or UTF-8. Raises `UsageError`."""
    return text and checked(text, "--system")


def checked_system_file(path: Path) -> Path:
    """Return the path, if it is not that of standard input. Raises `UsageError`."""
    if str(path) == STDIN:
        raise UsageError("--system-file cannot be standard input, which is for the question")
    return path


def checked_model(name: str) -> str:
    """Return the name, if it is not empty and UTF-8. Raises `UsageError`."""
    return checked(name, "the model's name")
