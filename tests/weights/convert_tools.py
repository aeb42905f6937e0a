"""An installed model is converted and interrupted with these."""

from pathlib import Path
from typing import Any

import pytest
from weight_tools import Meter

from mixchat.base.options import DenseBits, LoadOptions, SamplingOptions
from mixchat.loading.loader import load_engine
from mixchat.weights.care.convert import convert, find_target
from mixchat.weights.care.housekeeping import not_in_use
from mixchat.weights.make import build
from mixchat.weights.make.parts import ModelPart
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.matrix.linear import Layout

LAYOUTS: tuple[Layout, Layout] = ("bitsandbytes", "cpu-packed")
FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
ALL_4BIT: dict[str, Any] = {"attention": 4, "head": 4}
DENSE: dict[str, Any] = {"attention": 16, "head": 16}
AS_STORED, EIGHT = DenseBits(), DenseBits(8, 8)


def reform(
    directory: Path,
    layout: Layout | None = None,
    bits: DenseBits = AS_STORED,
    meter: Meter | None = None,
) -> bool:
    with not_in_use(directory):
        return convert(directory, find_target(directory, layout, bits), meter or Meter())


def pack(directory: Path, meter: Meter | None = None) -> bool:
    return reform(directory, "cpu-packed", meter=meter)


def layout_of_target(directory: Path, asked: Layout | None) -> Layout:
    return find_target(directory, asked, AS_STORED).layout


def text_of(directory: Path) -> list[int]:
    engine = load_engine(directory, LoadOptions(device="cpu"))
    greedy = SamplingOptions(temperature=0)
    return list(engine.generate([5, 17, 42], sampling=greedy, stop_ids=set(), max_tokens=20))


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this at the first part of a file. The journal has all parts before."""
    write = ModelWriter.write

    def stopping(writer: ModelWriter, part: ModelPart, tensors: Any) -> dict[str, str]:
        if part.file == name:
            raise error
        return write(writer, part, tensors)

    patch.setattr(ModelWriter, "write", stopping)
    patch.setattr(build, "_SAVE_INTERVAL_S", -1.0)
