"""The disk that making a model needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixchat.base import machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size

SMALL_FILES_BYTES = 16_000_000  # manifest, journal, tokenizer


@dataclass(frozen=True)
class Need:
    """The bytes needed in a place, and the bytes free there."""

    place: Path
    needed: int
    free: int

    @property
    def suffices(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        return f"{format_least(self.needed)} of disk in {self.place}, {format_size(self.free)} free"

    def check(self) -> None:
        """Raise `ResourceError` if the disk is short."""
        if not self.suffices:
            raise ResourceError(
                f"not enough disk in {self.place}: {format_least(self.needed)} needed, "
                f"{format_size(self.free)} free",
                hint="Free some space, or set MIXCHAT_HOME (models) or HF_HOME (the hub's "
                "cache) to a directory on a larger disk.",
            )


def add_up_needs(*needed: tuple[Path, int]) -> tuple[Need, ...]:
    """Return the need of each disk, which adds up its places."""
    needs: list[Need] = []
    for place, size in needed:
        for number, need in enumerate(needs):
            if machine.same_disk(need.place, place):
                needs[number] = Need(need.place, need.needed + size, need.free)
                break
        else:
            needs.append(Need(place, size, machine.free_disk(place)))
    return tuple(needs)
