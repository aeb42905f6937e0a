"""An installed model is damaged and checked with these."""

from __future__ import annotations

from pathlib import Path

from mixchat.progress import NoProgress
from mixchat.weights.care.verify import Damage
from mixchat.weights.care.verify import verify as verify_model

EXPERTS = "experts-000.safetensors"
SHARED = "shared.safetensors"


def verify(directory: Path) -> list[Damage]:
    return verify_model(directory, NoProgress())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
