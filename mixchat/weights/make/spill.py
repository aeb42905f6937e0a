"""Tensors put aside until a later shard comes, with which a part can be made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from mixchat.errors import CheckpointError
from mixchat.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256

ASIDE_PREFIX = "aside-"


class Spill:
    """The files of them in `directory`, one for each shard that some were taken of.

    `recorded` is what the journal says, by file: what it does not name is as if it were not there.
    """

    def __init__(self, directory: Path, recorded: Mapping[str, Collection[str]]) -> None:
        self._directory = directory
        self._files: dict[str, set[str]] = {}
        for path in directory.glob(ASIDE_PREFIX + "*"):
            # A file of this name is whole, unless the disk went wrong: then it is as if not there.
            with suppress(CheckpointError), SafetensorsFile(path) as file:
                here = {spec.name for spec in file.header.specs}
                if here <= set(recorded.get(path.name, ())):
                    self._files[path.name] = here

    @property
    def names(self) -> set[str]:
        """The tensors that are here."""
        return set().union(*self._files.values())

    def read(self, name: str) -> torch.Tensor:
        """One of them."""
        holder = next(file for file, names in self._files.items() if name in names)
        with SafetensorsFile(self._directory / holder) as file:
            return file.read(name)

    def put(
        self, shard: str, file: SafetensorsFile, names: list[str]
    ) -> tuple[str, dict[str, str]]:
        """Copy these tensors of `file`; the copy's name, and the SHA-256 in hex of each of them."""
        path, digests = self._directory / f"{ASIDE_PREFIX}{shard}", {}
        with SafetensorsWriter(path, [file.header.spec(name) for name in names]) as writer:
            for name in names:
                tensor = file.read(name)
                writer.write(name, tensor)
                digests[name] = tensor_sha256(tensor)
        self._files[path.name] = set(names)
        return path.name, digests

    def drop_all_but(self, names: set[str]) -> None:
        """Remove the files with nothing of `names` in them."""
        for holder in [file for file, held in self._files.items() if not held & names]:
            (self._directory / holder).unlink()
            del self._files[holder]
