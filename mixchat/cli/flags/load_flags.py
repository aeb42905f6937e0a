"""The flags of loading a model, and the options that they give."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import (
    CacheBits,
    DenseBits,
    ExpertSize,
    LoadOptions,
    NetworkAddress,
    device_names,
)
from mixchat.base.quantities import MemoryBudget
from mixchat.chat.parameters import LENGTHS, SAMPLING
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import (
    AGAIN,
    MEMORY,
    MODEL,
    OUTPUT,
    option,
    setting,
    setting_argument,
)
from mixchat.cli.flags.shell_completion import one_of, runnable_models
from mixchat.experts.cache import POLICIES

# Each number's flag and limits, by its name in Python.
_NUMBERS = {number.field: (f"--{name}", number) for name, number in {**SAMPLING, **LENGTHS}.items()}


def within_limits(name: str) -> Callable[[Any], None]:
    """Return a check that raises `UsageError` outside the limits of a flag. NaN always is."""
    flag, number = _NUMBERS[name]
    return lambda value: number.check(flag, value)


def checked_model(name: str) -> str:
    """Return the name. Raises `UsageError` if it is empty or not UTF-8."""
    return checked(name, "the model's name")


def _checked_bits(bits: int | None) -> CacheBits | None:
    if bits in (None, *get_args(CacheBits)):
        return cast("CacheBits | None", bits)
    raise UsageError(f"--kv-bits has to be 8 or 16, not {bits}")


def _check_policy(name: str) -> None:
    if name not in POLICIES:
        raise UsageError(f"--cache-policy has to be {', '.join(POLICIES)}, not {name!r}")


def _check_device(text: str) -> None:
    for name in map(str.strip, text.split(",")):
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
            raise UsageError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N")
    device_names(text)


def _check_workers(addresses: list[str]) -> None:
    seen: set[NetworkAddress] = set()
    for address in map(NetworkAddress.parse, addresses):
        if address in seen:
            raise UsageError(f"--worker {address} is given twice")
        seen.add(address)


Model = Annotated[
    str,
    setting(
        "-m --model NAME",
        "instruct, qwen3, gpt-oss or another known one (see 'mixchat plan'), demo, ORG/NAME, or a "
        "name that 'mixchat list' shows.",
        MODEL,
        check=checked_model,
        autocompletion=runnable_models,
    ),
]
ContextSize = Annotated[
    int | None,
    setting(
        "--ctx-size N",
        "Context size in tokens.",
        MEMORY,
        check=within_limits("ctx_size"),
        show_default="the model's, at most 8192",
    ),
]
Parallel = Annotated[
    int,
    setting(
        "--parallel N",
        "Answers that are generated at once, each with a context of its own.",
        MEMORY,
        min=1,
        max=64,
    ),
]
KVBits = Annotated[
    int | None,
    setting(
        "--kv-bits N",
        "Bits of each number in the KV cache: 16, or 8 to halve its memory.",
        MEMORY,
        check=_checked_bits,
        autocompletion=one_of("8", "16"),
        show_default="16",
    ),
]
ExactPrompts = Annotated[
    bool,
    setting(
        "--exact-prompts/--no-exact-prompts",
        "Process prompts with the arithmetic of decoding. This is slower, but the answers are "
        "the same whether a chat continues, is resumed, or comes from a cache.",
        MEMORY,
        show_default=False,
    ),
]
HostMemory = Annotated[
    str | None,
    setting(
        "--host-memory SIZE",
        "RAM for experts: 300MB, 8GiB, or 50% of all experts.",
        MEMORY,
        check=MemoryBudget.parse,
        show_default="all that fits",
    ),
]
DeviceMemory = Annotated[
    str | None,
    setting(
        "--device-memory SIZE",
        "GPU memory to use: 8GB, or 50% of the free GPU memory; 12GB,8GB of two GPUs.",
        MEMORY,
        check=MemoryBudget.parse_list,
        show_default="all that fits",
    ),
]
Device = Annotated[
    str | None,
    setting(
        "--device NAME",
        "cpu, cuda (all GPUs), cuda:N, or several: cuda:0,cuda:1.",
        MEMORY,
        check=_check_device,
        autocompletion=one_of("cpu", "cuda"),
        show_default="cuda if there is a GPU, else cpu",
    ),
]
Worker = Annotated[
    list[str] | None,
    setting(
        "--worker HOST[:PORT]",
        f"Compute experts on the machine HOST, too, on which 'mixchat worker' runs; {AGAIN}.",
        MEMORY,
        check=_check_workers,
    ),
]
KeyFile = Annotated[
    Path | None,
    setting(
        "--key-file FILE",
        "The workers' key, which 'mixchat worker --new-key' makes.",
        MEMORY,
        show_default="worker.key in the data directory",
    ),
]
CachePolicy = Annotated[
    str,
    setting(
        "--cache-policy NAME",
        "Experts that stay in memory: most recently used, counted by layer (layered) or "
        "overall (lru).",
        MEMORY,
        check=_check_policy,
        autocompletion=one_of(*POLICIES),
    ),
]
Trace = Annotated[
    Path | None,
    option(
        "--trace FILE",
        "Write which experts each token is routed to, as JSON Lines. An existing FILE is "
        "replaced only if it is a trace.",
        OUTPUT,
    ),
]
DENSE_BITS = ("16", "8", "6", "5", "4")  # of attention and output head
EXPERT_BITS = ("16", "4", "3", "2")  # of whole types
ExpertBits = Annotated[
    str | None,
    option(
        "--expert-bits BITS",
        "Bits of each weight of the experts: 4, 3, 2, or 16 as in the checkpoint; others, such as "
        "2.4, mix types by layer; or the memory that the whole model may take, such as 14GB. "
        "Experts that are published in 4 bits stay as they are.",
        autocompletion=one_of(*EXPERT_BITS),
        show_default="4",
    ),
]
AsJson = Annotated[bool, option("--json", "Print JSON, for programs.")]


def installed_model_argument(help: str) -> Any:
    """Return the argument MODEL."""
    return typer.Argument(metavar="MODEL", autocompletion=runnable_models, help=help)


def model_argument(help: str, **argument: Any) -> Any:
    """Return the argument MODEL, whose default is the setting `model`."""
    return setting_argument(
        "model",
        metavar="MODEL",
        check=checked_model,
        autocompletion=runnable_models,
        help=help,
        **argument,
    )


def expanded(path: Path) -> Path:
    """Expand ~ in a path, which no shell does in --key-file=~/FILE or in a variable."""
    return Path(os.path.expanduser(path))


# The field of `LoadOptions` and its reader, by the parameter's name.
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "host_memory": ("host_memory", MemoryBudget.parse),
    "device_memory": ("device_memory", MemoryBudget.parse_list),
    "ctx_size": ("context_size", int),
    "kv_bits": ("kv_bits", _checked_bits),
    "exact_prompts": ("exact_prompts", bool),
    "parallel": ("parallel", int),
    "device": ("device", str),
    "cache_policy": ("cache_policy", str),
    "trace": ("trace", Path),
    "worker": ("workers", tuple),
    "key_file": ("key_file", expanded),
}


def load_options(flags: Mapping[str, Any], **fixed: Any) -> LoadOptions:
    """Return the options that flags give, and the `fixed` ones. Raises `UsageError`."""
    given = {
        field: read(flags[name])
        for name, (field, read) in _FIELDS.items()
        if flags.get(name) is not None
    }
    return LoadOptions(**{**given, **fixed})


def parse_dense_bits(text: str | None) -> DenseBits:
    """Return the bits that "8" or "attention=8,head=16" requests. Raises `UsageError`."""
    if text is None:
        return DenseBits()
    if "=" not in text:
        bits = _dense_bits(text)
        return DenseBits(bits, bits)
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in DenseBits._fields:
            parts = " and ".join(DenseBits._fields)
            raise UsageError(f"--dense-bits {text!r}: the parts are {parts}")
        if name in found:
            raise UsageError(f"--dense-bits {text!r} names {name!r} twice")
        found[name] = _dense_bits(value)
    return DenseBits(**found)


def parse_expert_bits(text: str | None, context_size: int | None = None) -> ExpertSize | None:
    """Return the bits that "4", "3.8" or "24GB" requests. Raises `UsageError`."""
    if text is None:
        return None
    try:
        bits = ExpertSize.parse(text)
    except UsageError:
        bits = ExpertSize(0)
    if bits.memory is None and (bits.bits == 0 or bits.whole not in (None, *map(int, EXPERT_BITS))):
        raise UsageError(
            f"--expert-bits has to be 16, 4, 3 or 2, not {text!r}",
            hint="Or a number such as 2.4, which mixes types, or a size such as 14GB.",
        )
    return bits._replace(context_size=context_size)


def _dense_bits(text: str) -> int:
    if text.strip() not in DENSE_BITS:
        raise UsageError(f"--dense-bits has to be 16, 8, 6, 5 or 4, not {text!r}")
    return int(text)
