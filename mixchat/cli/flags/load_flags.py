"""The flags of loading a model, and the options that they give."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

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
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import AGAIN, MEMORY, MODEL, PREFIX, common, option, setting
from mixchat.cli.flags.shell_completion import models_here, one_of, runnable_models
from mixchat.face.numbers import LENGTHS, SAMPLING

# Each number's flag and limits, by its name in Python.
_NUMBERS = {number.field: (f"--{name}", number) for name, number in {**SAMPLING, **LENGTHS}.items()}


def within_limits(name: str) -> Callable[[Any], object]:
    """Return a check that raises `UsageError` outside the limits of a flag. NaN always is."""
    flag, number = _NUMBERS[name]
    return lambda value: number.checked(flag, value)


def checked_model(name: str) -> str:
    """Return the name. Raises `UsageError` if it is empty or not UTF-8."""
    return checked(name, "the model's name")


def _check_kv_bits(bits: int) -> None:
    if bits not in get_args(CacheBits):
        raise UsageError(f"--kv-bits has to be 8 or 16, not {bits}")


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


def _default_model() -> str:
    from mixchat.install.models import default_model

    return default_model()


_DEFAULT_MODEL = {
    "default_factory": _default_model,
    "show_default": "the only installed one, else instruct",
}
MODEL_NAME = setting(
    "-m --model NAME",
    "A name that 'mixchat list' or 'mixchat plan' shows, demo, or ORG/NAME on the hub.",
    MODEL,
    ...,
    check=checked_model,
    autocompletion=runnable_models,
    **_DEFAULT_MODEL,
)
CONTEXT_SIZE = setting(
    "--ctx-size N",
    "Context size in tokens.",
    MEMORY,
    check=within_limits("ctx_size"),
    show_default="by free memory, 8192 to 32768",
)
EXACT_PROMPTS = setting(
    "--exact-prompts/--no-exact-prompts",
    "Process prompts more slowly, so that a resumed or cached chat gets the same answers.",
    MEMORY,
)
KV_BITS = setting(
    "--kv-bits N",
    "Bits of each number in the KV cache, 16 or 8.",
    MEMORY,
    check=_check_kv_bits,
    autocompletion=one_of("8", "16"),
    show_default="16",
)
DENSE_BITS = ("16", "8", "6", "4")  # of attention and output head
DEFAULT_DENSE_BITS = "8; 6 in models of small experts on a CPU"
EXPERT_BITS = ("16", "4", "3", "2")  # of whole types
JSON = option("--json", "Print JSON, for programs.")


def parallel(default: int) -> Any:
    """Return the flag `--parallel`."""
    help = "Answers to generate at once, each with its own context."
    return setting("--parallel N", help, MEMORY, default, min=1, max=64)


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """The flags of the memory to take and of the device that computes."""

    host_memory: str | None = setting(
        "--host-memory SIZE",
        "RAM for experts, such as 8GB, or 50% of all experts.",
        MEMORY,
        check=MemoryBudget.parse,
        show_default="all that fits",
    )
    device_memory: str | None = setting(
        "--device-memory SIZE",
        "GPU memory to use, such as 8GB, 12GB,8GB for two GPUs, or 50% of what is free.",
        MEMORY,
        check=MemoryBudget.parse_list,
        show_default="all that fits",
    )
    device: str | None = setting(
        "--device NAME",
        "Device to compute on: cpu, cuda (all GPUs), or GPUs such as cuda:0,cuda:1.",
        MEMORY,
        check=_check_device,
        autocompletion=one_of("cpu", "cuda"),
        show_default="the GPUs or the CPU, whichever is faster by the plan",
    )


@dataclass(frozen=True, kw_only=True)
class HolderFlags(MemoryFlags):
    """The flags of a program that holds experts."""

    key_file: Path | None = setting(
        "--key-file FILE",
        "The workers' key, which 'mixchat worker --new-key' writes.",
        MEMORY,
        show_default="worker.key in the data directory",
    )


@dataclass(frozen=True, kw_only=True)
class LoadFlags(HolderFlags):
    """The flags of a program that loads a model."""

    worker: list[str] | None = setting(
        "--worker HOST[:PORT]",
        f"Let the machine HOST, which runs 'mixchat worker', compute experts, too; {AGAIN}.",
        MEMORY,
        check=_check_workers,
    )
    kv_bits: int | None = KV_BITS


INSTALLED = typer.Argument(
    metavar="MODEL", autocompletion=models_here, help="A name that 'mixchat list' shows."
)
ANY_MODEL = (
    "A name that 'mixchat list' or 'mixchat plan' shows, demo, ORG/NAME or ORG/NAME:Q4_K_M (GGUF) "
    "on the hub, a directory, or a .gguf file."
)


def expert_bits(shown: str, bits: Sequence[str] = EXPERT_BITS) -> Any:
    """Return the flag `--expert-bits` for these bits, with its default as `shown`."""
    return option(
        "--expert-bits BITS",
        f"Bits of an expert's weight ({', '.join(bits)}, or between, as 2.4), or the memory of the "
        "whole model, such as 14GB.",
        autocompletion=one_of(*bits),
        show_default=shown,
    )


def dense_bits(shown: str) -> Any:
    """Return the flag `--dense-bits`, with its default as `shown`."""
    return option(
        "--dense-bits BITS",
        f"Bits of a weight of attention and head ({', '.join(DENSE_BITS)}), or of each, as in "
        "attention=8,head=6.",
        autocompletion=one_of(*DENSE_BITS),
        show_default=shown,
    )


def model_argument(help: str, default: Any = ..., **argument: Any) -> Any:
    """Return the argument MODEL, by default the setting `model`, then as MODEL_NAME."""
    return typer.Argument(
        default,
        metavar="MODEL",
        **common(f"{PREFIX}MODEL", checked_model),
        autocompletion=runnable_models,
        help=help,
        **{**(_DEFAULT_MODEL if default is ... else {}), **argument},
    )


def expanded(path: Path) -> Path:
    """Expand ~ in a path, which no shell does in --key-file=~/FILE or in a variable."""
    return Path(os.path.expanduser(path))


# The names of flags, and the readers of their values, by the field of `LoadOptions`.
_NAMES = {"context_size": "ctx_size", "workers": "worker"}
_READERS: dict[str, Callable[[Any], Any]] = {
    "host_memory": MemoryBudget.parse,
    "device_memory": MemoryBudget.parse_list,
    "workers": tuple,
    "key_file": expanded,
}


def load_options(flags: Any, **fixed: Any) -> LoadOptions:
    """Return the options that a command's flags give, and the `fixed` ones. Raises `UsageError`."""
    options: dict[str, Any] = {}
    for field in fields(LoadOptions):
        value = getattr(flags, _NAMES.get(field.name, field.name), None)
        if value is not None:
            options[field.name] = _READERS.get(field.name, lambda same: same)(value)
    return LoadOptions(**{**options, **fixed})


def parse_dense_bits(text: str | None) -> DenseBits:
    """Return the bits that "8" or "attention=8,head=16" requests. Raises `UsageError`."""
    if text is None:
        return DenseBits()
    if "=" not in text:
        bits = _dense_bits(text)
        return DenseBits(bits, bits)
    by_name: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = (piece.strip() for piece in item.partition("="))
        if name not in DenseBits._fields:
            names = " and ".join(DenseBits._fields)
            raise UsageError(f"--dense-bits {text!r}: the parts are {names}")
        if name in by_name:
            raise UsageError(f"--dense-bits {text!r} names {name!r} twice")
        by_name[name] = _dense_bits(value)
    return DenseBits(**by_name)


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
        raise UsageError(f"--dense-bits has to be 16, 8, 6 or 4, not {text!r}")
    return int(text)
