"""An installed model is made anew and interrupted with these."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from weight_tools import Meter

from mixchat.install.care.housekeeping import not_in_use
from mixchat.install.make import build
from mixchat.install.make.parts import ModelPart
from mixchat.install.make.rebuild import Rebuild, Remake
from mixchat.install.make.unfinished import ModelWriter
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import read_manifest

FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
DENSE: dict[str, Any] = {"attention": 16, "head": 16}
SHARED, HEAD = "shared.safetensors", "lm_head.weight"


def reform(directory: Path, meter: Meter | None = None) -> None:
    """Round attention and head of an installed model from 16 bits to 8."""
    progress = meter or Meter()
    with not_in_use(directory):
        old = installed_blueprint(directory, read_manifest(directory))
        eight = replace(old.quantization, attention="int8", head="int8")
        model = Blueprint(old.config, eight, old.layers)

        def is_rounded(part: ModelPart) -> bool:
            return part.linear is not None and part.linear.quant_type == "int8"

        def make(part: ModelPart) -> list[torch.Tensor]:
            assert part.linear is not None
            return part.linear.encode(load_file(directory / part.file)[part.name])

        if old.quantization.head != "int8":
            build = Rebuild(directory, model, "rounding", Remake(is_rounded, make))
            progress.note(f"rounding takes {build.need}")
            build.run(progress)


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this at a part, or the first part of a file. The journal has all parts before."""
    write = ModelWriter.write

    def stopping(writer: ModelWriter, part: ModelPart, tensors: Any) -> dict[str, str]:
        if name in (part.file, part.name):
            raise error
        return write(writer, part, tensors)

    patch.setattr(ModelWriter, "write", stopping)
    patch.setattr(build, "_SAVE_INTERVAL_S", -1.0)
