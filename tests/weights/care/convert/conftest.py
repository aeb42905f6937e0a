"""Models to convert."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_tools import DENSE


@pytest.fixture
def dense(tiny_checkpoint: Path, install: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with attention and head in 16 bits that a test may change."""
    made = install(tiny_checkpoint, **DENSE)
    return Path(shutil.copytree(made, tmp_path / "models" / "mine"))
