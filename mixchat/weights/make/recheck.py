"""Checks the finished parts of an unfinished model against its journal.

A disk may have changed a byte since it was written. The finished model's manifest would list the
SHA-256 of the right bytes, and only `verify` would find the fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular
from mixchat.base.progress import NoProgress, Progress, Task, progress_bar
from mixchat.base.safetensors import Header, SafetensorsFile
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import file_layouts
from mixchat.weights.make.spill import SPILL_PREFIX

Digests = Mapping[str, Mapping[str, str]]


def find_damaged(
    directory: Path, blueprint: Blueprint, made: Digests, progress: Progress
) -> dict[str, set[str]]:
    """Return the tensors of `made` whose bytes have changed since they were written, by file."""
    headers = {name: layout.header for name, layout in file_layouts(blueprint).items()}
    headers |= _spill_headers(directory)
    found = {}
    here = {name: _known(headers[name], made[name]) for name in made if name in headers}
    whole = sum(headers[name].spec(tensor).nbytes for name in here for tensor in here[name])
    with progress_bar(
        progress if whole else NoProgress(), "checking finished parts", whole
    ) as task:
        for name, digests in here.items():
            wrong = set(_wrong(directory / name, headers[name], digests, task))
            # A spill file is written again as a whole.
            found[name] = set(made[name]) if wrong and name.startswith(SPILL_PREFIX) else wrong
    return {name: wrong for name, wrong in found.items() if wrong}


def _spill_headers(directory: Path) -> dict[str, Header]:
    headers = {}
    for path in directory.glob(SPILL_PREFIX + "*"):
        with suppress(CheckpointError), SafetensorsFile(path) as file:
            headers[path.name] = file.header
    return headers


def _known(header: Header, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the tensors that the file has, in the order of their bytes."""
    return {spec.name: digests[spec.name] for spec in header.specs if spec.name in digests}


def _wrong(path: Path, header: Header, digests: Mapping[str, str], task: Task) -> Iterator[str]:
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            for name, sha256 in digests.items():
                size = header.spec(name).nbytes
                file.seek(header.start(name))
                if hashlib.sha256(read_most(file, size)).hexdigest() != sha256:
                    yield name
                task.advance(size)
    except OSError:  # it is not there, or the disk cannot read it
        yield from digests


def read_most(file: FileIO, size: int) -> memoryview:
    """Return the next `size` bytes, or fewer where the file ends before."""
    data, done = memoryview(bytearray(size)), 0
    while done < size and (count := file.readinto(data[done:])):
        done += count
    return data[:done]
