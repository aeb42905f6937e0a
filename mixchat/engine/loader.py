"""The composition root: builds an `Engine` out of a kept model, a device and a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixchat.engine.generate import Engine
from mixchat.settings import MemoryBudget


@dataclass(frozen=True)
class LoadOptions:
    """How to load. None chooses from what the machine has."""

    expert_memory: MemoryBudget | None = None
    context_size: int | None = None
    device: str | None = None


def load_engine(directory: Path, options: LoadOptions) -> Engine:
    raise NotImplementedError
