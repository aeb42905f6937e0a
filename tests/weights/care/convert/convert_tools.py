"""An installed model is converted and interrupted with these."""

from pathlib import Path
from typing import Any

import pytest
from weight_tools import Meter

from mixchat.base.options import DenseBits, LoadOptions, SamplingOptions
from mixchat.base.safetensors import SafetensorsWriter
from mixchat.loading.loader import load_engine
from mixchat.weights.care.convert import convert, find_target
from mixchat.weights.format.manifest import read_manifest
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
    return convert(directory, find_target(directory, layout, bits), meter or Meter())


def pack(directory: Path, meter: Meter | None = None) -> bool:
    return reform(directory, "cpu-packed", meter=meter)


def layout_of_target(directory: Path, asked: Layout | None) -> Layout:
    return find_target(directory, asked, AS_STORED).layout


def text_of(directory: Path) -> list[int]:
    engine = load_engine(directory, LoadOptions(device="cpu"))
    greedy = SamplingOptions(temperature=0)
    return list(engine.generate([5, 17, 42], sampling=greedy, stop_ids=set(), max_tokens=20))


def is_half_converted(directory: Path) -> bool:
    """Return whether files of both forms are mixed."""
    return any(record.unlike for record in read_manifest(directory).weights.values())


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this in the middle of writing a file."""
    write = SafetensorsWriter.write

    def stopping(self: SafetensorsWriter, tensor: str, *rest: Any) -> None:
        if self.path.name == f"{name}.mixchat.new" and len(self._todo) == 1:
            raise error
        write(self, tensor, *rest)

    patch.setattr(SafetensorsWriter, "write", stopping)
