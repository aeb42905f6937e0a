"""HOST[:PORT] as a person writes it, resolved to one address."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Any

from mixchat import interrupts
from mixchat.background import in_background
from mixchat.errors import MixchatError, UsageError, short_message

DEFAULT_PORT = 7917

_DEADLINE = 5.0  # seconds that looking up a name may take
_SLICE = 0.05  # seconds between two looks for Ctrl-C
# Most systems give `localhost` an address of IPv6, too; a worker listens on this one.
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """One address of a worker: what `connect` and `bind` take, and how a person wrote it."""

    text: str
    family: socket.AddressFamily
    target: tuple[Any, ...]  # host and port, and two more numbers for IPv6

    @property
    def host(self) -> str:
        """Return the numeric address."""
        return str(self.target[0])

    @property
    def port(self) -> int:
        """Return the port; 0 lets the system choose one to listen on."""
        return int(self.target[1])

    def __str__(self) -> str:
        return self.text


def resolve(text: str) -> Address:
    """Return the one address that HOST, HOST:PORT, [IPv6] or [IPv6]:PORT names.

    Raises `UsageError` where it is malformed, where no such host is known, and where the name has
    several addresses; `MixchatError` where looking it up takes too long.
    """
    host, port = _split(text)
    found = _look_up(text, _LOCALHOST if host == "localhost" else host, port)
    targets = list(dict.fromkeys((family, target) for family, _, _, _, target in found))
    if len(targets) > 1:
        listed = ", ".join(str(target[0]) for _, target in targets)
        hint = f"Name one of them, such as {_format(str(targets[0][1][0]), port)}."
        raise UsageError(f"{host} has several addresses: {listed}", hint=hint)
    family, target = targets[0]
    return Address(_format(host, port), family, target)


def resolve_workers(texts: Sequence[str]) -> list[Address]:
    """Return the address of each worker. Raises `UsageError` also where two are the same."""
    addresses: dict[tuple[Any, ...], Address] = {}
    for text in texts:
        address = resolve(text)
        if address.port == 0:
            raise UsageError(f"{text}: a worker's port is a number from 1 to 65535")
        if address.target in addresses:
            both = f"{addresses[address.target]} and {address}"
            raise UsageError(f"the same worker is named twice: {both}", hint="Name it once.")
        addresses[address.target] = address
    return list(addresses.values())


def _split(text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        well_formed = closed and ":" in host and (colon == ":" or not rest)
    else:
        host, colon, port = text.partition(":")
        well_formed = ":" not in port
    if not well_formed or not host or host != "".join(host.split()):
        hint = "An address is HOST or HOST:PORT; IPv6 stands in brackets: [fd00::5]:7917."
        raise UsageError(f"{text!r} is not an address", hint=hint)
    return host, _parse_port(text, port) if colon else DEFAULT_PORT


def _parse_port(text: str, port: str) -> int:
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise UsageError(f"{text!r}: a port is a number up to 65535, and {port!r} is not")
    return int(port)


def _look_up(text: str, host: str, port: int) -> list[Any]:
    """Return what getaddrinfo finds. It may block for long, so a thread waits for it."""
    look_up = in_background(socket.getaddrinfo, host, port, socket.AF_UNSPEC, socket.SOCK_STREAM)
    try:
        return list(_wait(look_up, f"{text}: looking up the name takes too long"))
    except (OSError, ValueError) as error:  # ValueError: a name that no host can have
        reason = short_message(getattr(error, "strerror", None) or error)
        hint = "Look for a typing error, or name the address in numbers."
        raise UsageError(f"{text}: no such host ({reason})", hint=hint) from None


def _wait(work: Future[Any], fault: str) -> Any:
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        interrupts.check()
        try:
            return work.result(_SLICE)
        except TimeoutError:
            if work.done():  # the system's own deadline, in `work`
                raise
    raise MixchatError(fault, hint="Name the address in numbers.")


def _format(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
