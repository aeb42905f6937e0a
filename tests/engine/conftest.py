from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_of(
    make_checkpoint: Callable[..., Path], install: Callable[..., Path]
) -> Callable[[dict[str, Any], dict[str, Any]], Path]:
    """Return the model installed from a checkpoint with these changes, made once."""
    made: dict[str, Path] = {}

    def model(changes: dict[str, Any], options: dict[str, Any]) -> Path:
        key = repr((changes, options))
        if key not in made:
            made[key] = install(make_checkpoint(**changes), **options)
        return made[key]

    return model
