"""Makes a model anew of the installed one: calibrated or repaired.

A part is the installed model's, or is made of the checkpoint. Files in which no part changes
are linked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mixchat.base import machine
from mixchat.base.errors import CheckpointError
from mixchat.base.files import (
    open_regular,
    read_all,
    read_bytes,
    reading,
    temporary_path,
    write_file,
)
from mixchat.base.progress import Progress
from mixchat.base.safetensors import tensor_sha256
from mixchat.install.make.build import Build
from mixchat.install.make.needs import SMALL_FILES_BYTES, Need
from mixchat.install.make.parts import ModelPart, model_parts
from mixchat.install.make.unfinished import ModelWriter
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import MANIFEST_FILE, Manifest, read_manifest, repair_hint
from mixchat.weights.format.workspace import base_of


class Remake(NamedTuple):
    """The parts that are made from the checkpoint again, and the function that makes one."""

    parts: Callable[[ModelPart], bool]
    make: Callable[[ModelPart], list[torch.Tensor]]
    uses_inputs: bool = False  # a calibration's, which are removed afterwards


class Rebuild(Build):
    """The build of the model `blueprint` of the one that is installed in `directory`.

    doing: the title of the progress bar, such as "repairing". damaged: files to write again whether
    or not a part changes. `changed` names the files that differ. The caller has the model's lock.
    """

    def __init__(
        self,
        directory: Path,
        blueprint: Blueprint,
        doing: str,
        remake: Remake | None = None,
        damaged: Collection[str] = (),
    ) -> None:
        self.title = f"{doing} {directory.name}"
        self._manifest = read_manifest(directory)
        self._remake = remake
        old = installed_blueprint(directory, self._manifest)
        self._old_headers = old.headers()
        self._old_parts = {part.name: part for part in model_parts(old)}
        changed = {
            part.file
            for part in model_parts(blueprint)
            if self._old_parts[part.name].tensors != part.tensors or (remake and remake.parts(part))
        }
        self.changed = changed | {*damaged}
        linked = _has_links(directory)
        self._kept = self._old_headers.keys() - self.changed if linked else set()
        uses_inputs = remake is not None and remake.uses_inputs
        work = {"base": base_of(directory), "doing": doing, "uses_inputs": uses_inputs}
        super().__init__(directory, self._manifest.source, blueprint, work, self._kept)

    @property
    def need(self) -> Need:
        """Return the need of disk beyond what is made already."""
        files = [self.directory / name for name in self.headers]
        made_bytes = sum(map(machine.disk_usage, files)) if self.journal.head == self.head else 0
        size = sum(header.size for header in self.headers.values()) - made_bytes
        return Need(self.target, max(0, size) + SMALL_FILES_BYTES, machine.free_disk(self.target))

    def find_work(self) -> None:
        super().find_work()
        # A calibrated w2 is fitted to the products of w13, which was made just before it.
        experts = {part.expert for part in self.parts if part.expert}
        self.parts = [
            part for part in self.all_parts if part in self.parts or part.expert in experts
        ]

    def begin(self) -> Manifest:
        self.need.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in self._manifest.files:
            write_file(self.directory / name, read_bytes(self.target / name))
        for name in self._manifest.weights:
            new = self.directory / name
            # A link of an earlier run goes, because a file that is damaged since would be written
            # in place.
            if new.exists() and (name in self._kept or new.stat().st_nlink > 1):
                new.unlink()
            if name in self._kept:
                os.link(self.target / name, new)
        return replace(self._manifest, weights={n: self._manifest.weights[n] for n in self._kept})

    def made_parts(
        self, writer: ModelWriter, progress: Progress
    ) -> Iterator[tuple[ModelPart, Sequence[torch.Tensor]]]:
        remake = self._remake
        for part in self.parts:
            if remake is not None and remake.parts(part):
                yield part, remake.make(part)
            else:
                yield part, self._read(self._old_parts[part.name])

    def _read(self, part: ModelPart) -> list[torch.Tensor]:
        """Read a part of the installed model. Raises `CheckpointError` if it is damaged."""
        path = self.target / part.file
        header = self._old_headers[part.file]
        tensors = []
        with reading(path), open(open_regular(path), "rb") as file:
            for spec in part.tensors:
                block = torch.zeros(spec.nbytes, dtype=torch.uint8)
                # The blueprint tells the place, because the file's header may be damaged.
                read_all(file.fileno(), header.start(spec.name), block.numpy().data)
                tensor = block.view(spec.dtype).view(spec.shape)
                if tensor_sha256(tensor) != self._manifest.weights[part.file].sha256[spec.name]:
                    raise CheckpointError(
                        f"{path}: {spec.name} is damaged (its SHA-256 differs)",
                        hint=repair_hint(self.target),
                    )
                tensors.append(tensor)
        return tensors


def _has_links(directory: Path) -> bool:
    """Return whether the disk's file system lets a file have two names."""
    name = temporary_path(directory / "link")
    try:
        os.link(directory / MANIFEST_FILE, name)
    except OSError:
        return False
    name.unlink()
    return True
