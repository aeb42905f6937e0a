"""The options of sampling, of a chat and of loading a model, and a worker's address."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path
from typing import Literal, NamedTuple

from mixchat.base.errors import UsageError
from mixchat.base.quantities import MemoryBudget, parse_size

CacheBits = Literal[8, 16]
Overflow = Literal["stop", "drop-oldest"]
Think = Literal["show", "hide", "on", "off"]

_MOST_BITS = 16  # of a weight
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)

WORKER_PORT = 7917
_ADDRESS_HINT = f"Write it like 192.168.1.5, 192.168.1.5:{WORKER_PORT} or [fe80::1]:{WORKER_PORT}."
_HOST = r"[\w-]{1,63}(?:\.[\w-]{1,63})*\.?"
_ADDRESS = re.compile(
    rf"(?:\[(?P<six>.+)\]|(?P<host>{_HOST}))(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII
)


class DenseBits(NamedTuple):
    """The bits of a weight of attention and of head, 16, 8, 6 or 4, or None."""

    attention: int | None = None
    head: int | None = None


class ExpertSize(NamedTuple):
    """The bits of a weight of the experts, or the memory in bytes that the whole model may take.

    Whole bits name a type. Others count the scales, and mix types.
    """

    bits: float | None = None
    memory: int | None = None
    context_size: int | None = None  # in tokens, whose keys and values the memory holds, too

    @classmethod
    def parse(cls, text: str) -> ExpertSize:
        """Read `4`, `2.4` or `14GB`. Raises `UsageError`."""
        if not _NUMBER.fullmatch(text):
            return cls(memory=parse_size(text))
        if not 1 <= (bits := float(text)) <= _MOST_BITS:
            raise UsageError(f"a weight has 1 to {_MOST_BITS} bits, not {text}")
        return cls(bits)

    @property
    def whole(self) -> int | None:
        """Return the bits if they name a type."""
        return int(self.bits) if self.bits is not None and self.bits.is_integer() else None

    def __str__(self) -> str:
        if self.memory is not None:
            return f"{self.memory / 1e9:g}GB"
        return f"{self.bits:g}"


@dataclass(frozen=True)
class SamplingOptions:
    """The options of the sampler.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 switch that
    filter off. `presence_penalty` is taken off the logit of each token that the answer has,
    `frequency_penalty` once for each time. `logit_bias` is added, by token.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChatOptions:
    """The options of a chat's answers. None leaves one to the model or the server.

    `sampling` has those of `SamplingOptions` that were chosen, by name. `max_tokens` is the longest
    answer that is allowed, 0 for what fits.
    """

    sampling: Mapping[str, float | None] = field(default_factory=dict)
    system: str | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    overflow: Overflow = "stop"
    think: Think = "show"


@dataclass(frozen=True)
class LoadOptions:
    """The options of loading a model. None chooses by the machine."""

    host_memory: MemoryBudget | None = None  # RAM for experts
    device_memory: tuple[MemoryBudget, ...] = ()  # to take on all GPUs, or on each
    context_size: int | None = None  # tokens
    least_context: int = 0  # tokens, if memory allows and nobody chose a context
    kv_bits: CacheBits | None = None  # of a number in the KV cache, None for the model's dtype
    exact_prompts: bool = False  # compute batch-invariantly, with the bits of decode
    parallel: int = 1  # conversations at once, each with a KV cache of this context
    speculation: bool = True  # verify several tokens in one pass if text is repeated
    device: str | None = None  # torch's name, or several with commas between them
    workers: tuple[str, ...] = ()  # their addresses, HOST[:PORT]
    key_file: Path | None = None  # of the workers' key


def device_names(text: str) -> list[str]:
    """Return the names in a list of devices. Raises `UsageError`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--device {text!r} names {name!r} twice")
        if len(names) > 1 and ":" not in name:
            raise UsageError(
                f"--device {text!r}: {name!r} has to stand alone",
                hint="Use cpu, cuda for all GPUs, or a list of GPUs such as cuda:0,cuda:1.",
            )
    return names


@dataclass(frozen=True)
class NetworkAddress:
    """A host, by name or number, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, any_port: bool = False) -> NetworkAddress:
        """Read `HOST`, `HOST:PORT` or `[IPV6]:PORT`. Raises `UsageError`.

        With `any_port` the port may be 0.
        """
        match = _ADDRESS.fullmatch(f"[{text}]" if _is_ipv6(text) else text)
        if match is None or not (match["host"] or _is_ipv6(match["six"])):
            raise UsageError(f"cannot read {text!r} as HOST[:PORT]", hint=_ADDRESS_HINT)
        port = WORKER_PORT if match["port"] is None else int(match["port"])
        if port > 65535 or (port == 0 and not any_port):
            raise UsageError(f"{text!r}: a port is between 1 and 65535", hint=_ADDRESS_HINT)
        return cls(match["host"] or match["six"], port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True
