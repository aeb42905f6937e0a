"""Models in GGUF: installed, they are those of the Hugging Face checkpoints they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest
from weight_tools import files_of

from mixchat.base.progress import NoProgress
from mixchat.weights.format.manifest import Source
from mixchat.weights.make.build import Build
from mixchat.weights.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.weights.source.open_checkpoint import open_checkpoint


def install_from(path: Path, target: Path, **options: object) -> dict[str, bytes]:
    """Install a checkpoint, and return its files of weights."""
    with open_checkpoint(Source(str(path)), target, NoProgress()) as opened:
        Build(opened, target, make_blueprint(opened.index, QuantizeOptions(**options))).run()
    return {name: data for name, data in files_of(target).items() if "safetensors" in name}


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_each_family_is_installed_as_from_its_own_checkpoint(
    family: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(model_type=family, vocab_size=262)
    path = gguf_files.write(checkpoint, tmp_path / "model.gguf")
    for options in ({}, {"quant_type": "none"}):
        made = install_from(path, tmp_path / f"a{len(options)}", **options)
        assert made == install_from(checkpoint, tmp_path / f"b{len(options)}", **options)
