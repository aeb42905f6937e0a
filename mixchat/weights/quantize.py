"""From a checkpoint in bf16 to a kept model in 4 bits, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixchat.config import ModelConfig
from mixchat.progress import Progress


@dataclass(frozen=True)
class QuantizeOptions:
    """What becomes 4 bits. `quant_type` is the experts': "nf4", or "none" to keep them as they are."""

    quant_type: str = "nf4"
    attention: bool = False
    head: bool = False


@dataclass(frozen=True)
class Source:
    """Where a kept model came from; goes into its manifest."""

    repo: str
    commit: str | None = None


def kept_size(config: ModelConfig, options: QuantizeOptions) -> int:
    """Bytes that the kept model of this shape takes on disk."""
    raise NotImplementedError


def quantize_checkpoint(
    checkpoint: Path,
    target: Path,
    options: QuantizeOptions,
    *,
    source: Source,
    progress: Progress,
) -> None:
    raise NotImplementedError
