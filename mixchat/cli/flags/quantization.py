"""The flags of quantization: the bits of each weight, and the calibration of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import DenseBits

ExpertBits = Annotated[
    Literal["16", "4", "3"] | None,
    typer.Option(
        help="Bits of each weight of the experts; 16: as they are in the checkpoint.",
        show_default="4",
    ),
]

Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Round experts for text that the model writes itself, or reads.",
    ),
]
CalibrateText = Annotated[
    Path | None,
    typer.Option(
        "--calibrate-text",
        metavar="FILE",
        help="Calibrate with this text, not one that the model writes.",
    ),
]

_FLAG = "--dense-bits"


def parse_dense_bits(text: str | None) -> DenseBits:
    """Return the requested bits: "8" is for both, "attention=8,head=16" for each or one of them.

    Raises `UsageError`.
    """
    if text is None:
        return DenseBits()
    if "=" not in text:
        bits = _bits(text)
        return DenseBits(bits, bits)
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in DenseBits._fields:
            raise UsageError(f"{_FLAG} {text!r}: the parts are {' and '.join(DenseBits._fields)}")
        if name in found:
            raise UsageError(f"{_FLAG} {text!r} names {name!r} twice")
        found[name] = _bits(value)
    return DenseBits(**found)


def _bits(text: str) -> int:
    if text.strip() not in ("16", "8", "4"):
        raise UsageError(f"{_FLAG} has to be 16, 8 or 4, not {text!r}")
    return int(text)
