"""The options of sampling, of a chat and of loading a model, each declared once.

Flags, config.toml, variables, `/set`, Python's callers, the APIs and the docs read them from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from mixchat.base.errors import UsageError
from mixchat.base.option import (
    Choice,
    File,
    Float,
    Integer,
    Switch,
    Text,
    Texts,
    Tokens,
    is_unicode,
    options_of,
)
from mixchat.base.quantities import MemoryBudget, parse_size

CacheBits = Literal[8, 16]
Overflow = Literal["stop", "drop-oldest"]
Think = Literal["show", "hide", "on", "off"]

_MOST_BITS = 16  # of a weight
_MAX_INT32 = 2**31 - 1
_MAX_TOKENS = _MAX_INT32  # of a context: config.json's numbers are below 2**31
# Of what is added to a logit. No model's logits come near it, and sums over all tokens of a
# context, divided by the lowest temperature, stay finite in fp32.
_MAX_ADDED = 10**9
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


def device_names(text: str) -> list[str]:
    """Return the names in a list of devices. Raises `UsageError`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{text!r} names {name!r} twice")
        if len(names) > 1 and ":" not in name:
            raise UsageError(
                f"{text!r}: {name!r} has to stand alone",
                hint="Use cpu, cuda for all GPUs, or a list of GPUs such as cuda:0,cuda:1.",
            )
    return names


def _stops(texts: Sequence[str]) -> tuple[str, ...]:
    if not all(texts):
        raise UsageError("a text is empty")
    return tuple(map(_unicode, texts))


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise UsageError(f"{text!r:.80} is not UTF-8")
    return text


def _added(help: str) -> Float:
    return Float(help, least=-_MAX_ADDED, most=_MAX_ADDED)


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


@dataclass(frozen=True)
class SamplingOptions:
    """The options of the sampler. By default, a model's makers advise most of them.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 switch that filter off.
    """

    temperature: float = Float(
        "Sampling temperature; 0 is greedy.", "--temp --temperature X", least=0
    ).field(0.7)
    top_p: float = Float(
        "Sample from the smallest set of tokens whose probabilities sum to X.",
        "--top-p X",
        above=0,
        most=1,
    ).field(1.0)
    top_k: int = Integer(
        "Sample from the N most likely tokens (0: all).", "--top-k N", least=0, most=_MAX_INT32
    ).field(0)
    min_p: float = Float(
        "Drop tokens less likely than X times the most likely one.", "--min-p X", least=0, below=1
    ).field(0.0)
    repeat_penalty: float = Float(
        "Penalty for the last 64 tokens (1: none).", "--repeat-penalty X", least=0.01, most=100
    ).field(1.0)
    seed: int | None = Integer(
        "Seed of the sampling, which gives the same answer again on the same machine.",
        "--seed N",
        shown_default="random",
        least=0,
        most=2**63 - 1,
    ).field(None)
    presence_penalty: float = _added(
        "Number taken off the logit of each token that the answer has."
    ).field(0.0)
    frequency_penalty: float = _added(
        "Number taken off a token's logit for each time that the answer has it."
    ).field(0.0)
    logit_bias: tuple[tuple[int, float], ...] = _added(
        "Numbers added to logits, by token id."
    ).field(())


def accepted_numbers(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers of sampling that are within their limits, by their names."""
    return {
        name: number
        for name, option in options_of(SamplingOptions).items()
        if (number := option.accepted(numbers.get(name))) is not None
    }


def with_numbers(sampling: SamplingOptions, numbers: Mapping[str, Any]) -> SamplingOptions:
    """Return `sampling` with these numbers, by their names. Bad ones are ignored."""
    changed: Any = accepted_numbers(numbers)
    return replace(sampling, **changed)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The options of an answer. None leaves one to the model or the server."""

    max_tokens: int | None = Integer(
        "Maximum length of an answer in tokens, thinking included (0: as many as fit).",
        "-n --max-tokens N",
        shown_default="the model's, else a quarter of the context",
        least=0,
        most=_MAX_TOKENS,
        zero="what fits",
    ).field(None)
    stop: tuple[str, ...] = Texts("End the answer before TEXT.", "--stop TEXT", parse=_stops).field(
        ()
    )
    overflow: Overflow = Choice(
        "If the context is full, refuse the question (stop) or drop old turns (drop-oldest).",
        "--overflow POLICY",
        values=get_args(Overflow),
    ).field("stop")
    top_logprobs: int | None = Integer(
        "Number of likeliest tokens to report with each token (0: only its own probability).",
        least=0,
        most=_MAX_INT32,
    ).field(None)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions):
    """The options of a chat's answers. `sampling` has the chosen ones of `SamplingOptions`."""

    sampling: Mapping[str, float | None] = field(default_factory=dict)
    system: str | None = Text(
        "System prompt; an empty one removes it.", "-s --system TEXT", parse=_unicode
    ).field(None)
    think: Think = Choice(
        "Show thinking faintly (show), hide it (hide), ask for it (on) or for none (off).",
        "--think MODE",
        values=get_args(Think),
    ).field("show")


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """The options of tools that a model may call in a chat."""

    mcp: Path | None = File(
        "Let the model call tools of the MCP servers in FILE, JSON with mcpServers.",
        "--mcp FILE",
        shown_default="none",
    ).field(None)
    allow: tuple[str, ...] = Texts("Let TOOL run without a question.", "--allow TOOL").field(())


def _check_devices(text: str) -> str:
    for name in device_names(text):
        if not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,2})?", name):
            raise UsageError(f"{name!r} is not a device; use cpu, cuda or cuda:N")
    return text


def _workers(texts: Sequence[str]) -> tuple[str, ...]:
    seen: set[NetworkAddress] = set()
    for address in map(NetworkAddress.parse, texts):
        if address in seen:
            raise UsageError(f"{address} is given twice")
        seen.add(address)
    return tuple(texts)


@dataclass(frozen=True)
class LoadOptions:
    """The options of loading a model. None chooses by the machine."""

    host_memory: MemoryBudget | None = Text(
        "RAM for experts, such as 8GB, or 50% of all experts.",
        "--host-memory SIZE",
        shown_default="all that fits",
        parse=MemoryBudget.parse,
    ).field(None)
    device_memory: tuple[MemoryBudget, ...] = Text(
        "GPU memory to use, such as 8GB, 12GB,8GB for two GPUs, or 50% of what is free.",
        "--device-memory SIZE",
        shown_default="all that fits",
        parse=MemoryBudget.parse_list,
    ).field(())
    context_size: int | None = Tokens(
        "Context size in tokens, such as 8192 or 8k.",
        "--ctx-size N",
        shown_default="by free memory, 8192 to 32768",
        least=2,
        most=_MAX_TOKENS,
    ).field(None)
    least_context: int = Integer(
        "Tokens that the context holds if memory allows and no size is chosen.",
        least=0,
        most=_MAX_TOKENS,
    ).field(0)
    kv_bits: CacheBits | None = Choice(
        "Bits of each number in the KV cache, 16 or 8.",
        "--kv-bits N",
        shown_default="16",
        values=get_args(CacheBits),
    ).field(None)  # the model's dtype
    exact_prompts: bool = Switch(
        "Process prompts more slowly, so that a resumed or cached chat gets the same answers.",
        "--exact-prompts/--no-exact-prompts",
    ).field(False)
    parallel: int = Integer(
        "Answers to generate at once, each with its own context.", "--parallel N", least=1, most=64
    ).field(1)
    speculation: bool = Switch("Verify several tokens in one pass if text is repeated.").field(True)
    device: str | None = Text(
        "Device to compute on: cpu, cuda (all GPUs), or GPUs such as cuda:0,cuda:1.",
        "--device NAME",
        shown_default="the GPUs or the CPU, whichever is faster by the plan",
        parse=_check_devices,
        words=("cpu", "cuda"),
    ).field(None)
    workers: tuple[str, ...] = Texts(
        "Let the machine HOST, which runs 'mixchat worker', compute experts, too.",
        "--worker HOST[:PORT]",
        parse=_workers,
    ).field(())
    key_file: Path | None = File(
        "The workers' key, which 'mixchat worker --new-key' writes.",
        "--key-file FILE",
        shown_default="worker.key in the data directory",
    ).field(None)
