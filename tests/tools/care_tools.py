"""An installed model is damaged, checked and repaired with these."""

from pathlib import Path

from mixchat.base.progress import NoProgress
from mixchat.install.care.housekeeping import not_in_use
from mixchat.install.care.repair import Damage, repair
from mixchat.install.care.repair import verify as verify_model
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.format.manifest import Source, restore_manifests

EXPERTS = "experts-000.safetensors"
SHARED = "shared.safetensors"


def verify(directory: Path) -> list[Damage]:
    return verify_model(directory, NoProgress())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def mend(directory: Path, checkpoint: Path) -> None:
    with not_in_use(directory):
        damages = verify(directory)
        restore_manifests(directory)
        opened = DirectoryCheckpoint(checkpoint, Source(str(checkpoint)))
        repair(directory, damages, opened, NoProgress())
