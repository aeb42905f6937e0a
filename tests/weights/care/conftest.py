from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def installed(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "installed"))
