"""The socket that the server listens on."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from mixchat.base.errors import UsageError
from mixchat.base.network_address import NetworkAddress
from mixchat.experts.workers.address import Address, resolve


def find_address(host: str, port: int, key: str | None) -> Address:
    """Return the address to listen on; a port of 0 lets the system choose one.

    Raises `UsageError` where there is no such host, and for one that others can reach without a
    key.
    """
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 is written in a URL
    address = resolve(str(NetworkAddress(host, port)), any_port=True)
    if key is None and not is_loopback(address):
        raise UsageError(
            f"--host {host}: whoever reaches this machine could use the server",
            hint="Set a key in MIXCHAT_API_KEY, or leave --host out to serve this machine alone.",
        )
    return address


def is_loopback(address: Address) -> bool:
    """Return whether only this machine can reach an address."""
    return ip_address(address.host).is_loopback


def bind(address: Address) -> socket.socket:
    """Return a socket with this address, on which nobody listens yet. Raises `UsageError`."""
    # asyncio sets TCP_NODELAY only if the protocol is named. Without it each answer on a connection
    # that stays open takes 40 ms more.
    bound = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address.target)
    except OSError as error:
        bound.close()
        raise _bind_error(address, error) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL under which clients of OpenAI's API find the server."""
    host, port = bound.getsockname()[:2]
    return f"http://{NetworkAddress(host, port)}/v1"


def _bind_error(address: Address, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        hint = "Perhaps a server runs already. --port N takes another port."
        return UsageError(f"{address}: the port is in use", hint=hint)
    if error.errno == errno.EADDRNOTAVAIL:
        hint = "--host takes an address of this machine; 0.0.0.0 means all of them."
        return UsageError(f"{address}: this machine has no such address", hint=hint)
    return UsageError(f"{address}: cannot listen there ({error.strerror})")
