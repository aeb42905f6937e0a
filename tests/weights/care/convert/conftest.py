"""Models to convert."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_tools import ALL_4BIT, DENSE, LAYOUTS


@pytest.fixture(scope="session")
def both(tiny_checkpoint: Path, install: Callable[..., Path]) -> dict[str, Path]:
    """The same model quantized straight into either layout. Do not write into it."""
    return {layout: install(tiny_checkpoint, layout=layout, **ALL_4BIT) for layout in LAYOUTS}


@pytest.fixture
def installed(both: dict[str, Path], tmp_path: Path) -> Path:
    """A copy in the layout "bitsandbytes" that a test may change."""
    return Path(shutil.copytree(both["bitsandbytes"], tmp_path / "models" / "mine"))


@pytest.fixture
def dense(tiny_checkpoint: Path, install: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with attention and head in 16 bits that a test may change."""
    made = install(tiny_checkpoint, layout="bitsandbytes", **DENSE)
    return Path(shutil.copytree(made, tmp_path / "models" / "mine"))
