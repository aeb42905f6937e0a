"""HOST[:PORT] as a person writes it, resolved to one address."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from mixchat.base import interrupts
from mixchat.base.errors import MixchatError, UsageError, short_message
from mixchat.base.options import NetworkAddress
from mixchat.base.progress import in_background

_LOOKUP_TIMEOUT_S = 5.0
_CTRL_C_CHECK_S = 0.05
# `localhost` may have an IPv6 address, too. Workers listen on this one.
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """One address of a worker, as `connect` and `bind` take it."""

    text: str
    family: socket.AddressFamily
    target: tuple[Any, ...]  # host and port, and two more numbers for IPv6

    @property
    def host(self) -> str:
        """Return the numeric address."""
        return str(self.target[0])

    @property
    def port(self) -> int:
        """Return the port. With 0 the system chooses one to listen on."""
        return int(self.target[1])

    def __str__(self) -> str:
        return self.text


def resolve(text: str, *, any_port: bool = False) -> Address:
    """Return the one address that HOST[:PORT] names. With `any_port` the port may be 0.

    Raises `UsageError` if it is malformed, unknown or has several addresses, and `MixchatError` if
    looking it up takes too long.
    """
    named = NetworkAddress.parse(text, any_port=any_port)
    host = _LOCALHOST if named.host == "localhost" else named.host
    infos = _look_up(text, host, named.port)
    targets = list(dict.fromkeys((family, target) for family, _, _, _, target in infos))
    if len(targets) > 1:
        listed = ", ".join(str(target[0]) for _, target in targets)
        example = NetworkAddress(str(targets[0][1][0]), named.port)
        raise UsageError(
            f"{named.host} has several addresses: {listed}",
            hint=f"Name one of them, such as {example}.",
        )
    family, target = targets[0]
    return Address(str(named), family, target)


def resolve_workers(texts: Sequence[str]) -> list[Address]:
    """Return the address of each worker. Raises `UsageError` also if two are the same."""
    addresses: dict[tuple[Any, ...], Address] = {}
    for address in map(resolve, texts):
        if address.target in addresses:
            both = f"{addresses[address.target]} and {address}"
            raise UsageError(f"the same worker is named twice: {both}", hint="Name it once.")
        addresses[address.target] = address
    return list(addresses.values())


def listen_error(
    address: Address, error: OSError, program: str, port_flag: str, host_flag: str
) -> UsageError:
    """Return the error for an address that `program` cannot take."""
    if error.errno == errno.EADDRINUSE:
        hint = f"Perhaps a {program} runs already. {port_flag} takes another port."
        return UsageError(f"{address}: the port is in use", hint=hint)
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        hint = f"{host_flag} takes an address of this machine; 0.0.0.0 means all of them."
        return UsageError(f"{address}: this machine has no such address", hint=hint)
    return UsageError(f"{address}: cannot listen there ({error.strerror})")


def _look_up(text: str, host: str, port: int) -> list[Any]:
    """Call getaddrinfo in a thread, because it can block for a minute."""
    look_up = in_background(socket.getaddrinfo, host, port, socket.AF_UNSPEC, socket.SOCK_STREAM)
    deadline = time.monotonic() + _LOOKUP_TIMEOUT_S
    while not wait([look_up], _CTRL_C_CHECK_S).done:
        interrupts.check()
        if time.monotonic() >= deadline:
            fault = f"{text}: looking up the name takes too long"
            raise MixchatError(fault, hint="Name the address in numbers.")
    try:
        return look_up.result()
    except (OSError, ValueError) as error:  # ValueError: a name that no host can have
        reason = short_message(getattr(error, "strerror", None) or error)
        hint = "Look for a typing error, or name the address in numbers."
        raise UsageError(f"{text}: no such host ({reason})", hint=hint) from None
