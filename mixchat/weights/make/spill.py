"""Tensors spilled to disk: the part that needs them also needs a later shard."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256

SPILL_PREFIX = "aside-"  # of file names: unfinished downloads of older versions have it


class Spill:
    """The spill files in `directory`, one for each shard that has spilled tensors.

    `recorded` is the journal's record, by file: a file that is not in it is ignored.
    """

    def __init__(self, directory: Path, recorded: Mapping[str, Collection[str]]) -> None:
        self._directory = directory
        self._files: dict[str, set[str]] = {}
        for path in directory.glob(SPILL_PREFIX + "*"):
            # A file of this name is complete, unless the disk is at fault: then it is ignored.
            with suppress(CheckpointError), SafetensorsFile(path) as file:
                here = {spec.name for spec in file.header.specs}
                if here <= set(recorded.get(path.name, ())):
                    self._files[path.name] = here

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors that are spilled."""
        return set().union(*self._files.values())

    def read(self, name: str) -> torch.Tensor:
        """Read a spilled tensor."""
        holder = next(file for file, names in self._files.items() if name in names)
        with SafetensorsFile(self._directory / holder) as file:
            return file.read(name)

    def write(
        self, shard: str, file: SafetensorsFile, names: list[str]
    ) -> tuple[str, dict[str, str]]:
        """Copy tensors of `file`; return the copy's name and the SHA-256 in hex of each tensor."""
        path, digests = self._directory / f"{SPILL_PREFIX}{shard}", {}
        with SafetensorsWriter(path, [file.header.spec(name) for name in names]) as writer:
            for name in names:
                tensor = file.read(name)
                writer.write(name, tensor)
                digests[name] = tensor_sha256(tensor)
        self._files[path.name] = set(names)
        return path.name, digests

    def keep_only(self, names: set[str]) -> None:
        """Remove the files that hold none of `names`."""
        for holder in [file for file, held in self._files.items() if not held & names]:
            (self._directory / holder).unlink()
            del self._files[holder]
