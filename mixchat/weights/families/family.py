"""The form of a family's description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixchat.base.model_config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A family of models, by config.json's `model_type`.

    read_config: reads a config.json. Raises `CheckpointError`.
    """

    model_type: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
