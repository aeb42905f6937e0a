"""Reads the config.json of any family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import Family
from mixchat.weights.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """Read the keys of a config.json. Raises `CheckpointError` if no family here has them."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"config.json says model_type {kind!r:.80}, which mixchat does not run",
            hint=f"It runs {', '.join(FAMILIES)}.",
        )
    config = FAMILIES[kind].read_config(raw)
    config.check()
    return config


def read_config_file(path: Path) -> ModelConfig:
    """Read a config.json. Raises `CheckpointError`."""
    return read_config(read_json_object(path))
