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
from mixchat.weights.make.unfinished import ModelWriter

FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
ALL_4BIT: dict[str, Any] = {"attention": 4, "head": 4}
DENSE: dict[str, Any] = {"attention": 16, "head": 16}
EIGHT = DenseBits(8, 8)
SHARED, HEAD = "shared.safetensors", "lm_head.weight"


def reform(directory: Path, bits: DenseBits = EIGHT, meter: Meter | None = None) -> bool:
    with not_in_use(directory):
        return convert(directory, find_target(directory, bits), meter or Meter())


def text_of(directory: Path) -> list[int]:
    engine = load_engine(directory, LoadOptions(device="cpu"))
    greedy = SamplingOptions(temperature=0)
    return list(engine.generate([5, 17, 42], sampling=greedy, stop_ids=set(), max_tokens=20))


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this at a part, or the first part of a file. The journal has all parts before."""
    write = ModelWriter.write

    def stopping(writer: ModelWriter, part: ModelPart, tensors: Any) -> dict[str, str]:
        if name in (part.file, part.name):
            raise error
        return write(writer, part, tensors)

    patch.setattr(ModelWriter, "write", stopping)
    patch.setattr(build, "_SAVE_INTERVAL_S", -1.0)
