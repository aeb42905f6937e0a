"""The address of a worker, from text such as `192.168.1.5:7917`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address

from mixchat.base.errors import UsageError

WORKER_PORT = 7917
_HINT = f"Write it like 192.168.1.5, 192.168.1.5:{WORKER_PORT} or [fe80::1]:{WORKER_PORT}."
_NAME = r"[\w-]{1,63}(?:\.[\w-]{1,63})*\.?"
_PARTS = re.compile(rf"(?:\[(?P<six>.+)\]|(?P<host>{_NAME}))(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII)


@dataclass(frozen=True)
class NetworkAddress:
    """A host, by its name or its address in numbers, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, any_port: bool = False) -> NetworkAddress:
        """Read `HOST`, `HOST:PORT` or `[IPV6]:PORT`; without a port it is `WORKER_PORT`.

        With `any_port` the port may be 0. Raises `UsageError` on anything else.
        """
        match = _PARTS.fullmatch(f"[{text}]" if _is_ipv6(text) else text)
        if match is None or not (match["host"] or _is_ipv6(match["six"])):
            raise UsageError(f"cannot read {text!r} as HOST[:PORT]", hint=_HINT)
        port = WORKER_PORT if match["port"] is None else int(match["port"])
        if port > 65535 or (port == 0 and not any_port):
            raise UsageError(f"{text!r}: a port is between 1 and 65535", hint=_HINT)
        return cls(match["host"] or match["six"], port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True
