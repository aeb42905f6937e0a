"""The flags that name and load a model, and the bits of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from mixchat.base.errors import UsageError, alternatives
from mixchat.base.options import DenseBits, ExpertSize, LoadOptions
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import MEMORY, MODEL, PREFIX, common, declared, option, setting
from mixchat.cli.flags.shell_completion import models_here, one_of, runnable_models


def _usual_model() -> str | None:
    """Return the default, or None if a model has to be named where one is needed."""
    from mixchat.install.models import default_model

    try:
        return default_model()
    except UsageError:
        return None


_DEFAULT_MODEL = {
    "default_factory": _usual_model,
    "show_default": "the one used last, else the only one",
}
MODEL_NAME = setting(
    "-m --model NAME",
    "A name that 'mixchat list' or 'mixchat plan' shows, demo, or ORG/NAME on the hub.",
    MODEL,
    ...,
    check=checked,
    autocompletion=runnable_models,
    **_DEFAULT_MODEL,
)
# The options of what takes memory, of what holds experts, and of what loads a model.
TAKING_MEMORY = ("host_memory", "device_memory", "device")
HOLDING = (*TAKING_MEMORY, "key_file")
LOADING = (*HOLDING, "workers", "kv_bits")
CONTEXT_SIZE = declared(LoadOptions, "context_size", MEMORY)
DENSE_BITS = ("16", "8", "6", "4")  # of attention and output head
DEFAULT_DENSE_BITS = "8; 6 in models of small experts on a CPU"
EXPERT_BITS = ("16", "4", "3", "2")  # of whole types
JSON = option("--json", "Print JSON, for programs.")


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
        **common(f"{PREFIX}MODEL", checked),
        help=help,
        **{
            "autocompletion": runnable_models,
            **(_DEFAULT_MODEL if default is ... else {}),
            **argument,
        },
    )


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
            f"--expert-bits has to be {alternatives(EXPERT_BITS)}, not {text!r}",
            hint="Or a number such as 2.4, which mixes types, or a size such as 14GB.",
        )
    return bits._replace(context_size=context_size)


def _dense_bits(text: str) -> int:
    if text.strip() not in DENSE_BITS:
        raise UsageError(f"--dense-bits has to be {alternatives(DENSE_BITS)}, not {text!r}")
    return int(text)
